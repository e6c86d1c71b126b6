"""PPO: the policy from a reward model, with a value function and a KL penalty in the reward."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jrlhf.algos.fields import given, require, require_choice
from jrlhf.ops.advantages import adaptive_kl, gae
from jrlhf.ops.kl import ESTIMATORS
from jrlhf.ops.masked import masked_mean_total, masked_sum, whiten
from jrlhf.ops.surrogates import clipped_policy_loss, clipped_value_loss
from jrlhf.types import Array, Batch, Loss, Mean, Metric, Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO:
    """Clipped policy loss + vf_coef · clipped value loss, averaged over completion tokens.

    Token rewards are -kl_coef · KL, plus the completion's score at its last token. Advantages are
    GAE's, whitened over all tokens of the rollout.

    Deviations from TRL's last PPO (1.10), on purpose: the score stands on the last completion
    token, not on the padding after it; ratio, approxkl and entropy are averaged over completion
    tokens only; the loss is one mean over the tokens of the whole mini-batch however it is split; a
    value is never asked for beyond the last token.

    Attributes:
        kl_coef: weight of the KL penalty; the start value with `adap_kl_ctrl`.
        kl_estimator: "k1" or "k3", per token, of KL(π_old ‖ ref).
        adap_kl_ctrl: adapt the weight so that the KL per completion settles at `target`.
        target: KL per completion to settle at, nats; for `adap_kl_ctrl`.
        horizon: completions over which the weight may change by 20 %; for `adap_kl_ctrl`.
        cliprange: the ratio may move this far from 1.
        cliprange_value: the value may move this far from its estimate at rollout.
        vf_coef: weight of the value loss.
        gamma: discount per token.
        lam: GAE's λ.
        whiten_rewards: scale token rewards to unit variance, keeping their mean.
        missing_eos_penalty: subtracted from the score of completions that do not end with EOS.

    References:
        Schulman et al., 2017. Ziegler et al., 2019. Huang et al., "The N+ Implementation Details of
        RLHF with PPO", 2024.
    """

    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    adap_kl_ctrl: bool = False
    target: float = 6.0
    horizon: float = 10000.0
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        require_choice(self, "kl_estimator", ("k1", "k3"))
        for name in ("kl_coef", "vf_coef"):
            require(getattr(self, name) >= 0, self, name, "must not be negative")
        for name in ("cliprange", "cliprange_value", "target", "horizon"):
            require(getattr(self, name) > 0, self, name, "must be positive")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, self, name, "must lie in [0, 1]")

    def credit(self, batch: Batch, *, kl_coef: Array | float | None = None) -> Batch:
        """Adds advantages and returns [b n] to a whole rollout.

        Args:
            batch: rewards [b], the scores of the completions, mask, old_logps, ref_logps and values
                [b n]; with `missing_eos_penalty` also terminated [b], 1 where a completion ended by
                itself. A row with a NaN reward (nobody scored it) gets mask 0.
            kl_coef: the current coefficient of `adap_kl_ctrl`; None: the field's.

        Returns:
            The batch with advantages, returns, and its mask without unscored rows.
        """
        mask, scores = _scored(batch)
        if self.missing_eos_penalty is not None:
            scores = scores - self.missing_eos_penalty * (1.0 - batch["terminated"])
        rewards = self._kl_rewards(batch, mask, kl_coef) + _at_last_token(scores, mask)
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, ddof=1)
        advantages, returns = gae(rewards, batch["values"], mask, gamma=self.gamma, lam=self.lam)
        advantages = whiten(advantages, mask, ddof=1)
        return {**batch, "mask": mask, "advantages": advantages, "returns": returns}

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """Outputs: logps, values. Batch: mask, old_logps, values, advantages, returns: [b n]."""
        mask, advantages = batch["mask"], batch["advantages"]
        log_ratio = (given(out.logps, "logps") - batch["old_logps"]) * mask
        ratio = jnp.exp(log_ratio)
        policy = clipped_policy_loss(ratio, advantages, low=self.cliprange, high=self.cliprange)
        value, value_clipped = clipped_value_loss(
            given(out.values, "values"),
            batch["values"],
            batch["returns"],
            cliprange=self.cliprange_value,
        )
        clipped = policy > -advantages * ratio
        metrics: dict[str, Metric] = {
            "loss/policy_avg": masked_mean_total(policy, mask),
            "loss/value_avg": masked_mean_total(value, mask),
            "policy/approxkl_avg": masked_mean_total(0.5 * jnp.square(log_ratio), mask),
            "policy/clipfrac_avg": masked_mean_total(clipped.astype(jnp.float32), mask),
            "val/clipfrac_avg": masked_mean_total(value_clipped.astype(jnp.float32), mask),
            "val/ratio": masked_mean_total(ratio, mask),
            # About 1, the ratio's expectation under π_old, which makes it a sum over tokens.
            "val/ratio_var": masked_mean_total(jnp.square(ratio - 1.0), mask),
        }
        if out.entropy is not None:
            metrics["policy/entropy_avg"] = masked_mean_total(out.entropy, mask)
        return Loss(masked_mean_total(policy + self.vf_coef * value, mask), metrics)

    def rollout_metrics(
        self, batch: Batch, *, kl_coef: Array | float | None = None
    ) -> dict[str, Metric]:
        """What TRL logs under "objective/": per completion, summed over its tokens."""
        mask, scores = _scored(batch)
        rows = jnp.max(mask, axis=1)
        penalty = jnp.sum(self._kl_rewards(batch, mask, kl_coef), axis=1)
        if self.missing_eos_penalty is not None:
            scores = scores - self.missing_eos_penalty * (1.0 - batch["terminated"])
        metrics: dict[str, Metric] = {
            "objective/entropy": masked_mean_total(
                masked_sum(-batch["old_logps"], mask, axis=1), rows
            ),
            "objective/non_score_reward": masked_mean_total(penalty, rows),
            "objective/rlhf_reward": masked_mean_total(penalty + scores, rows),
            "objective/scores": masked_mean_total(scores, rows),
        }
        if "ref_logps" in batch:
            kl = masked_sum(self._kl(batch), mask, axis=1)
            metrics["objective/kl"] = masked_mean_total(kl, rows)
        if "terminated" in batch:
            # A count, not a share: weight 1 however many rows there are.
            ended = jnp.sum(batch["terminated"] * rows)
            metrics["val/num_eos_tokens"] = Mean(ended, jnp.ones_like(ended))
        return metrics

    def next_kl_coef(
        self, kl_coef: Array | float, kl: Array | float, *, episodes: float
    ) -> Array | float:
        """The coefficient for the next rollout, given this one's "objective/kl"."""
        if not self.adap_kl_ctrl:
            return kl_coef
        return adaptive_kl(kl_coef, kl, target=self.target, horizon=self.horizon, episodes=episodes)

    def _kl(self, batch: Batch) -> Array:
        return ESTIMATORS[self.kl_estimator](batch["old_logps"], batch["ref_logps"])

    def _kl_rewards(self, batch: Batch, mask: Array, kl_coef: Array | float | None) -> Array:
        if kl_coef is None and self.kl_coef == 0:  # then no reference is needed
            return jnp.zeros_like(mask)
        coefficient = self.kl_coef if kl_coef is None else kl_coef
        return jnp.where(mask > 0, -coefficient * self._kl(batch), 0.0)


def _scored(batch: Batch) -> tuple[Array, Array]:
    """The mask without rows that nobody scored, and their scores with 0 for NaN."""
    unscored = jnp.isnan(batch["rewards"])
    mask = jnp.where(unscored[:, None], 0.0, batch["mask"])
    return mask, jnp.where(unscored, 0.0, batch["rewards"])


def _at_last_token(scores: Array, mask: Array) -> Array:
    """[b] scores -> [b n], each on the last kept token of its row (the EOS, where there is one)."""
    later = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - mask
    last = (mask > 0) & (later == 0)
    return jnp.where(last, scores[:, None], 0.0)
