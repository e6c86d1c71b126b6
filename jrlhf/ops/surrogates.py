"""Clipped surrogates of policy-gradient methods, per token, as losses to minimise."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sequence_log_ratio(
    log_ratio: Float[Array, "b n"], mask: Float[Array, "b n"]
) -> Float[Array, "b 1"]:
    """The mean of log π/π_old over the row's tokens: the log of GSPO's length-normalised ratio.

    References:
        Zheng et al., "Group Sequence Policy Optimization", 2025, eq. 7.
    """
    tokens = jnp.sum(mask, axis=1, keepdims=True)
    return jnp.sum(log_ratio * mask, axis=1, keepdims=True) / jnp.maximum(tokens, 1.0)


def clipped_policy_loss(
    ratio: Float[Array, "b m"],
    advantages: Float[Array, "b n"],
    *,
    low: float,
    high: float,
    delta: float | None = None,
) -> Float[Array, "b n"]:
    """-min(min(ρ, δ)·A, clip(ρ, 1 - low, 1 + high)·A), the minimum for either sign of A.

    The gradient vanishes exactly where moving further would be "too much of a good thing":

        A > 0: no gradient for ρ > 1 + high.
        A < 0: no gradient for ρ < 1 - low; and with `delta`, none for ρ > δ (dual clip: a bad token
               that became likely would else weigh without bound).

    Args:
        ratio: ρ = π / π_old, per token, or per row as [b 1].
        advantages: A.
        low: how far below 1 the ratio may move.
        high: how far above 1.
        delta: upper bound of the ratio where A < 0; above 1 + high; None for no bound.

    Returns:
        The loss per token.

    References:
        Schulman et al., "Proximal Policy Optimization Algorithms", 2017, eq. 7. Yu et al., "DAPO",
        2025 (high ≠ low). Prime Intellect, "INTELLECT-2", 2025, §4 (delta).
    """
    bounded = ratio if delta is None else jnp.minimum(ratio, delta)
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    return -jnp.minimum(bounded * advantages, clipped * advantages)


def clipped_low(
    ratio: Float[Array, "b m"], advantages: Float[Array, "b n"], *, low: float
) -> Bool[Array, "b n"]:
    """Where the lower clip removes the gradient: ρ < 1 - low and A < 0."""
    return (ratio < 1.0 - low) & (advantages < 0)


def clipped_high(
    ratio: Float[Array, "b m"], advantages: Float[Array, "b n"], *, high: float
) -> Bool[Array, "b n"]:
    """Where the upper clip removes the gradient: ρ > 1 + high and A > 0."""
    return (ratio > 1.0 + high) & (advantages > 0)


def clipped_value_loss(
    values: Float[Array, "b n"],
    old_values: Float[Array, "b n"],
    returns: Float[Array, "b n"],
    *,
    cliprange: float,
) -> tuple[Float[Array, "b n"], Bool[Array, "b n"]]:
    """½ max((V - R)², (clip(V, V_old ± c) - R)²), and where the clipped term is the larger one.

    Args:
        values: V, the estimates being trained.
        old_values: the estimates when the rollout was made.
        returns: R, the targets.
        cliprange: c, in units of the value.

    Returns:
        The loss per token, and True where the clipped estimate decided it (no gradient there).

    References:
        Huang et al., "The N+ Implementation Details of RLHF with PPO", 2024, detail 16.
    """
    near = old_values + jnp.clip(values - old_values, -cliprange, cliprange)
    free, clipped = jnp.square(values - returns), jnp.square(near - returns)
    return 0.5 * jnp.maximum(free, clipped), clipped > free
