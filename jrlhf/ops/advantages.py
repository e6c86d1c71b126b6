"""From rewards to advantages: GAE, group-relative advantages, the adaptive KL coefficient.

All of it runs on whole rollouts, outside of any gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# TRL's, in (r - mean) / (std + ε).
GROUP_EPSILON = 1e-4


def gae(
    rewards: Float[Array, "b n"],
    values: Float[Array, "b n"],
    mask: Float[Array, "b n"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    """Generalised advantage estimation along the tokens that the mask keeps.

    δₜ = rₜ + γ Vₜ₊₁ - Vₜ,  Aₜ = δₜ + γ λ Aₜ₊₁,  returnsₜ = Aₜ + Vₜ, where t + 1 is the next *kept*
    token: padding, and tokens in the middle that the policy did not write, are stepped over as if
    they were not there. After the last kept token the episode is over (V = A = 0).

    Args:
        rewards: reward of each token; what lies under the mask is ignored.
        values: value of the state from which each token is emitted.
        mask: 1 for tokens of the policy.
        gamma: discount per token, in [0, 1].
        lam: λ in [0, 1]; 0 is the one-step TD error, 1 the Monte-Carlo advantage.

    Returns:
        Advantages and returns, exact zeros under the mask.

    References:
        Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
        Estimation", 2016, eq. 16.
    """

    def step(
        later: tuple[Array, Array], token: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = later
        reward, value, kept = token
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        later = (jnp.where(kept, value, next_value), jnp.where(kept, advantage, next_advantage))
        return later, jnp.where(kept, advantage, 0.0)

    kept = mask > 0
    over = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(step, (over, over), (rewards.T, values.T, kept.T), reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(kept, advantages + values, 0.0)


def group_moments(
    rewards: Float[Array, " b"], *, group: int
) -> tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
    """Deviation from the group's mean, its mean and its standard deviation (ddof 1), for every row.

    Rows of a group are neighbours. A NaN reward (no reward function had an opinion) takes no part;
    its deviation is 0. Deviations are measured from the group's smallest reward, so that equal
    rewards give exactly 0 and a large common offset costs no digits.
    """
    grouped = rewards.reshape(-1, group)
    scored = ~jnp.isnan(grouped)
    count = jnp.sum(scored, axis=1, keepdims=True).astype(rewards.dtype)
    lowest = jnp.min(jnp.where(scored, grouped, jnp.inf), axis=1, keepdims=True)
    lowest = jnp.where(count > 0, lowest, 0.0)
    above = jnp.where(scored, grouped - lowest, 0.0)
    mean = jnp.sum(above, axis=1, keepdims=True) / jnp.maximum(count, 1.0)
    deviation = jnp.where(scored, above - mean, 0.0)
    squares = jnp.sum(jnp.square(deviation), axis=1, keepdims=True)
    std = jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0))
    spread = jnp.broadcast_to(std, grouped.shape)
    centre = jnp.broadcast_to(mean + lowest, grouped.shape)
    return deviation.reshape(-1), centre.reshape(-1), spread.reshape(-1)


def batch_std(rewards: Float[Array, " b"]) -> Float[Array, ""]:
    """Standard deviation (ddof 1) of all rewards that are not NaN; 0 for fewer than two."""
    return group_moments(rewards, group=rewards.shape[0])[2][0]


def group_advantages(
    rewards: Float[Array, " b"], *, group: int, scale: str = "group"
) -> Float[Array, " b"]:
    """GRPO's advantages: (r - mean of the group) / (std + 1e-4).

    Args:
        rewards: one per completion; rows of a group are neighbours; NaN: not scored.
        group: completions per prompt.
        scale: divide by the std of the "group" or of the whole "batch", or "none" (Dr. GRPO).

    Returns:
        One advantage per completion: exactly 0 for unscored rows and in groups of equal rewards.

    References:
        Shao et al., "DeepSeekMath", 2024, §4.1.2. Liu et al., "Understanding R1-Zero-Like
        Training", 2025 ("none"). Both with ddof 1 and ε = 1e-4, as TRL.
    """
    deviation, _, std = group_moments(rewards, group=group)
    if scale == "none":
        return deviation
    spread = {"group": std, "batch": jnp.full_like(std, batch_std(rewards))}[scale]
    return deviation / (spread + GROUP_EPSILON)


def adaptive_kl(
    coefficient: Float[Array, ""] | float,
    kl: Float[Array, ""] | float,
    *,
    target: float,
    horizon: float,
    episodes: float,
) -> Float[Array, ""] | float:
    """The next KL coefficient: β · (1 + clip(KL / target - 1, ±0.2) · episodes / horizon).

    Args:
        coefficient: β used for the rollout just seen.
        kl: its KL per episode, in nats.
        target: the KL per episode to settle at.
        horizon: episodes over which the coefficient may change by 20 %.
        episodes: episodes in the rollout.

    Returns:
        The coefficient for the next rollout.

    References:
        Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, §2.2.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return coefficient * (1.0 + error * episodes / horizon)
