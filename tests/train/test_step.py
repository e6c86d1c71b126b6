"""The step: one division, whatever the micro-batches and devices; a skipped one moves no bit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.config import TrainingConfig
from jrlhf.errors import MeshError
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.place import axes_shardings, put_batch
from jrlhf.train.optim import OPTIMIZERS, make_optimizer
from jrlhf.train.state import new_state, state_shardings
from jrlhf.train.step import make_evaluation, make_step
from jrlhf.types import Loss, Mean


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@functools.cache
def descent(toy, mesh, limit, accumulate):
    """A compiled step that records the gradient, and the state that it starts from."""
    mesh = make_mesh(mesh, devices=jax.devices()[:1] if mesh == "data=1" else None)
    tx, first = toy.recorder(), toy.params()
    placed = axes_shardings(toy.AXES, first, mesh)
    shardings = state_shardings(tx, first, placed)
    state = new_state(jax.device_put(first, placed), tx, shardings=shardings)
    step = make_step(
        toy.loss,
        tx,
        max_grad_norm=limit,
        accumulate=accumulate,
        mesh=mesh,
        shardings=shardings,
        donate=False,
    )
    return step, state, mesh


def descend(toy, *, mesh="data=1", batch=None, limit=None, accumulate=1):
    """The gradient that the optimizer was given, and the metrics."""
    step, state, mesh = descent(toy, mesh, limit, accumulate)
    new, metrics = step(state, {}, put_batch(mesh, toy.batch() if batch is None else batch))
    return jax.device_get(new.opt_state), {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope="module")
def reference(toy):
    """The gradient of the masked mean over the compacted tokens, in float64."""
    batch = toy.batch()
    first = jax.tree.map(lambda x: np.asarray(x, np.float64), toy.params())
    with jax.enable_x64(True):
        real = batch["mask"].astype(bool)
        x, y = batch["x"][real].astype(np.float64), batch["y"][real].astype(np.float64)

        def mean(params):
            return jnp.mean((toy.predict(params, x[:, None])[:, 0] - y) ** 2)

        value, gradient = jax.value_and_grad(mean)(first)
        return float(value), jax.tree.map(np.asarray, gradient)


def assert_close(got, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b))


@pytest.mark.parametrize("accumulate", [1, 2, 8, 16])
def test_micro_batches_never_matter(toy, reference, accumulate):
    gradient, metrics = descend(toy, accumulate=accumulate)
    assert_close(gradient, reference[1])
    np.testing.assert_allclose(metrics["loss"], reference[0], rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_devices_never_matter(toy, reference, mesh, accumulate):
    gradient, metrics = descend(toy, mesh=mesh, accumulate=accumulate)
    assert_close(gradient, reference[1])
    np.testing.assert_allclose(metrics["loss"], reference[0], rtol=1e-6)


def test_row_order_never_matters(toy, reference):
    order = np.random.default_rng(1).permutation(16)
    shuffled = {k: v[order] for k, v in toy.batch().items()}
    assert_close(descend(toy, batch=shuffled, accumulate=4)[0], reference[1])


def test_metrics_of_micro_batches_merge_by_their_kind(toy):
    whole, cut = descend(toy)[1], descend(toy, accumulate=8)[1]
    assert whole.keys() == cut.keys()
    for name in whole:
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-5, err_msg=name)
    assert whole["num_tokens"] == toy.batch()["lengths"].sum()


def test_grad_norm_is_reported_before_the_clip(toy, reference):
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(reference[1])))
    gradient, metrics = descend(toy, limit=norm / 4)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient))),
                               norm / 4, rtol=1e-5)  # fmt: skip
    assert_close(descend(toy, limit=norm * 4)[0], reference[1])


def test_scalars_of_a_batch_reach_every_micro_batch(toy):
    def loss(params, frozen, batch):
        out = toy.loss(params, frozen, batch)
        return Loss(Mean(out.objective.total * batch["beta"], out.objective.weight), out.metrics)

    tx = optax.sgd(1.0)
    steps = [make_step(loss, tx, max_grad_norm=0.0, accumulate=a) for a in (1, 4)]
    batch = {**jax.tree.map(jnp.asarray, toy.batch()), "beta": jnp.float32(3.0)}
    one, four = (step(new_state(toy.params(), tx), {}, batch)[0].params for step in steps)
    assert_close(four, one)


def test_frozen_parameters_reach_the_loss(toy):
    def loss(params, frozen, batch):
        x = jnp.sum((params["w"] - frozen["target"]) ** 2)
        return Loss(Mean(x, jnp.ones(())), {})

    tx = optax.sgd(0.5)
    state = new_state({"w": jnp.zeros(3)}, tx)
    state, _ = make_step(loss, tx)(state, {"target": jnp.arange(3.0)}, {"x": jnp.zeros(2)})
    np.testing.assert_array_equal(state.params["w"], [0.0, 1.0, 2.0])


@functools.cache
def full(toy, *, optim="adamw", accumulate=2, mesh="data=2,fsdp=2,tensor=2"):
    config = TrainingConfig(
        optim=optim, learning_rate=1e-2, weight_decay=0.1, gradient_accumulation_steps=accumulate
    )
    return toy.setup(config, mesh=mesh)


@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_dtypes_and_shardings_after_the_step_are_those_before(toy, optim):
    run = full(toy, optim=optim)
    before = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), run.state)
    state = fresh(run)
    for i in range(2):
        state, _ = run.step(state, {}, put_batch(run.mesh, toy.batch(i)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), state) == before
    assert run.step._cache_size() == 1
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))


def test_moments_live_where_their_parameters_live(toy):
    run = full(toy)
    state, _ = run.step(fresh(run), {}, put_batch(run.mesh, toy.batch()))
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
        same = jax.tree.map(lambda m, p: m.sharding == p.sharding, moment, state.params)
        assert all(jax.tree.leaves(same))
    cut = state.params["layers"]["up"]["kernel"].addressable_shards[0].data
    assert cut.size * 4 == state.params["layers"]["up"]["kernel"].size


def test_the_given_state_is_donated_but_the_callers_parameters_survive(toy):
    first, tx = toy.params(), optax.adamw(1e-3)
    state = new_state(first, tx)
    kept = bits(first)
    make_step(toy.loss, tx)(state, {}, jax.tree.map(jnp.asarray, toy.batch()))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert bits(first) == kept


def fresh(run):
    """A copy of the first state, to be donated."""
    return jax.tree.map(jnp.copy, run.state)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_an_update_that_is_not_finite_changes_no_bit(toy, poison, accumulate):
    run = full(toy, accumulate=accumulate, mesh="data=1")
    state, _ = run.step(fresh(run), {}, put_batch(run.mesh, toy.batch()))
    held = bits((state.params, state.opt_state))
    bad = toy.batch(1)
    bad["y"][3, 0] = poison
    state, metrics = run.step(state, {}, put_batch(run.mesh, bad))
    assert bits((state.params, state.opt_state)) == held
    assert (int(state.step), int(state.skipped)) == (2, 1)
    assert float(metrics["skipped_steps"]) == 1
    rate = float(metrics["learning_rate"])
    state, metrics = run.step(state, {}, put_batch(run.mesh, toy.batch(2)))
    assert bits(state.params) != held[: len(jax.tree.leaves(state.params))]
    assert (int(state.step), int(state.skipped)) == (3, 1)
    # The schedule waits with the optimizer's own counter.
    assert float(metrics["learning_rate"]) == rate


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_a_trained_token_changes_nothing(toy, accumulate):
    run = full(toy, accumulate=accumulate, mesh="data=1")
    held = bits((run.state.params, run.state.opt_state))
    empty = {**toy.batch(), "mask": np.zeros((16, toy.LENGTH), np.float32)}
    state, metrics = run.step(fresh(run), {}, put_batch(run.mesh, empty))
    assert bits((state.params, state.opt_state)) == held
    assert float(metrics["loss"]) == 0.0
    assert float(metrics["grad_norm"]) == 0.0
    assert int(state.skipped) == 1


def test_an_empty_micro_batch_among_full_ones_is_harmless(toy):
    batch = toy.batch()
    batch["mask"][1::4] = 0
    assert_close(descend(toy, batch=batch, accumulate=4)[0], descend(toy, batch=batch)[0])


def test_a_batch_that_does_not_divide_is_refused_by_name(toy):
    run = full(toy, accumulate=3, mesh="data=2,fsdp=4")
    with pytest.raises(MeshError, match=r"16 rows .* × 3 micro-batches = 24"):
        run.step(run.state, {}, put_batch(run.mesh, toy.batch()))


def test_parameters_become_float32_masters():
    tx = optax.adamw(1e-3)
    state = new_state({"w": jnp.ones(3, jnp.bfloat16)}, tx)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state[0].mu))} == {
        jnp.dtype("float32")
    }


def test_a_state_can_be_born_from_a_function(toy):
    mesh = make_mesh("fsdp=8")
    tx, _ = make_optimizer(TrainingConfig(), 5)
    shapes = jax.eval_shape(toy.params)
    shardings = state_shardings(tx, shapes, axes_shardings(toy.AXES, shapes, mesh))
    state = new_state(toy.params, tx, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    np.testing.assert_allclose(state.params["head"]["kernel"], toy.params()["head"]["kernel"])


@pytest.mark.parametrize("sizes", [(4, 12), (8, 8)])
def test_evaluation_is_one_mean_over_all_batches(toy, reference, sizes):
    batch, start, parts = toy.batch(), 0, []
    for size in sizes:
        parts.append({k: v[start : start + size] for k, v in batch.items()})
        start += size
    out = make_evaluation(toy.loss)(toy.params(), {}, parts)
    np.testing.assert_allclose(out["loss"], reference[0], rtol=1e-6)
    assert out["error/max"] == make_evaluation(toy.loss)(toy.params(), {}, [batch])["error/max"]
    assert make_evaluation(toy.loss)(toy.params(), {}, []) == {}
