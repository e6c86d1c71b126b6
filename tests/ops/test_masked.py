from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.masked import masked_mean_total, masked_moments, masked_sum, whiten


def numbers(rng, shape=(4, 7)):
    x = rng.normal(3.0, 2.0, shape).astype(np.float32)
    mask = (rng.random(shape) < 0.6).astype(np.float32)
    mask[0] = 0
    return x, mask


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_masked_sum_is_the_sum_of_what_the_mask_keeps(rng, axis):
    x, mask = numbers(rng)
    expected = np.where(mask > 0, x, 0).astype(np.float64).sum(axis=axis)
    np.testing.assert_allclose(masked_sum(jnp.array(x), jnp.array(mask), axis=axis), expected, 1e-6)


def test_weights_between_zero_and_one_count_as_such():
    mean = masked_mean_total(jnp.array([2.0, 4.0]), jnp.array([0.5, 0.25]))
    assert (float(mean.total), float(mean.weight)) == (2.0, 0.75)


@pytest.mark.parametrize("junk", [np.nan, -np.inf])
def test_nothing_under_the_mask_matters_forwards_or_backwards(rng, junk):
    x, mask = numbers(rng)
    dirty = jnp.array(np.where(mask > 0, x, junk).astype(np.float32))
    x, mask = jnp.array(x), jnp.array(mask)
    for f in (masked_sum, lambda a, m: whiten(a, m), lambda a, m: masked_moments(a, m)[1]):
        run = jax.jit(jax.value_and_grad(lambda a, f=f: jnp.sum(f(a, mask) ** 2)))
        clean, soiled = run(x)[0], run(dirty)[0]
        np.testing.assert_array_equal(clean, soiled)
        _, gradient = run(dirty)
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[np.asarray(mask) == 0] == 0).all()


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_numpys_in_float64_also_far_from_zero(rng, ddof, offset):
    x, mask = numbers(rng)
    x = (x + np.float32(offset)).astype(np.float32)
    kept = x[mask > 0].astype(np.float64)
    mean, variance = masked_moments(jnp.array(x), jnp.array(mask), ddof=ddof)
    assert mean.shape == variance.shape == (1, 1)
    np.testing.assert_allclose(mean[0, 0], kept.mean(), rtol=1e-6)
    np.testing.assert_allclose(variance[0, 0], kept.var(ddof=ddof), rtol=1e-3 if offset else 1e-5)


def test_moments_of_nothing_and_of_one_number_are_finite():
    x = jnp.array([5.0, 7.0])
    assert [float(m[0]) for m in masked_moments(x, jnp.zeros(2))] == [0.0, 0.0]
    assert [float(m[0]) for m in masked_moments(x, jnp.array([1.0, 0.0]), ddof=1)] == [5.0, 0.0]


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened_numbers_have_mean_zero_and_variance_one_over_the_mask(rng, ddof):
    x, mask = numbers(rng)
    y = np.asarray(whiten(jnp.array(x), jnp.array(mask), ddof=ddof), np.float64)
    np.testing.assert_allclose(y[mask > 0].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(y[mask > 0].var(ddof=ddof), 1.0, rtol=1e-5)
    assert (y[mask == 0] == 0).all()


def test_whitening_without_a_shift_keeps_the_mean_and_sets_the_variance(rng):
    x, mask = numbers(rng)
    y = np.asarray(whiten(jnp.array(x), jnp.array(mask), shift_mean=False), np.float64)
    np.testing.assert_allclose(y[mask > 0].mean(), x[mask > 0].mean(), rtol=1e-6)
    np.testing.assert_allclose(y[mask > 0].var(), 1.0, rtol=1e-5)
    assert (y[mask == 0] == 0).all()


def test_whitening_equal_numbers_gives_zeros():
    y = whiten(jnp.full((2, 3), 0.1), jnp.ones((2, 3)))
    np.testing.assert_allclose(y, 0.0, atol=1e-3)  # 0.1's rounding error over √1e-8
