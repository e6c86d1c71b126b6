"""Sums, moments and whitening over the tokens that a mask keeps.

A mask is float32, 1 where a token counts and 0 elsewhere; weights in between are allowed. What lies
under a zero never matters, not even NaN.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jrlhf.types import Mean

Axis = int | tuple[int, ...] | None


def masked_sum(
    x: Float[Array, "*n"], mask: Float[Array, "*n"], *, axis: Axis = None
) -> Float[Array, " ..."]:
    """Σ x·mask, where nothing under a zero of the mask counts, whatever it is."""
    return jnp.sum(jnp.where(mask == 0, 0.0, x) * mask, axis=axis)


def masked_mean_total(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Mean:
    """The mean of `x` over the mask, not yet divided (contract 1)."""
    return Mean(masked_sum(x, mask), jnp.sum(mask))


def masked_moments(
    x: Float[Array, "*n"], mask: Float[Array, "*n"], *, axis: Axis = None, ddof: int = 0
) -> tuple[Float[Array, " ..."], Float[Array, " ..."]]:
    """Mean and variance over the mask, both with kept dimensions.

    The variance is taken in a second pass over x - mean: E[x²] - E[x]² cancels in float32.

    Args:
        x: the numbers.
        mask: 1 where a number counts.
        axis: axes to reduce over; None for all.
        ddof: 0 for the population variance, 1 for the unbiased one.

    Returns:
        The mean and the variance; both 0 where nothing counts, and the variance 0 where no more
        than `ddof` numbers count.
    """
    count = jnp.sum(mask, axis=axis, keepdims=True)
    x = jnp.where(mask == 0, 0.0, x)
    mean = jnp.sum(x * mask, axis=axis, keepdims=True) / jnp.maximum(count, 1.0)
    squares = jnp.sum(jnp.square(x - mean) * mask, axis=axis, keepdims=True)
    variance = jnp.where(count > ddof, squares / jnp.maximum(count - ddof, 1.0), 0.0)
    return mean, variance


def whiten(
    x: Float[Array, "*n"],
    mask: Float[Array, "*n"],
    *,
    shift_mean: bool = True,
    axis: Axis = None,
    ddof: int = 0,
    epsilon: float = 1e-8,
) -> Float[Array, "*n"]:
    """Scales `x` to unit variance over the mask: (x - μ) / √(σ² + ε), plus μ unless `shift_mean`.

    The statistics are global: over everything that the mask keeps in the array, so it must see the
    whole rollout and not a micro-batch of it.

    Args:
        x: the numbers.
        mask: 1 where a number counts.
        shift_mean: True centres at 0; False keeps the mean, as PPO does with rewards, whose sign
            and scale of the mean carry meaning.
        axis: axes to take the statistics over; None for all.
        ddof: 0 for the population variance; 1 for the unbiased one that TRL's PPO uses.
        epsilon: added to the variance.

    Returns:
        The whitened numbers, exact zeros under the mask.
    """
    mean, variance = masked_moments(x, mask, axis=axis, ddof=ddof)
    centred = (jnp.where(mask == 0, 0.0, x) - mean) / jnp.sqrt(variance + epsilon)
    return jnp.where(mask == 0, 0.0, centred if shift_mean else centred + mean)
