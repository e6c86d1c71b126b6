from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.kl import ESTIMATORS, kl_k1, kl_k2, kl_k3


def distributions(rng, v=6):
    p, q = rng.normal(size=(2, v))
    log_p, log_q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
    return log_p, log_q


ORACLES = {
    "k1": lambda p, q: p - q,
    "k2": lambda p, q: (p - q) ** 2 / 2,
    "k3": lambda p, q: np.exp(q - p) - 1 - (q - p),
    "abs": lambda p, q: np.abs(p - q),
    "mse": lambda p, q: (p - q) ** 2 / 2,
}


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_estimators_are_their_formulas(rng, name):
    p, q = rng.normal(size=(2, 3, 5))
    found = ESTIMATORS[name](jnp.array(p, jnp.float32), jnp.array(q, jnp.float32))
    np.testing.assert_allclose(found, ORACLES[name](p, q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimate_of_a_policy_against_itself_is_exactly_zero(rng, name):
    p = jnp.array(rng.normal(size=(3, 5)), jnp.float32)
    np.testing.assert_array_equal(ESTIMATORS[name](p, p), 0.0)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(rng, estimator):
    log_p, log_q = distributions(rng)
    exact = np.sum(np.exp(log_p) * (log_p - log_q))
    per_token = estimator(jnp.array(log_p, jnp.float32), jnp.array(log_q, jnp.float32))
    np.testing.assert_allclose(np.sum(np.exp(log_p) * np.asarray(per_token)), exact, rtol=1e-5)


def test_k3_is_never_negative_and_keeps_its_digits_near_zero():
    r = jnp.array([-3.0, -1e-3, -1e-5, 1e-5, 1e-3, 3.0])
    k3 = kl_k3(jnp.zeros(6), r)
    assert (k3 >= 0).all()
    np.testing.assert_allclose(k3[4], 1e-6 / 2 + 1e-9 / 6, rtol=1e-3)


def test_gradients_in_the_policy(rng):
    """∂k1 = 1 (useless as a loss), ∂k2 = log π/ref, ∂k3 = 1 - ref/π."""
    p, q = (jnp.array(x, jnp.float32) for x in rng.normal(size=(2, 7)))
    for estimator, expected in (
        (kl_k1, jnp.ones(7)),
        (kl_k2, p - q),
        (kl_k3, 1 - jnp.exp(q - p)),
    ):
        found = jax.grad(lambda x, f=estimator: f(x, q).sum())(p)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
