"""GRPO: rewards compared within a group of completions of one prompt; no value function."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jrlhf.algos.fields import given, require, require_choice
from jrlhf.ops.advantages import batch_std, group_advantages, group_moments
from jrlhf.ops.kl import kl_k3
from jrlhf.ops.masked import masked_mean_total, masked_moments
from jrlhf.ops.surrogates import (
    clipped_high,
    clipped_low,
    clipped_policy_loss,
    sequence_log_ratio,
)
from jrlhf.types import Array, Batch, Loss, Max, Mean, Metric, Min, Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO:
    """Clipped surrogate on group-relative advantages + β · KL to the reference.

    The `loss_type`s differ in what a row counts for, and its tokens within it:

        grpo     every completion alike: the mean of its tokens
        bnpo     every token of the mini-batch alike
        dapo     every token of the rollout alike: mini-batches of short completions weigh less
        dr_grpo  every token alike, divided by the constant `max_completion_length`

    Attributes:
        num_generations: completions per prompt; neighbours in the batch.
        max_completion_length: the constant of "dr_grpo" (and the sampler's limit).
        beta: weight of the KL to the reference; 0: no reference is needed.
        epsilon: the ratio may fall this far below 1.
        epsilon_high: and rise this far above; None: `epsilon`.
        delta: upper bound of the ratio where the advantage is negative (two-sided clip); None: off.
        loss_type: see above.
        importance_sampling_level: ratio per "token", or per "sequence" (GSPO).
        scale_rewards: divide by the std of the "group" or of the "batch", or "none". True and False
            mean "group" and "none".
        mask_truncated_completions: leave out completions that did not end by themselves.
        use_bias_correction_kl: weigh the KL by the ratio, which makes its gradient unbiased off
            policy (DeepSeek-V3.2).

    References:
        Shao et al., "DeepSeekMath", 2024. Yu et al., "DAPO", 2025. Liu et al., "Understanding
        R1-Zero-Like Training", 2025 (dr_grpo). Zheng et al., "GSPO", 2025.
    """

    num_generations: int = 8
    max_completion_length: int = 512
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    scale_rewards: Literal["group", "batch", "none"] | bool = "group"
    mask_truncated_completions: bool = False
    use_bias_correction_kl: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):
            object.__setattr__(self, "scale_rewards", "group" if self.scale_rewards else "none")
        require_choice(self, "scale_rewards", ("group", "batch", "none"))
        require_choice(self, "loss_type", ("grpo", "bnpo", "dr_grpo", "dapo"))
        require_choice(self, "importance_sampling_level", ("token", "sequence"))
        require(self.num_generations >= 2, self, "num_generations", "must be at least 2")
        require(self.max_completion_length >= 1, self, "max_completion_length", "must be positive")
        require(self.beta >= 0, self, "beta", "must not be negative")
        require(0 < self.epsilon < 1, self, "epsilon", "must lie in (0, 1)")
        require(self.epsilon_high is None or self.epsilon_high > 0, self, "epsilon_high",
                "must be positive")  # fmt: skip
        require(self.delta is None or self.delta > 1 + self._high, self, "delta",
                "must be larger than 1 + epsilon_high")  # fmt: skip

    @property
    def _high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def credit(self, batch: Batch) -> Batch:
        """Adds advantages [b n] and row_weight [b] to a whole rollout.

        Args:
            batch: rewards [b] (NaN: no reward function scored the row, which then gets advantage 0
                and does not count in its group), mask [b n], lengths [b]; terminated [b] with
                `mask_truncated_completions`.

        Returns:
            The batch with advantages; and row_weight, what each row adds to the loss's denominator,
            which for "dapo" depends on the whole rollout.
        """
        advantages = group_advantages(
            batch["rewards"], group=self.num_generations, scale=str(self.scale_rewards)
        )
        spread = jnp.where(batch["mask"] > 0, advantages[:, None], 0.0)
        return {**batch, "advantages": spread, "row_weight": self._row_weight(batch)}

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """Outputs: logps. Batch: what `credit` returns; ref_logps [b n] when beta is not 0.

        Without old_logps [b n] the policy counts as its own old one: the ratio is 1, its gradient
        is not (one update per rollout, one scoring pass saved).
        """
        logps, mask, advantages = given(out.logps, "logps"), self._mask(batch), batch["advantages"]
        old_logps = batch["old_logps"] if "old_logps" in batch else jax.lax.stop_gradient(logps)
        log_ratio = (logps - old_logps) * mask
        if self.importance_sampling_level == "sequence":
            log_ratio = sequence_log_ratio(log_ratio, mask)
        ratio = jnp.exp(log_ratio)
        losses = clipped_policy_loss(
            ratio, advantages, low=self.epsilon, high=self._high, delta=self.delta
        )
        metrics = self._clip_metrics(ratio, advantages, mask)
        if self.beta != 0:
            kl = kl_k3(logps * mask, batch["ref_logps"] * mask)
            kl = kl * ratio if self.use_bias_correction_kl else kl
            losses = losses + self.beta * kl
            metrics["kl"] = masked_mean_total(kl, mask)
        if out.entropy is not None:
            metrics["entropy"] = masked_mean_total(out.entropy, mask)
        if self.loss_type == "grpo":
            mask = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
        total = masked_mean_total(losses, mask).total
        weight = batch["row_weight"] if "row_weight" in batch else self._row_weight(batch)
        return Loss(Mean(total, jnp.sum(weight)), metrics)

    def rollout_metrics(self, batch: Batch) -> dict[str, Metric]:
        """reward, reward_std and frac_reward_zero_std of a whole rollout, as TRL logs them."""
        rewards = batch["rewards"]
        scored = (~jnp.isnan(rewards)).astype(jnp.float32)
        _, variance = masked_moments(rewards, scored, ddof=1)
        std = jnp.sqrt(variance[0])
        one = jnp.ones_like(std)
        spread = group_moments(rewards, group=self.num_generations)[2]
        if self.scale_rewards == "batch":
            spread = jnp.broadcast_to(batch_std(rewards), spread.shape)
        flat = (spread <= 1e-8).astype(jnp.float32)
        # Rows of groups in which anything was scored.
        judged = jnp.max(scored.reshape(-1, self.num_generations), axis=1, keepdims=True)
        judged = jnp.broadcast_to(judged, (judged.shape[0], self.num_generations)).reshape(-1)
        return {
            "reward": masked_mean_total(rewards, scored),
            "reward_std": Mean(std, one),
            "frac_reward_zero_std": masked_mean_total(flat, judged),
        }

    def _mask(self, batch: Batch) -> Array:
        if not self.mask_truncated_completions:
            return batch["mask"]
        return batch["mask"] * batch["terminated"][:, None]

    def _row_weight(self, batch: Batch) -> Array:
        """What each row adds to the denominator; padded rows (of length 0) add nothing."""
        rows = (batch["lengths"] > 0).astype(jnp.float32)
        tokens = jnp.sum(self._mask(batch), axis=1)
        table = {
            "grpo": rows,
            "bnpo": tokens,
            "dapo": rows * jnp.sum(tokens) / jnp.maximum(jnp.sum(rows), 1.0),
            "dr_grpo": rows * float(self.max_completion_length),
        }
        return table[self.loss_type]

    def _clip_metrics(self, ratio: Array, advantages: Array, mask: Array) -> dict[str, Metric]:
        low = clipped_low(ratio, advantages, low=self.epsilon)
        high = clipped_high(ratio, advantages, high=self._high)
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)
        rows = jnp.sum(mask, axis=1)
        low_rows, high_rows = ((jnp.sum(x * mask, axis=1) / rows) for x in (low, high))
        if self.importance_sampling_level == "sequence":  # one decision per row, so count rows
            mask = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
        return {
            "clip_ratio/low_mean": masked_mean_total(low, mask),
            "clip_ratio/low_min": Min(jnp.min(jnp.where(rows > 0, low_rows, jnp.inf))),
            "clip_ratio/high_mean": masked_mean_total(high, mask),
            "clip_ratio/high_max": Max(jnp.max(jnp.where(rows > 0, high_rows, -jnp.inf))),
            "clip_ratio/region_mean": masked_mean_total(low + high, mask),
        }
