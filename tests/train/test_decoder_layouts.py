"""Contracts 1 and 5 with a real decoder: layouts never matter, and nothing compiles twice."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jrlhf.algos.sft import SFT
from jrlhf.models.build import Net, combine, partition
from jrlhf.models.spec import DecoderSpec
from jrlhf.rollout.score import outputs
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.place import params_shardings, put_batch
from jrlhf.train.metrics import compiles
from jrlhf.train.state import new_state, state_shardings
from jrlhf.train.step import make_step

# Odd sizes on purpose: 3 kv heads do not divide over tensor=2, the vocabulary not over fsdp=4.
SPEC = DecoderSpec(
    vocab_size=38,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=4,
    attention_bias=True,
    tie_word_embeddings=True,
)


def batch(seed=0, rows=16, length=12):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, length + 1, rows).astype(np.int32)
    places = np.arange(length)
    return {
        "ids": draw.integers(0, SPEC.vocab_size, (rows, length)).astype(np.int32),
        "lengths": lengths,
        "mask": ((places < lengths[:, None]) & (places > 0)).astype(np.float32),
    }


@functools.cache
def machine(toy, mesh, accumulate=1, trunk=0):
    net = Net(SPEC.replace(trunk_layers=trunk))
    mesh = make_mesh(mesh, devices=jax.devices()[:1] if mesh == "data=1" else None)
    params = jax.jit(Net(SPEC).init)(jax.random.key(0))
    if trunk:  # the same weights, cut in two stacks
        params["trunk"] = jax.tree.map(lambda x: x[:trunk], params["layers"])
        params["layers"] = jax.tree.map(lambda x: x[trunk:], params["layers"])
    params = jax.device_put(params, params_shardings(net, params, mesh))
    trainable, frozen = partition(params, net)
    tx = toy.recorder()
    shardings = state_shardings(tx, trainable, params_shardings(net, trainable, mesh))

    def loss(trainable, frozen, batch):
        return SFT().loss(outputs(net, combine(trainable, frozen), batch), batch)

    step = make_step(loss, tx, mesh=mesh, shardings=shardings, accumulate=accumulate)
    return mesh, step, new_state(trainable, tx, shardings=shardings), frozen


def gradient(toy, *place, **options):
    mesh, step, state, frozen = machine(toy, *place, **options)
    state = jax.tree.map(lambda x: x.copy(), state)
    state, metrics = step(state, frozen, put_batch(mesh, batch()))
    return jax.device_get(state.opt_state), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize(
    ("mesh", "accumulate"), [("data=2,fsdp=4", 1), ("data=2,fsdp=2,tensor=2", 2)]
)
def test_gradients_on_eight_devices_are_those_on_one(toy, mesh, accumulate):
    one, alone = gradient(toy, "data=1")
    many, together = gradient(toy, mesh, accumulate)
    for path, wanted in jax.tree_util.tree_leaves_with_path(one):
        got = functools.reduce(lambda tree, key: tree[key.key], path, many)
        assert np.max(np.abs(got - wanted)) <= 1e-5 * np.max(np.abs(wanted)), path
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=1e-5, err_msg=name)


def test_frozen_layers_get_no_gradient_and_change_no_other(toy):
    whole, _ = gradient(toy, "data=1")
    upper, _ = gradient(toy, "data=1", trunk=1)
    assert set(upper) == set(whole) - {"embed"}
    for path, got in jax.tree_util.tree_leaves_with_path(upper["layers"]):
        wanted = functools.reduce(lambda tree, key: tree[key.key], path, whole["layers"])[1:]
        assert np.max(np.abs(got - wanted)) <= 1e-5 * np.max(np.abs(wanted)), path


def test_the_second_step_compiles_nothing_and_moves_nothing(toy):
    mesh, step, state, frozen = machine(toy, "data=2,fsdp=4")
    state = jax.tree.map(lambda x: x.copy(), state)
    places = jax.tree.map(lambda x: (x.sharding, x.dtype), state)
    batches = [put_batch(mesh, batch(seed)) for seed in range(4)]
    for one in batches[:2]:
        state, _ = step(state, frozen, one)
    before = compiles()
    with jax.transfer_guard("disallow"):
        for one in batches[2:]:
            state, _ = step(state, frozen, one)
    assert compiles() == before
    assert jax.tree.map(lambda x: (x.sharding, x.dtype), state) == places
