from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.algos import PPO


def credit(algorithm, batch, kl_coef=None):
    arrays = {k: jnp.array(v) for k, v in batch.items()}
    found = jax.jit(lambda b: algorithm.credit(b, kl_coef=kl_coef))(arrays)
    return {k: np.asarray(v) for k, v in found.items()}


def token_rewards(algorithm, batch):
    """Rewards of the kept tokens of each row, float64: -β KL, and the score at the last one."""
    rows = []
    for i, mask in enumerate(batch["mask"]):
        kept = np.flatnonzero(mask)
        gap = batch["old_logps"][i, kept].astype(np.float64) - batch["ref_logps"][i, kept]
        kl = gap if algorithm.kl_estimator == "k1" else np.exp(-gap) - 1 + gap
        reward = -algorithm.kl_coef * kl
        score = float(batch["rewards"][i])
        if algorithm.missing_eos_penalty is not None and not batch["terminated"][i]:
            score -= algorithm.missing_eos_penalty
        reward[-1] += score
        rows.append(reward)
    if algorithm.whiten_rewards:
        everything = np.concatenate(rows)
        mean, std = everything.mean(), np.sqrt(everything.var(ddof=1) + 1e-8)
        rows = [(r - mean) / std + mean for r in rows]
    return rows


def credit_oracle(algorithm, batch):
    """Advantages and returns of the kept tokens, by the recursion, float64."""
    advantages, returns = [], []
    for i, reward in enumerate(token_rewards(algorithm, batch)):
        values = batch["values"][i, batch["mask"][i] > 0].astype(np.float64)
        row, later_value, later = [], 0.0, 0.0
        for r, v in zip(reward[::-1], values[::-1], strict=True):
            later = r + algorithm.gamma * later_value - v + algorithm.gamma * algorithm.lam * later
            later_value = v
            row.append(later)
        advantages.append(np.array(row[::-1]))
        returns.append(advantages[-1] + values)
    everything = np.concatenate(advantages)
    mean, std = everything.mean(), np.sqrt(everything.var(ddof=1) + 1e-8)
    return [(a - mean) / std for a in advantages], returns


SETTINGS = [
    PPO(),
    PPO(kl_estimator="k3", kl_coef=0.3, gamma=0.9, lam=0.7),
    PPO(whiten_rewards=True, missing_eos_penalty=1.5),
]


@pytest.mark.parametrize("algorithm", SETTINGS, ids=str)
def test_credit_is_the_recursion_over_completion_tokens(examples, rng, algorithm):
    _, batch = examples["ppo"](rng)
    found = credit(algorithm, batch)
    advantages, returns = credit_oracle(algorithm, batch)
    kept = batch["mask"] > 0
    np.testing.assert_allclose(found["advantages"][kept], np.concatenate(advantages), 1e-4, 1e-5)
    np.testing.assert_allclose(found["returns"][kept], np.concatenate(returns), 1e-4, 1e-5)
    for name in ("advantages", "returns"):
        np.testing.assert_array_equal(found[name][~kept], 0.0)


def loss_oracle(algorithm, logps, values, batch):
    """Σ over tokens of policy loss + vf_coef · value loss, float64, in loops."""
    total = 0.0
    for i, t in zip(*np.nonzero(batch["mask"]), strict=True):
        ratio = np.exp(float(logps[i, t]) - float(batch["old_logps"][i, t]))
        advantage, target = float(batch["advantages"][i, t]), float(batch["returns"][i, t])
        near = min(max(ratio, 1 - algorithm.cliprange), 1 + algorithm.cliprange)
        old, c = float(batch["values"][i, t]), algorithm.cliprange_value
        close = min(max(float(values[i, t]), old - c), old + c)
        value = 0.5 * max((float(values[i, t]) - target) ** 2, (close - target) ** 2)
        total += max(-advantage * ratio, -advantage * near) + algorithm.vf_coef * value
    return total


@pytest.mark.parametrize("algorithm", [PPO(), PPO(cliprange=0.4, vf_coef=0.7)], ids=str)
def test_loss_and_gradients_are_those_of_the_definition(
    examples, evaluate, rng, central_differences, algorithm
):
    out, batch = examples["ppo"](rng)
    batch = credit(algorithm, batch)
    loss, gradient = evaluate(algorithm, out, batch)
    expected = loss_oracle(algorithm, out["logps"], out["values"], batch)
    np.testing.assert_allclose(loss.objective.total, expected, rtol=1e-4)
    assert loss.objective.weight == batch["mask"].sum()
    for name, f in (
        ("logps", lambda x: loss_oracle(algorithm, x, out["values"], batch)),
        ("values", lambda x: loss_oracle(algorithm, out["logps"], x, batch)),
    ):
        expected = central_differences(f, out[name])
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-3, atol=1e-5)


def test_on_policy_the_gradient_is_reinforce_and_the_ratio_exactly_one(examples, evaluate, rng):
    out, batch = examples["ppo"](rng)
    batch = credit(PPO(), {**batch, "old_logps": out["logps"]})
    loss, gradient = evaluate(PPO(vf_coef=0.0), out, batch)
    np.testing.assert_array_equal(gradient["logps"], -batch["advantages"] * batch["mask"])
    assert float(loss.metrics["val/ratio"].value()) == 1.0
    for name in ("policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio_var"):
        assert float(loss.metrics[name].value()) == 0.0


def test_at_the_start_the_value_gradient_is_the_plain_regression(examples, evaluate, rng):
    out, batch = examples["ppo"](rng)
    batch = credit(PPO(), batch)
    _, gradient = evaluate(PPO(vf_coef=1.0), {**out, "values": batch["values"]}, batch)
    expected = (batch["values"] - batch["returns"]) * batch["mask"]
    np.testing.assert_allclose(gradient["values"], expected, rtol=1e-5, atol=1e-6)


