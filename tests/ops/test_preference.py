from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.preference import PAIR_LOSSES, bradley_terry, robust

MARGINS = np.array([-200.0, -3.0, -0.1, 0.0, 0.1, 3.0, 200.0])


def test_bradley_terry_is_the_log_likelihood_at_any_margin():
    expected = np.logaddexp(0.0, -MARGINS)
    np.testing.assert_allclose(
        bradley_terry(jnp.array(MARGINS, jnp.float32)), expected, rtol=1e-6, atol=1e-37
    )


def test_at_margin_zero_the_loss_is_log_two_and_its_slope_minus_a_half():
    value, slope = jax.value_and_grad(lambda m: bradley_terry(m).sum())(jnp.zeros(1))
    np.testing.assert_allclose(value, np.log(2.0), rtol=1e-7)
    np.testing.assert_allclose(slope, -0.5)


def test_the_two_outcomes_of_a_pair_have_probabilities_that_sum_to_one():
    m = jnp.array([-3.0, 0.0, 1.7])
    np.testing.assert_allclose(
        jnp.exp(-bradley_terry(m)) + jnp.exp(-bradley_terry(-m)), 1.0, rtol=1e-6
    )


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_gradients_are_finite_at_absurd_margins(name):
    def loss(m):
        return PAIR_LOSSES[name](m, label_smoothing=0.1 if name == "robust" else 0.0).sum()

    assert np.isfinite(jax.grad(loss)(jnp.array(MARGINS, jnp.float32))).all()


def test_robust_undoes_the_flipping_of_labels_in_expectation():
    """E over flips with rate ε of the robust loss is the clean loss (the paper's Lemma 3.1)."""
    m, rate = jnp.array([-1.0, 0.3, 2.0]), 0.2
    seen = (1 - rate) * robust(m, label_smoothing=rate) + rate * robust(-m, label_smoothing=rate)
    np.testing.assert_allclose(seen, bradley_terry(m), rtol=1e-5)


def test_robust_without_flips_is_the_plain_loss():
    m = jnp.array([-1.0, 0.3, 2.0])
    np.testing.assert_array_equal(robust(m, label_smoothing=0.0), bradley_terry(m))
