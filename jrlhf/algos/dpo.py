"""DPO: preference optimisation without a reward model."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jrlhf.algos.fields import given, require, require_choice
from jrlhf.errors import ConfigError
from jrlhf.ops.masked import masked_mean_total, masked_sum
from jrlhf.ops.preference import PAIR_LOSSES
from jrlhf.types import Batch, Loss, Metric, Outputs

# Losses that read `label_smoothing`; for the others it must stay 0, as in TRL 1.16.
_SMOOTHED = ("robust",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO:
    """-log σ(β (log-ratio of chosen - log-ratio of rejected)), averaged over pairs.

    A log-ratio is Σ (log π - log ref) over the tokens of the completion.

    Attributes:
        beta: strength of the pull towards the reference.
        loss_type: "sigmoid", or "robust" to flipped labels. TRL's list of one is accepted.
        label_smoothing: share of flipped labels assumed by "robust", in [0, ½).

    References:
        Rafailov et al., "Direct Preference Optimization", 2023.
    """

    beta: float = 0.1
    loss_type: str | list[str] = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, (list, tuple)):
            if len(self.loss_type) != 1:
                raise ConfigError(
                    f"{type(self).__name__}.loss_type must name one loss, got {self.loss_type!r}: "
                    "mixtures of losses are not supported."
                )
            object.__setattr__(self, "loss_type", self.loss_type[0])
        require_choice(self, "loss_type", PAIR_LOSSES)
        require(self.beta > 0, self, "beta", "must be positive")
        require(0 <= self.label_smoothing < 0.5, self, "label_smoothing", "must lie in [0, 0.5)")
        require(
            self.label_smoothing == 0 or self.loss_type in _SMOOTHED,
            self,
            "label_smoothing",
            f"has no effect on loss_type={self.loss_type!r}; use loss_type='robust'",
        )

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """Batch: mask [b 2 s], lengths [b 2], ref_logps [b 2 s]; index 0 is the chosen side."""
        mask = batch["mask"]
        pairs = (batch["lengths"][:, 0] > 0).astype(jnp.float32)
        logps = masked_sum(given(out.logps, "logps"), mask, axis=-1)
        rewards = self.beta * (logps - masked_sum(batch["ref_logps"], mask, axis=-1))
        margin = rewards[:, 0] - rewards[:, 1]
        losses = PAIR_LOSSES[str(self.loss_type)](margin, label_smoothing=self.label_smoothing)
        metrics: dict[str, Metric] = {
            "rewards/chosen": masked_mean_total(rewards[:, 0], pairs),
            "rewards/rejected": masked_mean_total(rewards[:, 1], pairs),
            "rewards/margins": masked_mean_total(margin, pairs),
            "rewards/accuracies": masked_mean_total((margin > 0).astype(jnp.float32), pairs),
            "logps/chosen": masked_mean_total(logps[:, 0], pairs),
            "logps/rejected": masked_mean_total(logps[:, 1], pairs),
        }
        if out.entropy is not None:
            metrics["entropy"] = masked_mean_total(out.entropy, mask)
        if out.correct is not None:
            metrics["mean_token_accuracy"] = masked_mean_total(out.correct[:, 0], mask[:, 0])
        return Loss(masked_mean_total(losses, pairs), metrics)
