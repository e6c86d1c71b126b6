from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.algos import GRPO

SMALL = {"num_generations": 4, "max_completion_length": 6}


def credit(algorithm, batch):
    found = jax.jit(algorithm.credit)({k: jnp.array(v) for k, v in batch.items()})
    return {k: np.asarray(v) for k, v in found.items()}


def loss_oracle(a, logps, batch):
    """The objective, divided, float64, in loops: the definition of each loss type."""
    high = a.epsilon if a.epsilon_high is None else a.epsilon_high
    rows, tokens, total_tokens = [], [], 0.0
    for i, mask in enumerate(batch["mask"]):
        kept = np.flatnonzero(mask)
        if a.mask_truncated_completions and not batch["terminated"][i]:
            kept = kept[:0]
        gap = np.array([float(logps[i, t]) - float(batch["old_logps"][i, t]) for t in kept])
        if a.importance_sampling_level == "sequence" and len(kept):
            gap = np.full(len(kept), gap.mean())
        losses = []
        for t, ratio in zip(kept, np.exp(gap), strict=True):
            advantage = float(batch["advantages"][i, t])
            bounded = ratio if a.delta is None else min(ratio, a.delta)
            clipped = min(max(ratio, 1 - a.epsilon), 1 + high)
            loss = -min(bounded * advantage, clipped * advantage)
            r = float(batch["ref_logps"][i, t]) - float(logps[i, t])
            kl = (np.exp(r) - 1 - r) * (ratio if a.use_bias_correction_kl else 1.0)
            losses.append(loss + a.beta * kl)
        rows.append(np.mean(losses) if losses else 0.0)
        tokens.append(np.sum(losses))
        total_tokens += len(kept)
    return {
        "grpo": np.mean(rows),
        "bnpo": np.sum(tokens) / total_tokens,
        "dapo": np.sum(tokens) / total_tokens,
        "dr_grpo": np.sum(tokens) / (len(rows) * a.max_completion_length),
    }[a.loss_type]