def one_row(**changes):
    batch = {
        "mask": np.array([[1, 1, 1, 0]], np.float32),
        "lengths": np.array([5]),
        "old_logps": np.array([[-1.0, -2.0, -1.5, 0.0]], np.float32),
        "ref_logps": np.array([[-1.0, -2.0, -1.5, 0.0]], np.float32),
        "values": np.zeros((1, 4), np.float32),
        "rewards": np.array([2.0], np.float32),
        "terminated": np.array([1.0], np.float32),
    }
    return {**batch, **{k: np.array(v, np.float32) for k, v in changes.items()}}


def test_the_score_stands_on_the_last_completion_token():
    """λ = 0 and γ = 1: returns are the rewards themselves."""
    found = credit(PPO(lam=0.0), one_row())
    np.testing.assert_array_equal(found["returns"], [[0, 0, 2, 0]])
    full = credit(PPO(lam=0.0), one_row(mask=[[1, 1, 1, 1]]))
    np.testing.assert_array_equal(full["returns"], [[0, 0, 0, 2]])
    holed = credit(PPO(lam=0.0), one_row(mask=[[1, 0, 1, 0]]))
    np.testing.assert_array_equal(holed["returns"], [[0, 0, 2, 0]])


def test_the_penalty_falls_on_completions_that_did_not_end():
    algorithm = PPO(lam=0.0, missing_eos_penalty=5.0)
    assert credit(algorithm, one_row())["returns"][0, 2] == 2.0
    assert credit(algorithm, one_row(terminated=[0.0]))["returns"][0, 2] == -3.0


def test_a_row_that_nobody_scored_leaves_the_batch(examples, evaluate, rng):
    out, batch = examples["ppo"](rng)
    unscored = {**batch, "rewards": batch["rewards"].copy()}
    unscored["rewards"][2] = np.nan
    found = credit(PPO(), unscored)
    np.testing.assert_array_equal(found["mask"][2], 0.0)
    others = np.delete(np.arange(8), 2)
    alone = credit(PPO(), {k: v[others] for k, v in batch.items()})
    np.testing.assert_allclose(found["advantages"][others], alone["advantages"], 1e-5, 1e-6)
    loss, gradient = evaluate(PPO(), out, found)
    assert np.isfinite(loss.objective.total)
    np.testing.assert_array_equal(gradient["logps"][2], 0.0)


def test_a_policy_equal_to_its_reference_pays_no_kl(examples, rng):
    _, batch = examples["ppo"](rng)
    same = {**batch, "ref_logps": batch["old_logps"]}
    for estimator in ("k1", "k3"):
        free = credit(PPO(kl_coef=0.0), same)
        paid = credit(PPO(kl_coef=9.0, kl_estimator=estimator), same)
        np.testing.assert_array_equal(free["advantages"], paid["advantages"])


def test_without_a_kl_penalty_no_reference_is_needed(examples, rng):
    _, batch = examples["ppo"](rng)
    with_it = credit(PPO(kl_coef=0.0), batch)
    del batch["ref_logps"]
    np.testing.assert_array_equal(credit(PPO(kl_coef=0.0), batch)["returns"], with_it["returns"])
    with pytest.raises(KeyError, match="ref_logps"):
        credit(PPO(), batch)


def test_a_coefficient_given_at_run_time_replaces_the_field(examples, rng):
    _, batch = examples["ppo"](rng)
    given = credit(PPO(), batch, kl_coef=jnp.float32(0.3))
    np.testing.assert_allclose(given["returns"], credit(PPO(kl_coef=0.3), batch)["returns"], 1e-6)


def test_the_coefficient_moves_only_when_adaptive():
    assert PPO().next_kl_coef(0.05, 100.0, episodes=64.0) == 0.05
    raised = PPO(adap_kl_ctrl=True).next_kl_coef(0.05, 100.0, episodes=1000.0)
    np.testing.assert_allclose(raised, 0.05 * (1 + 0.2 * 0.1), rtol=1e-6)


def test_rollout_metrics_are_sums_per_completion(examples, rng):
    _, batch = examples["ppo"](rng)
    algorithm = PPO(kl_coef=0.3)
    found = algorithm.rollout_metrics({k: jnp.array(v) for k, v in batch.items()})
    found = {name: float(metric.value()) for name, metric in found.items()}
    kl = ((batch["old_logps"] - batch["ref_logps"]) * batch["mask"]).sum(axis=1, dtype=np.float64)
    expected = {
        "objective/kl": kl.mean(),
        "objective/entropy": -(batch["old_logps"] * batch["mask"]).sum(axis=1).mean(),
        "objective/non_score_reward": -0.3 * kl.mean(),
        "objective/scores": batch["rewards"].mean(),
        "objective/rlhf_reward": batch["rewards"].mean() - 0.3 * kl.mean(),
        "val/num_eos_tokens": batch["terminated"].sum(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_clip_fractions_count_the_tokens_whose_gradient_the_clip_removed(examples, evaluate, rng):
    out, batch = examples["ppo"](rng)
    batch = credit(PPO(), batch)
    loss, gradient = evaluate(PPO(vf_coef=1.0), out, batch)
    kept = batch["mask"] > 0
    for metric, name in (("policy/clipfrac_avg", "logps"), ("val/clipfrac_avg", "values")):
        share = (gradient[name][kept] == 0).mean()
        assert 0 < share < 1
        np.testing.assert_allclose(loss.metrics[metric].value(), share, rtol=1e-6)
