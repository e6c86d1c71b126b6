"""Losses of preference pairs as functions of one margin per pair."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float


def bradley_terry(margin: Float[Array, " b"]) -> Float[Array, " b"]:
    """-log σ(margin): the negative log-likelihood that the chosen side wins.

    Args:
        margin: score(chosen) - score(rejected), less any margin demanded.

    Returns:
        The loss per pair: log 2 at margin 0, its gradient there -½.

    References:
        Bradley and Terry, 1952. Ouyang et al., "InstructGPT", 2022, eq. 1.
    """
    return -jax.nn.log_sigmoid(margin)


def sigmoid(margin: Float[Array, " b"], *, label_smoothing: float = 0.0) -> Float[Array, " b"]:
    """DPO's own loss, -log σ(βΔ). Knows no label smoothing (as in TRL 1.16): use `robust`.

    References:
        Rafailov et al., "Direct Preference Optimization", 2023, eq. 7.
    """
    del label_smoothing
    return bradley_terry(margin)


def robust(margin: Float[Array, " b"], *, label_smoothing: float) -> Float[Array, " b"]:
    """[-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε): unbiased when a share ε of labels is flipped.

    References:
        Chowdhury et al., "Provably Robust DPO", 2024, eq. 12.
    """
    clean, flipped = bradley_terry(margin), bradley_terry(-margin)
    return ((1.0 - label_smoothing) * clean - label_smoothing * flipped) / (
        1.0 - 2.0 * label_smoothing
    )


# margin = β (log-ratio of chosen - log-ratio of rejected).
PAIR_LOSSES: dict[str, Callable[..., Array]] = {"sigmoid": sigmoid, "robust": robust}
