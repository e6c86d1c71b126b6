"""Adam's moments in place: optax's numbers, kept where an update is left out, and no copies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.train.adam import Moments, choose, scale_by_adam

RATES = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}


def drawn(seed: int) -> dict[str, jax.Array]:
    draw = np.random.default_rng(seed)
    return {name: jnp.asarray(draw.normal(size=shape), jnp.float32)
            for name, shape in {"a": (4, 5), "b": (7,)}.items()}  # fmt: skip


def test_updates_and_moments_are_optaxs_to_the_bit() -> None:
    ours, theirs = scale_by_adam(**RATES), optax.scale_by_adam(**RATES)
    state, wanted = ours.init(drawn(0)), theirs.init(drawn(0))
    for seed in range(1, 6):
        found, state = ours.update(drawn(seed), state)
        right, wanted = theirs.update(drawn(seed), wanted)
        jax.tree.map(np.testing.assert_array_equal, found, right)
        jax.tree.map(np.testing.assert_array_equal, tuple(state), tuple(wanted))
    assert state._fields == wanted._fields  # the names that stand in checkpoints


def test_moments_stay_the_same_bits_where_the_gradient_is_not_good() -> None:
    tx = scale_by_adam(**RATES)
    _, before = tx.update(drawn(1), tx.init(drawn(0)))
    mu = jax.tree.map(lambda x: x.at[0].set(-0.0), before.mu)
    before = before._replace(mu=mu)
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan).at[-1].set(jnp.inf), drawn(2))
    _, after = jax.jit(tx.update)(broken, before, good=jnp.zeros((), bool))
    assert isinstance(after, Moments)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))
    _, moved = jax.jit(tx.update)(drawn(2), before, good=jnp.ones((), bool))
    assert int(moved.count) == 2
    assert not np.array_equal(moved.mu["a"], before.mu["a"])


def test_moments_have_chosen_and_everything_else_is_chosen() -> None:
    new, old = Moments(jnp.ones(()), {}, {}), Moments(jnp.zeros(()), {}, {})
    kept = choose(jnp.zeros((), bool), (new, {"x": jnp.ones(2)}), (old, {"x": jnp.zeros(2)}))
    assert kept[0] is new
    np.testing.assert_array_equal(kept[1]["x"], np.zeros(2))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the CPU's backend")
def test_no_moment_is_copied() -> None:
    def room(adam: Any) -> int:
        tx = optax.with_extra_args_support(optax.chain(adam, optax.scale(-1e-3)))

        def step(params: Any, state: Any, gradient: Any, good: Any) -> Any:
            updates, moved = tx.update(gradient, state, params, good=good)
            new = choose(good, optax.apply_updates(params, updates), params)
            return new, choose(good, moved, state)

        weight = jnp.ones((512, 512))
        made = jax.jit(step, donate_argnums=(0, 1))
        arguments = (weight, tx.init(weight), weight, jnp.ones((), bool))
        memory: Any = made.lower(*arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes

    one = 4 * 512**2
    assert room(scale_by_adam(**RATES)) < one // 4
    assert room(optax.scale_by_adam(**RATES)) >= one  # or ours is needed no more
