"""Rollouts: what stands in a batch, which rows come when, and what PPO and GRPO learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jrlhf.algos import GRPO, PPO
from jrlhf.errors import CheckpointError, ConfigError, DataError
from jrlhf.models.build import partition
from jrlhf.rollout.collect import Plan, Rollouts
from jrlhf.rollout.engine import Engine
from jrlhf.rollout.rewards import RewardSuite
from jrlhf.rollout.sampling import SamplingParams
from jrlhf.rollout.score import Actor
from jrlhf.train.metrics import compiles
from tests.rollout.conftest import EOS, PAD, Model, model

N, P, ROWS = 6, 12, 8
SAMPLING = SamplingParams(max_new_tokens=N, temperature=0.7, eos_token_ids=(EOS, 3, 4, 5, 6))
PLAN = Plan(rows=ROWS, batch_rows=4, micro_rows=4, epochs=2, prompt_length=P, seed=5)


class State(NamedTuple):
    params: Any


def reward(completion_ids: list[list[int]], bonus: list[float], **_: Any) -> list[float]:
    return [len(ids) + b for ids, b in zip(completion_ids, bonus, strict=True)]


@pytest.fixture(scope="module")
def reference() -> Model:
    return model(9, value_head=True)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    draw = np.random.default_rng(2)
    made = []
    for i in range(16):
        ids = draw.integers(7, 61, int(draw.integers(1, P + 1)))
        made.append({"ids": ids, "prompt": f"prompt {i}", "columns": {"bonus": i / 4}})
    return made


@pytest.fixture(scope="module")
def build(policy: Model, reference: Model, rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    engine = Engine(policy.net, tokenizer, SAMPLING, rows=ROWS)

    def make(
        algorithm: Any, *, plan: Plan = PLAN, functions: Any = reward, ref: bool = True, **more: Any
    ) -> Rollouts:
        def prompts(rollout: int) -> Sequence[dict[str, Any]]:
            count = plan.rows // plan.group
            return [rows[(rollout * count + i) % len(rows)] for i in range(count)]

        return Rollouts(
            Actor(policy.net, SAMPLING.temperature),
            algorithm,
            engine,
            RewardSuite(functions),
            prompts,
            plan,
            frozen={},
            reference=reference.params if ref else None,
            **more,
        )

    return make


def ppo(**changes: Any) -> PPO:
    plain = {"kl_coef": 0.0, "lam": 1.0, "gamma": 1.0}
    return PPO(**{**plain, **changes})


def test_rows_hold_prompt_completion_and_nothing_else(
    build: Any, policy: Model, rows: list[dict[str, Any]]
) -> None:
    source = build(ppo())
    made = source.collect(0, policy.params)
    assert made["ids"].shape == (ROWS, P + N)
    assert {0.0, 1.0} == set(made["terminated"].tolist())
    for i in range(ROWS):
        prompt, count = rows[i]["ids"], int(made["mask"][i].sum())
        start, end = len(prompt), int(made["lengths"][i])
        assert end == start + count
        np.testing.assert_array_equal(made["ids"][i, :start], prompt)
        assert (made["ids"][i, end:] == PAD).all()
        np.testing.assert_array_equal(made["slots"][i, :count], np.arange(start, end))
        assert not made["slots"][i, count:].any()
        assert made["mask"][i, :count].all()
        ended = made["ids"][i, end - 1] in SAMPLING.eos_token_ids
        assert made["terminated"][i] == ended
        assert ended or count == N
        for name in ("old_logps", "ref_logps", "sampler_logps", "values"):
            assert made[name][i, :count].all(), name
            assert not made[name][i, count:].any(), name
    np.testing.assert_array_equal(
        made["rewards"], made["mask"].sum(1) + [r["columns"]["bonus"] for r in rows[:ROWS]]
    )
    np.testing.assert_allclose(made["old_logps"], made["sampler_logps"], atol=1e-5)
    assert np.abs(made["ref_logps"] - made["old_logps"]).max() > 0.1
    assert source.samples[3]["prompt"] == "prompt 3"
    assert source.samples[3]["reward"] == made["rewards"][3]


def test_frozen_layers_run_once_per_rollout_and_change_nothing(
    rows: list[dict[str, Any]], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen_net, params = model(3, value_head=True, num_hidden_layers=3, trunk_layers=2)
    trainable, frozen = partition(params, frozen_net)
    moved = jax.tree.map(lambda x: 1.1 * x, trainable)
    engine = Engine(frozen_net, tokenizer, SAMPLING, rows=ROWS)

    def make() -> Rollouts:
        return Rollouts(
            Actor(frozen_net), ppo(), engine, RewardSuite(reward), lambda _: rows[:ROWS], PLAN,
            frozen=frozen, reference=moved,
        )  # fmt: skip

    kept = make()
    batches = [kept.batch(step, State(trainable)) for step in range(4)]
    hidden_size = frozen_net.spec.hidden_size
    assert all(batch["trunk"].shape == (4, P + N, hidden_size) for batch in batches)
    ids, lengths = batches[3]["ids"], batches[3]["lengths"]
    np.testing.assert_allclose(
        frozen_net.hidden(params, ids, lengths=lengths, trunk=batches[3]["trunk"]),
        frozen_net.hidden(params, ids, lengths=lengths),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip

    # A checkpoint holds none of it, and goes on with the same bits.
    state = kept.state_dict()
    assert "trunk" not in state["buffer"]
    resumed = make()
    resumed.load_state_dict(state)
    again = resumed.batch(3, State(moved))
    assert set(again) == set(batches[3])
    for name, x in again.items():
        np.testing.assert_array_equal(x, batches[3][name], err_msg=name)

    # Where it would be too large it is left out, and nothing else differs.
    monkeypatch.setattr("jrlhf.rollout.collect.TRUNK_BYTES", 0)
    plain = make().batch(0, State(trainable))
    assert set(batches[0]) - set(plain) == {"trunk"}
    for name, x in plain.items():
        np.testing.assert_allclose(x, batches[0][name], atol=2e-5, err_msg=name)


def test_reward_functions_see_each_completion_beside_its_prompt_and_columns(
    build: Any, policy: Model, rows: list[dict[str, Any]], tokenizer: Any
) -> None:
    seen: dict[str, Any] = {}

    def look(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0] * ROWS

    source = build(ppo(), functions=look)
    source.trainer_state = "now"
    told: list[tuple[int, int]] = []
    source.watch(lambda done, total: told.append((done, total)))
    made = source.collect(0, policy.params)
    assert told == [(ROWS, ROWS)]
    assert seen["prompts"] == [f"prompt {i}" for i in range(ROWS)]
    assert seen["bonus"] == [i / 4 for i in range(ROWS)]
    assert seen["trainer_state"] == "now"
    for i in range(ROWS):
        start, end = len(rows[i]["ids"]), int(made["lengths"][i])
        assert seen["completion_ids"][i] == made["ids"][i, start:end].tolist()
        assert seen["completions"][i] == tokenizer.decode(
            seen["completion_ids"][i], skip_special_tokens=True
        )


def test_conversations_are_answered_with_messages(
    build: Any, policy: Model, rows: list[dict[str, Any]]
) -> None:
    chats = [{**r, "prompt": [{"role": "user", "content": "hi"}]} for r in rows]
    seen: list[Any] = []

    def look(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * ROWS

    source = build(ppo(), functions=look)
    source._prompts = lambda _: chats[:ROWS]
    source.collect(0, policy.params)
    assert all([m["role"] for m in c] == ["assistant"] for c in seen)
    assert source.samples[0]["prompt"] == "hi"
    assert source.samples[0]["completion"] == seen[0][0]["content"]


# With γ = λ = 1 the return of a token is the sum of the token rewards from it on, whatever the
# values are: that shows where each reward was put.
@pytest.mark.parametrize("penalty", [None, 3.0])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_ppo_puts_the_score_on_the_last_token_and_the_kl_on_each(
    build: Any, policy: Model, penalty: float | None, kl_coef: float
) -> None:
    made = build(ppo(kl_coef=kl_coef, missing_eos_penalty=penalty)).collect(0, policy.params)
    kl = (made["old_logps"] - made["ref_logps"]) * made["mask"]
    scores = made["rewards"] - (penalty or 0.0) * (1 - made["terminated"])
    assert {0.0, 1.0} == set(made["terminated"].tolist())
    for i in range(ROWS):
        count = int(made["mask"][i].sum())
        for t in range(N):
            wanted = scores[i] - kl_coef * kl[i, t:].sum() if t < count else 0.0
            np.testing.assert_allclose(made["returns"][i, t], wanted, atol=1e-4)


def test_every_epoch_visits_every_row_once_in_its_own_order(build: Any, policy: Model) -> None:
    source = build(ppo())
    state = State(policy.params)
    epochs = []
    for epoch in range(2):
        batches = [source.batch(2 * epoch + i, state) for i in range(2)]
        epochs.append(np.concatenate([b["ids"] for b in batches]))
        assert [float(b["fresh"]) for b in batches] == [float(epoch == 0), 0.0]
    whole = source._buffer["ids"]
    for got in epochs:
        assert sorted(map(bytes, got)) == sorted(map(bytes, whole))
    assert (epochs[0] != epochs[1]).any()
    assert any((PLAN.order(0, 0) != PLAN.order(*other)).any() for other in ((0, 1), (1, 0)))
    source.batch(4, state)
    assert (source._buffer["ids"] != whole).any()  # the next rollout


def test_a_resumed_source_gives_the_same_batches(build: Any, policy: Model) -> None:
    state = State(policy.params)
    through = build(ppo(kl_coef=0.1, adap_kl_ctrl=True, target=0.1, horizon=100.0), kl_coef=0.1)
    batches, saved = [], []
    for step in range(6):
        batches.append(through.batch(step, state))
        saved.append(through.state_dict())
    assert through.kl_coef != 0.1
    for stop in (0, 1, 3, 4):
        again = build(ppo(kl_coef=0.1, adap_kl_ctrl=True, target=0.1, horizon=100.0), kl_coef=0.1)
        again.load_state_dict(saved[stop])
        for step in range(stop + 1, 6):
            got = again.batch(step, state)
            for name, x in batches[step].items():
                np.testing.assert_array_equal(got[name], x, err_msg=f"{stop} {step} {name}")
        assert again.kl_coef == through.kl_coef
    with pytest.raises(CheckpointError, match="Step 1 lies inside rollout 0"):
        build(ppo()).batch(1, state)


def test_the_kl_coefficient_moves_towards_its_target(build: Any, policy: Model) -> None:
    for target, rises in ((1e-3, True), (1e3, False)):
        algorithm = ppo(kl_coef=0.1, adap_kl_ctrl=True, target=target, horizon=80.0)
        source = build(algorithm, kl_coef=0.1)
        source.collect(0, policy.params)
        # KL is far from the target: the error is clipped at 0.2, and 8 of 80 episodes passed.
        np.testing.assert_allclose(
            source.kl_coef, 0.1 * (1 + (0.02 if rises else -0.02)), rtol=1e-6
        )
        assert source.metrics()["objective/kl_coef"] == 0.1


def test_nothing_compiles_after_the_first_rollout(build: Any, policy: Model) -> None:
    source = build(ppo())
    state = State(policy.params)
    for step in range(4):
        source.batch(step, state)
    before = compiles()
    for step in range(4, 12):
        source.batch(step, state)
    assert compiles() == before


GROUPS = Plan(rows=ROWS, group=4, batch_rows=8, micro_rows=4, prompt_length=P, seed=5)


def test_grpo_compares_neighbours_that_share_a_prompt(
    build: Any, policy: Model, rows: list[dict[str, Any]]
) -> None:
    algorithm = GRPO(num_generations=4, max_completion_length=N)
    source = build(algorithm, plan=GROUPS, ref=False)
    made = source.collect(0, policy.params)
    for i in range(ROWS):
        prompt = rows[i // 4]["ids"]
        np.testing.assert_array_equal(made["ids"][i, : len(prompt)], prompt)
    grouped = made["rewards"].reshape(2, 4).astype(np.float64)
    assert grouped.std(1).any(), "all rewards are equal: nothing is compared"
    wanted = (grouped - grouped.mean(1, keepdims=True)) / (
        grouped.std(1, ddof=1, keepdims=True) + 1e-4
    )
    np.testing.assert_allclose(
        made["advantages"], wanted.reshape(-1)[:, None] * made["mask"], atol=1e-5
    )
    assert "ref_logps" not in made
    metrics = source.metrics()
    assert metrics["rewards/reward/mean"] == pytest.approx(made["rewards"].mean())
    assert metrics["rewards/reward/std"] == pytest.approx(made["rewards"].std(ddof=1))
    counts = made["mask"].sum(1)
    assert metrics["completions/mean_length"] == pytest.approx(counts.mean())
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 - made["terminated"].mean())
    ended = counts[made["terminated"] > 0]
    assert metrics["completions/max_terminated_length"] == ended.max()
    assert source.metrics() == {}


def test_rows_that_nobody_scored_neither_help_nor_hurt(build: Any, policy: Model) -> None:
    def partly(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if i == 1 else float(len(ids)) for i, ids in enumerate(completion_ids)]

    algorithm = GRPO(num_generations=4, max_completion_length=N)
    source = build(algorithm, plan=GROUPS, ref=False, functions=partly)
    made = source.collect(0, policy.params)
    assert not made["advantages"][1].any()
    others = made["rewards"][[0, 2, 3]]
    wanted = (others - others.mean()) / (others.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(made["advantages"][[0, 2, 3], 0], wanted, atol=1e-5)
    assert source.metrics()["rewards/unscored_ratio"] == 1 / 8
    for_ppo = build(ppo(), functions=partly).collect(0, policy.params)
    assert not for_ppo["mask"][1].any()
    assert np.isfinite(for_ppo["advantages"]).all()


def test_the_first_update_has_ratio_exactly_one_and_later_ones_have_not(
    build: Any, policy: Model
) -> None:
    algorithm = ppo(kl_coef=0.1)
    source = build(algorithm)
    actor = source.actor

    @jax.jit
    def step(params: Any, batch: Any) -> Any:
        def total(params: Any) -> Any:
            out = actor.loss(algorithm, params, {}, batch)
            return out.objective.total, {k: m.value() for k, m in out.metrics.items()}

        gradient, metrics = jax.grad(total, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient), metrics

    params, metrics = step(policy.params, source.batch(0, State(policy.params)))
    assert metrics["val/ratio"] == 1.0
    assert metrics["val/ratio_var"] == 0.0
    assert metrics["policy/approxkl_avg"] == 0.0
    assert metrics["policy/clipfrac_avg"] == 0.0
    _, metrics = step(params, source.batch(1, State(params)))
    assert metrics["policy/approxkl_avg"] > 0
    # Without the word of `batch`, the scoring pass agrees with the step to rounding.
    stale = {**source.batch(0, State(policy.params)), "fresh": np.float32(0)}
    _, metrics = step(policy.params, stale)
    assert metrics["policy/approxkl_avg"] < 1e-10


def test_new_weights_reach_the_sampler_and_the_reference_stays(build: Any, policy: Model) -> None:
    source = build(ppo())
    digest = jax.tree.map(np.array, source.reference)
    moved = jax.tree.map(lambda x: x + 0.1, policy.params)
    first, second = source.collect(0, policy.params), source.collect(0, moved)
    later = source.collect(2, policy.params)  # the same prompts again
    assert (first["ids"] != later["ids"]).any()
    assert (first["slots"][:, 0] == later["slots"][:, 0]).all()
    assert (first["ids"] != second["ids"]).any()
    np.testing.assert_allclose(second["sampler_logps"], second["old_logps"], atol=1e-5)
    assert np.abs(second["old_logps"] - second["ref_logps"]).max() > 0.1
    for before, after in zip(
        jax.tree.leaves(digest), jax.tree.leaves(source.reference), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_plans_and_prompts_that_do_not_add_up_are_refused(build: Any, policy: Model) -> None:
    for changes in ({"group": 3}, {"batch_rows": 3}, {"micro_rows": 3}):
        sizes = {"rows": 8, "group": 1, "batch_rows": 4, "micro_rows": 2, "prompt_length": 4}
        with pytest.raises(ConfigError, match="not a multiple"):
            Plan(**{**sizes, **changes})
    source = build(ppo())
    source._prompts = lambda _: []
    with pytest.raises(DataError, match="got 0 prompts; 8 rows in groups of 1 need 8"):
        source.collect(0, policy.params)
