from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.surrogates import (
    clipped_high,
    clipped_low,
    clipped_policy_loss,
    clipped_value_loss,
    sequence_log_ratio,
)

# ratio, advantage, does the gradient move? With low = high = 0.2.
PLAIN = [
    (0.5, 1.0, True),  # good and too rare: raise it
    (1.0, 1.0, True),
    (1.5, 1.0, False),  # good and already much likelier
    (0.5, -1.0, False),  # bad and already much rarer
    (1.0, -1.0, True),
    (1.5, -1.0, True),  # bad and too likely: lower it
]
# With delta = 2 on top: a bad token beyond it stops counting; good ones are as before.
DUAL = [*PLAIN, (2.5, -1.0, False), (2.5, 1.0, False), (1.9, -1.0, True)]


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves", "delta"),
    [(*row, None) for row in PLAIN] + [(*row, 2.0) for row in DUAL],
)
def test_truth_table_of_the_clip(ratio, advantage, moves, delta):
    def loss(log_ratio):
        a = jnp.full((1, 1), advantage)
        return clipped_policy_loss(jnp.exp(log_ratio), a, low=0.2, high=0.2, delta=delta).sum()

    gradient = float(jax.grad(loss)(jnp.full((1, 1), np.log(ratio), jnp.float32))[0, 0])
    # Where it moves, it is -A·ρ: minimising raises good tokens and lowers bad ones.
    np.testing.assert_allclose(gradient, -advantage * ratio if moves else 0.0, rtol=1e-5)


@pytest.mark.parametrize("delta", [None, 2.0])
def test_the_loss_is_the_paper_formula(rng, delta):
    ratio = np.exp(rng.normal(size=(8, 9)))
    advantages = rng.normal(size=(8, 9))
    found = clipped_policy_loss(
        jnp.array(ratio, jnp.float32),
        jnp.array(advantages, jnp.float32),
        low=0.1,
        high=0.3,
        delta=delta,
    )
    for r, a, loss in zip(ratio.flat, advantages.flat, np.asarray(found).flat, strict=True):
        free = min(r, delta) if delta else r
        expected = -min(free * a, min(max(r, 0.9), 1.3) * a)
        np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)


def test_the_surrogate_never_promises_more_than_the_unclipped_one(rng):
    ratio = jnp.array(np.exp(rng.normal(size=(8, 9))), jnp.float32)
    advantages = jnp.array(rng.normal(size=(8, 9)), jnp.float32)
    loss = clipped_policy_loss(ratio, advantages, low=0.2, high=0.2)
    assert (loss >= -ratio * advantages).all()


def test_clip_flags_name_exactly_the_tokens_without_gradient(rng):
    log_ratio = jnp.array(rng.normal(size=(8, 9)) * 0.5, jnp.float32)
    advantages = jnp.array(rng.normal(size=(8, 9)), jnp.float32)

    def loss(x):
        return clipped_policy_loss(jnp.exp(x), advantages, low=0.1, high=0.3).sum()

    still = np.asarray(jax.grad(loss)(log_ratio)) == 0
    ratio = jnp.exp(log_ratio)
    low = np.asarray(clipped_low(ratio, advantages, low=0.1))
    high = np.asarray(clipped_high(ratio, advantages, high=0.3))
    np.testing.assert_array_equal(still, low | high)
    assert not (low & high).any()
    assert low.any()
    assert high.any()


def test_the_sequence_ratio_is_the_geometric_mean_over_kept_tokens():
    log_ratio = jnp.array([[1.0, 2.0, 9.0], [5.0, 5.0, 5.0]])
    mask = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(sequence_log_ratio(log_ratio, mask), [[1.5], [0.0]])


def value_oracle(v, old, r, c):
    near = min(max(v, old - c), old + c)
    return 0.5 * max((v - r) ** 2, (near - r) ** 2)


def test_the_value_loss_is_the_formula(rng):
    v, old, r = rng.normal(size=(3, 5, 6))
    arrays = (jnp.array(x, jnp.float32) for x in (v, old, r))
    loss, clipped = clipped_value_loss(*arrays, cliprange=0.2)
    expected = np.vectorize(value_oracle)(v, old, r, 0.2)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(clipped, expected > 0.5 * (v - r) ** 2 + 1e-9)


# value, old value, return, moves? With cliprange 0.2.
VALUES = [
    (0.1, 0.0, 1.0, True),  # inside the trust region: towards the return
    (0.5, 0.0, 1.0, False),  # moved towards the return far enough: the clipped error is larger
    (-0.5, 0.0, 1.0, True),  # moved away from it: come back
    (0.5, 0.0, -1.0, True),
]


@pytest.mark.parametrize(("value", "old", "target", "moves"), VALUES)
def test_truth_table_of_the_value_clip(value, old, target, moves):
    def loss(v):
        return clipped_value_loss(v, one * old, one * target, cliprange=0.2)[0].sum()

    one = jnp.ones((1, 1))
    gradient = float(jax.grad(loss)(one * value)[0, 0])
    np.testing.assert_allclose(gradient, value - target if moves else 0.0, rtol=1e-6)
