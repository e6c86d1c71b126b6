"""The hyperparameters of PPO and GRPO: numbers of a tiny rollout against the papers in float64.

Each field is flipped alone. The oracle has the same field as an argument, and the flip must move
it: a rollout on which a field means nothing would show nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.errors import ConfigError
from jrlhf.types import Outputs
from tests.fields.bench import Bench

Numbers = list[np.ndarray]
draw = np.random.default_rng(3)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1.0]])
LAST = [3, 1, 2, 3]
OLD = -draw.random((4, 4)) * 2 * MASK
REF = OLD + draw.normal(size=(4, 4)) * 0.7 * MASK
NEW = OLD + draw.normal(size=(4, 4)) * 0.6 * MASK
VALUES, NEW_VALUES = draw.normal(size=(2, 4, 4)) * MASK
SCORES = np.array([2.0, -1.0, 0.5, 3.0])
TERMINATED = np.array([1.0, 0.0, 1.0, 0.0])
KEPT = MASK > 0


def rollout() -> dict[str, Any]:
    arrays = {
        "mask": MASK, "lengths": MASK.sum(1) + 3, "old_logps": OLD, "ref_logps": REF,
        "values": VALUES, "rewards": SCORES, "terminated": TERMINATED,
    }  # fmt: skip
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}


def ours(algorithm: Any) -> Numbers:
    """Advantages of the rollout, and the loss of the new policy on it."""
    batch = algorithm.credit(rollout())
    logps, values = jnp.asarray(NEW, jnp.float32), jnp.asarray(NEW_VALUES, jnp.float32)
    loss = algorithm.loss(Outputs(logps=logps, values=values), batch)
    return [np.asarray(batch["advantages"]), np.asarray(loss.objective.value())]


def agree(bench: Bench, face: str, wanted: Callable[..., Numbers], **flip: Any) -> None:
    """The trainer's algorithm with and without the flip is the oracle's, and the flip moves it."""
    # Some fields act only where another one is set.
    base = {**BASES.get(next(iter(flip)), {})}
    before, after = wanted(**base), wanted(**{**base, **flip})
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 1e-3
    for fields, oracle in ((base, before), ({**base, **flip}, after)):
        algorithm = bench.trainer(face, **fields).args
        for got, number in zip(ours(algorithm), oracle, strict=True):
            np.testing.assert_allclose(got, number, rtol=2e-5, atol=2e-5)


BASES: dict[str, dict[str, Any]] = {
    "use_bias_correction_kl": {"beta": 0.5},
    "kl_estimator": {"kl_coef": 0.5},
}


# ------------------------------------------------------------------ PPO


def whitened(x: np.ndarray, *, centre: bool) -> np.ndarray:
    kept = x[KEPT]
    scaled = (x - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
    return np.where(KEPT, scaled if centre else scaled + kept.mean(), 0.0)


def ppo(
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
    missing_eos_penalty: float | None = None,
) -> Numbers:
    """Huang et al., "The N+ Implementation Details of RLHF with PPO", 2024."""
    r = REF - OLD
    rewards = -kl_coef * (-r if kl_estimator == "k1" else np.exp(r) - 1 - r)
    rewards[range(4), LAST] += SCORES - (missing_eos_penalty or 0.0) * (1 - TERMINATED)
    rewards = whitened(rewards, centre=False) if whiten_rewards else rewards * MASK
    advantages = np.zeros((4, 4))
    for i, last in enumerate(LAST):
        value = advantage = 0.0
        for t in range(last, -1, -1):
            advantage = rewards[i, t] + gamma * value - VALUES[i, t] + gamma * lam * advantage
            value, advantages[i, t] = VALUES[i, t], advantage
    returns = advantages + VALUES
    advantages = whitened(advantages, centre=True)
    ratio = np.exp(NEW - OLD)
    near = np.clip(ratio, 1 - cliprange, 1 + cliprange)
    policy = np.maximum(-advantages * ratio, -advantages * near)
    clipped = np.clip(NEW_VALUES, VALUES - cliprange_value, VALUES + cliprange_value)
    value_loss = 0.5 * np.maximum((NEW_VALUES - returns) ** 2, (clipped - returns) ** 2)
    return [advantages, (policy + vf_coef * value_loss)[KEPT].mean()]


def flips(face: str, wanted: Callable[..., Numbers], name: str, *values: Any) -> Any:
    def check(bench: Bench) -> None:
        for value in values:
            agree(bench, face, wanted, **{name: value})

    return check


def adaptive(bench: Bench, **fields: Any) -> float:
    """The KL coefficient after a rollout of 100 completions whose KL was 3 nats."""
    trainer = bench.trainer("ppo", kl_coef=0.1, **fields)
    start = trainer._loop.source.kl_coef
    assert (start is None) == (not fields.get("adap_kl_ctrl", False))
    return float(trainer.args.next_kl_coef(start or 0.1, 3.0, episodes=100.0))


def adap_kl_ctrl(bench: Bench) -> None:
    assert adaptive(bench) == 0.1
    # 3 nats are less than the target of 6, so it falls by a fifth of 100 / 10,000.
    np.testing.assert_allclose(adaptive(bench, adap_kl_ctrl=True), 0.1 * (1 - 0.2 * 0.01))


def target(bench: Bench) -> None:
    got = adaptive(bench, adap_kl_ctrl=True, target=2.5)
    np.testing.assert_allclose(got, 0.1 * (1 + 0.2 * 0.01))
    got = adaptive(bench, adap_kl_ctrl=True, target=3.0)
    np.testing.assert_allclose(got, 0.1)


def horizon(bench: Bench) -> None:
    got = adaptive(bench, adap_kl_ctrl=True, horizon=200.0)
    np.testing.assert_allclose(got, 0.1 * (1 - 0.2 * 0.5), rtol=1e-6)


PPO: dict[str, Callable[[Bench], None]] = {
    "kl_coef": flips("ppo", ppo, "kl_coef", 0.5, 0.0),
    "kl_estimator": flips("ppo", ppo, "kl_estimator", "k3"),
    "adap_kl_ctrl": adap_kl_ctrl,
    "target": target,
    "horizon": horizon,
    "cliprange": flips("ppo", ppo, "cliprange", 0.5),
    "cliprange_value": flips("ppo", ppo, "cliprange_value", 0.9),
    "vf_coef": flips("ppo", ppo, "vf_coef", 0.7, 0.0),
    "gamma": flips("ppo", ppo, "gamma", 0.8),
    "lam": flips("ppo", ppo, "lam", 0.5),
    "whiten_rewards": flips("ppo", ppo, "whiten_rewards", True),
    "missing_eos_penalty": flips("ppo", ppo, "missing_eos_penalty", 2.0),
}


# ------------------------------------------------------------------ GRPO


def grpo(
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    scale_rewards: str | bool = "group",
    mask_truncated_completions: bool = False,
    use_bias_correction_kl: bool = True,
    num_generations: int = 2,
    max_completion_length: int = 4,
) -> Numbers:
    """The formulas of Shao et al. 2024 and of those who changed them, as the fields name them."""
    groups = SCORES.reshape(-1, num_generations)
    centred = groups - groups.mean(1, keepdims=True)
    std = {"group": groups.std(1, ddof=1, keepdims=True), "batch": SCORES.std(ddof=1)}
    if scale_rewards not in ("none", False):
        centred = centred / (std["group" if scale_rewards is True else str(scale_rewards)] + 1e-4)
    advantages = np.where(KEPT, centred.reshape(4, 1), 0.0)
    mask = MASK * TERMINATED[:, None] if mask_truncated_completions else MASK
    log_ratio = NEW - OLD
    if importance_sampling_level == "sequence":
        tokens = np.maximum(mask.sum(1, keepdims=True), 1)
        log_ratio = (log_ratio * mask).sum(1, keepdims=True) / tokens
    ratio = np.exp(log_ratio)
    near = np.clip(ratio, 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    bounded = ratio if delta is None else np.minimum(ratio, delta)
    losses = -np.minimum(bounded * advantages, near * advantages)
    kl = np.exp(REF - NEW) - 1 - (REF - NEW)
    losses = losses + beta * kl * (ratio if use_bias_correction_kl else 1.0)
    rows = (losses * mask).sum(1)
    if loss_type == "grpo":
        return [advantages, (rows / np.maximum(mask.sum(1), 1)).mean()]
    if loss_type == "dr_grpo":
        return [advantages, rows.sum() / (4 * max_completion_length)]
    return [advantages, rows.sum() / mask.sum()]


def loss_type(bench: Bench) -> None:
    agree(bench, "grpo", grpo, loss_type="grpo")
    agree(bench, "grpo", grpo, loss_type="dr_grpo")
    # On a whole rollout "dapo" and "bnpo" agree. On its first row, of 4 tokens where rows have
    # 3¼ on average, the one divides by the rollout's share, the other by the row's own tokens.
    first = {}
    for name in ("dapo", "bnpo"):
        algorithm = bench.trainer("grpo", loss_type=name).args
        batch = {k: x[:1] for k, x in algorithm.credit(rollout()).items()}
        loss = algorithm.loss(Outputs(logps=jnp.asarray(NEW[:1], jnp.float32)), batch)
        first[name] = float(loss.objective.value())
    np.testing.assert_allclose(first["dapo"] * 3.25, first["bnpo"] * 4, rtol=1e-5)
    with pytest.raises(ConfigError, match="loss_type"):
        bench.trainer("grpo", loss_type="dapper")


def num_generations(bench: Bench) -> None:
    for group in (2, 4):
        algorithm = bench.trainer("grpo", num_generations=group, steps_per_generation=2).args
        got, number = ours(algorithm), grpo(num_generations=group)
        np.testing.assert_allclose(got[0], number[0], rtol=2e-5, atol=2e-5)


def max_completion_length(bench: Bench) -> None:
    for length in (4, 9):
        fields = {"loss_type": "dr_grpo", "max_completion_length": length}
        got = ours(bench.trainer("grpo", **fields).args)[1]
        np.testing.assert_allclose(got, grpo(**fields)[1], rtol=2e-5)  # type: ignore[arg-type]


def beta(bench: Bench) -> None:
    agree(bench, "grpo", grpo, beta=0.5)
    # And only then is there a reference to score.
    references = [bench.trainer("grpo", beta=b)._loop.source.reference for b in (0.0, 0.5)]
    assert references[0] is None
    assert references[1] is not None


GRPO: dict[str, Callable[[Bench], None]] = {
    "num_generations": num_generations,
    "max_completion_length": max_completion_length,
    "beta": beta,
    "epsilon": flips("grpo", grpo, "epsilon", 0.5),
    "epsilon_high": flips("grpo", grpo, "epsilon_high", 0.6),
    "delta": flips("grpo", grpo, "delta", 1.25),
    "loss_type": loss_type,
    "importance_sampling_level": flips("grpo", grpo, "importance_sampling_level", "sequence"),
    "scale_rewards": flips("grpo", grpo, "scale_rewards", "batch", "none", False),
    "mask_truncated_completions": flips("grpo", grpo, "mask_truncated_completions", True),
    "use_bias_correction_kl": flips("grpo", grpo, "use_bias_correction_kl", False),
}
TABLES = {"ppo": PPO, "grpo": GRPO}
CASES = [(face, field) for face, table in TABLES.items() for field in table]


@pytest.mark.parametrize(("face", "field"), CASES)
def test_the_field_acts(face: str, field: str, bench: Bench) -> None:
    TABLES[face][field](bench)
