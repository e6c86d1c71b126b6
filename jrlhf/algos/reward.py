"""Reward modelling: Bradley–Terry on (chosen, rejected) pairs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jrlhf.algos.fields import given, require
from jrlhf.ops.masked import masked_mean_total
from jrlhf.ops.preference import bradley_terry
from jrlhf.types import Batch, Loss, Max, Metric, Min, Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """-log σ(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)², averaged over pairs.

    Attributes:
        center_rewards_coefficient: c, pulls rewards towards mean 0 (0.01 is usual); None: off.

    References:
        Ouyang et al., "InstructGPT", 2022. Eisenstein et al., "Helping or Herding?", 2023
        (centring).
    """

    center_rewards_coefficient: float | None = None

    def __post_init__(self) -> None:
        c = self.center_rewards_coefficient
        require(c is None or c >= 0, self, "center_rewards_coefficient", "must not be negative")

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """Outputs: scores [b 2]. Batch: lengths [b 2]; optionally margin [b], to be exceeded."""
        scores = given(out.scores, "scores")
        chosen, rejected = scores[:, 0], scores[:, 1]
        pairs = (batch["lengths"][:, 0] > 0).astype(jnp.float32)
        difference = chosen - rejected
        losses = bradley_terry(difference - batch["margin"] if "margin" in batch else difference)
        if self.center_rewards_coefficient is not None:
            losses = losses + self.center_rewards_coefficient * jnp.square(chosen + rejected)
        real = pairs[:, None] > 0
        metrics: dict[str, Metric] = {
            "accuracy": masked_mean_total((difference > 0).astype(jnp.float32), pairs),
            "margin": masked_mean_total(difference, pairs),
            "mean_reward": masked_mean_total(0.5 * (chosen + rejected), pairs),
            "min_reward": Min(jnp.min(jnp.where(real, scores, jnp.inf))),
            "max_reward": Max(jnp.max(jnp.where(real, scores, -jnp.inf))),
        }
        return Loss(masked_mean_total(losses, pairs), metrics)