SETTINGS = [
    {"loss_type": "grpo", "beta": 0.2},
    {"loss_type": "bnpo", "epsilon_high": 0.5},
    {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": False, "delta": 1.4},
    {"loss_type": "dr_grpo", "mask_truncated_completions": True},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.2, "epsilon": 0.05,
     "mask_truncated_completions": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loss_and_gradient_are_those_of_the_definition(
    examples, evaluate, rng, central_differences, settings
):
    algorithm = GRPO(**SMALL, **settings)
    out, batch = examples["grpo"](rng)
    batch = credit(algorithm, batch)
    loss, gradient = evaluate(algorithm, out, batch)
    np.testing.assert_allclose(
        loss.objective.value(), loss_oracle(algorithm, out["logps"], batch), rtol=1e-4
    )
    expected = central_differences(lambda x: loss_oracle(algorithm, x, batch), out["logps"])
    np.testing.assert_allclose(
        gradient["logps"] / float(loss.objective.weight), expected, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_without_kl_the_gradient_is_reinforce(examples, evaluate, rng, level):
    """Per token -A; per sequence the same, because ∂ mean log-ratio = 1/n, summed over n tokens."""
    algorithm = GRPO(**SMALL, importance_sampling_level=level)
    out, batch = examples["grpo"](rng)
    batch = credit(algorithm, {**batch, "old_logps": out["logps"]})
    _, gradient = evaluate(algorithm, out, batch)
    expected = -batch["advantages"] * batch["mask"]
    np.testing.assert_allclose(gradient["logps"], expected, rtol=1e-5, atol=1e-6)


def test_without_old_log_probs_the_policy_is_its_own_old_one(examples, evaluate, rng):
    algorithm = GRPO(**SMALL, beta=0.1)
    out, batch = examples["grpo"](rng)
    batch = credit(algorithm, {**batch, "old_logps": out["logps"]})
    loss, gradient = evaluate(algorithm, out, batch)
    del batch["old_logps"]
    bare, same = evaluate(algorithm, out, batch)
    np.testing.assert_array_equal(bare.objective, loss.objective)
    np.testing.assert_array_equal(same["logps"], gradient["logps"])


@pytest.mark.parametrize("correction", [True, False])
def test_the_kl_term_pulls_towards_the_reference(examples, evaluate, rng, correction):
    """On policy and without advantage only the KL is left. Its gradient is β (1 - ref/π), plus
    β · k3 from the weight: in expectation over π, β log(π/ref), which is the KL's own gradient."""
    algorithm = GRPO(**SMALL, beta=0.3, use_bias_correction_kl=correction)
    out, batch = examples["grpo"](rng)
    batch = {**batch, "old_logps": out["logps"], "rewards": np.ones(8, np.float32)}
    batch = credit(algorithm, batch)
    _, gradient = evaluate(algorithm, out, batch)
    r = (batch["ref_logps"] - out["logps"]) * batch["mask"]
    expected = 0.3 * (1 - np.exp(r)) + (0.3 * (np.exp(r) - 1 - r) if correction else 0.0)
    np.testing.assert_allclose(gradient["logps"], expected, rtol=1e-4, atol=1e-6)
    if correction:
        np.testing.assert_allclose(gradient["logps"], -0.3 * r, rtol=1e-4, atol=1e-6)


def test_equal_rewards_move_nothing_at_all(examples, evaluate, rng):
    algorithm = GRPO(**SMALL)
    out, batch = examples["grpo"](rng)
    batch = credit(algorithm, {**batch, "rewards": np.full(8, 0.1, np.float32)})
    loss, gradient = evaluate(algorithm, out, batch)
    assert float(loss.objective.total) == 0.0
    np.testing.assert_array_equal(gradient["logps"], 0.0)


def test_a_row_that_nobody_scored_moves_nothing_and_counts_for_nobody(examples, evaluate, rng):
    algorithm = GRPO(**SMALL)
    out, batch = examples["grpo"](rng)
    batch["rewards"][2] = np.nan
    found = credit(algorithm, batch)
    np.testing.assert_array_equal(found["advantages"][2], 0.0)
    _, gradient = evaluate(algorithm, out, found)
    np.testing.assert_array_equal(gradient["logps"][2], 0.0)
    assert np.isfinite(gradient["logps"]).all()
    siblings = batch["rewards"][[0, 1, 3]].astype(np.float64)
    expected = (siblings - siblings.mean()) / (siblings.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found["advantages"][[0, 1, 3], 0], expected, rtol=1e-4)


def test_truncated_completions_lose_their_tokens_and_keep_their_place(examples, evaluate, rng):
    """They count in dr_grpo's and grpo's number of rows, as in TRL, and move nothing."""
    out, batch = examples["grpo"](rng)
    ended = batch["terminated"] > 0
    for loss_type, weight in (
        ("grpo", 8.0),
        ("dr_grpo", 48.0),
        ("bnpo", batch["mask"][ended].sum()),
        ("dapo", batch["mask"][ended].sum()),
    ):
        algorithm = GRPO(**SMALL, loss_type=loss_type, mask_truncated_completions=True)
        loss, gradient = evaluate(algorithm, out, credit(algorithm, batch))
        np.testing.assert_allclose(loss.objective.weight, weight, rtol=1e-6)
        np.testing.assert_array_equal(gradient["logps"][~ended], 0.0)
        assert np.abs(gradient["logps"][ended]).max() > 0


def test_dapo_weighs_mini_batches_by_the_whole_rollout_and_bnpo_by_their_own_tokens(
    examples, evaluate, rng
):
    out, batch = examples["grpo"](rng)
    short = np.argsort(batch["mask"].sum(axis=1))[:4]
    for loss_type, weight in (
        ("dapo", batch["mask"].sum() / 2),  # half the rows, whatever their length
        ("bnpo", batch["mask"][short].sum()),
    ):
        algorithm = GRPO(**SMALL, loss_type=loss_type)
        credited = credit(algorithm, batch)
        half = [{k: v[short] for k, v in part.items()} for part in (out, credited)]
        loss, _ = evaluate(algorithm, *half)
        np.testing.assert_allclose(loss.objective.weight, weight, rtol=1e-6)


def test_clip_metrics_are_shares_of_tokens_or_of_rows(evaluate):
    """Two rows, A = ±1; ratios of row 0: 0.5, 1.5; of row 1: 1.0, 0.5, 0.5, 0.5."""
    ratios = np.array([[0.5, 1.5, 1, 1], [1.0, 0.5, 0.5, 0.5]], np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.float32)
    out = {"logps": np.log(ratios)}
    batch = {
        "mask": mask,
        "lengths": np.array([3, 5]),
        "old_logps": np.zeros((2, 4), np.float32),
        "advantages": np.array([[1.0], [-1.0]], np.float32) * mask,
    }
    metrics = evaluate(GRPO(), out, batch)[0].metrics
    found = {name: float(metric.value()) for name, metric in metrics.items()}
    expected = {
        "clip_ratio/low_mean": 3 / 6,
        "clip_ratio/high_mean": 1 / 6,
        "clip_ratio/region_mean": 4 / 6,
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_max": 1 / 2,
    }
    assert found == pytest.approx(expected)
    # Per sequence: the geometric means are √0.75 ≈ 0.87 and 0.5^¾ ≈ 0.59.
    metrics = evaluate(GRPO(importance_sampling_level="sequence"), out, batch)[0].metrics
    found = {name: float(metric.value()) for name, metric in metrics.items()}
    expected = {
        "clip_ratio/low_mean": 1 / 2,
        "clip_ratio/high_mean": 0.0,
        "clip_ratio/region_mean": 1 / 2,
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_max": 0.0,
    }
    assert found == pytest.approx(expected)


def test_rollout_metrics_are_those_of_the_rewards(rng):
    rewards = jnp.array([1.0, 2.0, 4.0, np.nan, 3.0, 3.0, 3.0, 3.0, *[np.nan] * 4])
    found = GRPO(**SMALL).rollout_metrics({"rewards": rewards})
    found = {name: float(metric.value()) for name, metric in found.items()}
    known = np.array([1.0, 2, 4, 3, 3, 3, 3])
    expected = {
        "reward": known.mean(),
        "reward_std": known.std(ddof=1),
        "frac_reward_zero_std": 0.5,
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_booleans_of_scale_rewards_mean_what_they_mean_in_trl():
    assert GRPO(scale_rewards=True) == GRPO(scale_rewards="group")
    assert GRPO(scale_rewards=False) == GRPO(scale_rewards="none")
