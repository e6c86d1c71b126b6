"""Estimates of KL(π ‖ ref) per token, from log-probs of tokens drawn from π.

References:
    Schulman, "Approximating KL Divergence", 2020 (k1, k2, k3).
    Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def kl_k1(logps: Float[Array, "*n"], ref_logps: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log π(y) - log ref(y): unbiased, of high variance, of either sign.

    Its gradient in π has expectation zero under π: for use inside a reward, never as a loss term.
    """
    return logps - ref_logps


def kl_k2(logps: Float[Array, "*n"], ref_logps: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """½ (log π(y) - log ref(y))²: biased, never negative; its gradient in π is that of the KL."""
    return 0.5 * jnp.square(logps - ref_logps)


def kl_k3(logps: Float[Array, "*n"], ref_logps: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Estimates the KL divergence per token with the low-variance "k3" estimator.

    k3 = exp(r) - 1 - r, with r = log ref(y) - log π(y). Unbiased for tokens drawn from π.

    Args:
        logps: log π of the sampled tokens, in nats.
        ref_logps: log ref of the same tokens, in nats.

    Returns:
        The estimate per token, in nats, never negative.
    """
    log_ratio = ref_logps - logps
    # expm1, because exp(r) - 1 loses all digits of the r²/2 that remains when r is small.
    return jnp.expm1(log_ratio) - log_ratio


def kl_abs(logps: Float[Array, "*n"], ref_logps: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """|log π(y) - log ref(y)|, the `kl_penalty="abs"` of early TRL."""
    return jnp.abs(logps - ref_logps)


# Of sampled tokens. "mse" is early TRL's name for k2.
ESTIMATORS: dict[str, Callable[..., Array]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "abs": kl_abs,
    "mse": kl_k2,
}
