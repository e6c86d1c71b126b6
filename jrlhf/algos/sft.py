"""SFT: next-token negative log-likelihood of the tokens to be learned."""

from __future__ import annotations

import dataclasses

from jrlhf.algos.fields import given, require_choice
from jrlhf.ops.masked import masked_mean_total
from jrlhf.types import Batch, Loss, Metric, Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT:
    """-Σ log π(token) / number of tokens, over all tokens of the batch alike.

    Attributes:
        loss_type: "nll", the negative log-likelihood.
    """

    loss_type: str = "nll"

    def __post_init__(self) -> None:
        require_choice(self, "loss_type", ("nll",))

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """Batch: mask [b s]."""
        mask = batch["mask"]
        metrics: dict[str, Metric] = {}
        if out.entropy is not None:
            metrics["entropy"] = masked_mean_total(out.entropy, mask)
        if out.correct is not None:
            metrics["mean_token_accuracy"] = masked_mean_total(out.correct, mask)
        return Loss(masked_mean_total(-given(out.logps, "logps"), mask), metrics)
