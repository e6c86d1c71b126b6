"""The fields of PPO and GRPO that decide what is sampled, in which sizes, and how it is used."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jrlhf.errors import ConfigError, PromptTooLongError, UnsupportedFieldError
from jrlhf.rollout.collect import Plan
from jrlhf.rollout.reward_model import RewardModel
from jrlhf.rollout.rewards import Completions
from jrlhf.rollout.sampling import SamplingParams
from jrlhf.trainers import adapters
from tests.fields.bench import (
    ONLINE,
    PROMPTS,
    Bench,
    dropout_is_turned_off,
    first_rows,
    length_reward,
    router_is_balanced,
    words,
)
from tests.rollout.conftest import EOS

Check = Callable[[Bench, str], None]
LONG = [{"prompt": words(*range(i, i + 2 + 8 * (i % 2)))} for i in range(10)]  # of 2 and 10 words


def plan(bench: Bench, face: str, **fields: Any) -> Plan:
    return bench.trainer(face, **fields)._loop.source.plan


def sampling(bench: Bench, face: str, **fields: Any) -> SamplingParams:
    """What the sampler is told; tests/rollout shows that it obeys."""
    return bench.trainer(face, **fields)._loop.source.engine.sampling


def prompts(bench: Bench, face: str, **fields: Any) -> list[Any]:
    """The tokenized prompts that a trainer samples from."""
    return bench.trainer(face, **fields)._loop.source._prompts.rows.items


def told(name: str, value: Any, default: Any) -> Check:
    def check(bench: Bench, face: str) -> None:
        assert getattr(sampling(bench, face, **{name: value}), name) == value
        assert getattr(sampling(bench, face), name) == default

    return check


def temperature(bench: Bench, face: str) -> None:
    source = bench.trainer(face, temperature=0.4)._loop.source
    assert source.engine.sampling.temperature == 0.4
    assert source.actor.temperature == 0.4  # of every log-prob


def max_prompt_length(bench: Bench, face: str) -> None:
    fields = {"data": LONG, "overlong_prompts": "truncate"}
    longest = [
        max(len(row["ids"]) for row in prompts(bench, face, **fields, **more))
        for more in ({}, {"max_prompt_length": 6})
    ]
    assert longest == [10, 6]
    with pytest.raises(ConfigError, match="max_prompt_length"):
        bench.trainer(face, max_prompt_length=0)


def overlong_prompts(bench: Bench, face: str) -> None:
    fields: dict[str, Any] = {"data": LONG, "max_prompt_length": 6}
    with pytest.raises(PromptTooLongError):
        bench.trainer(face, overlong_prompts="error", **fields)
    count = {
        value: len(prompts(bench, face, overlong_prompts=value, **fields))
        for value in ("drop", "truncate")
    }
    assert count == {"drop": 5, "truncate": 10}


SAMPLES = [{"prompt": "p", "completion": f"c{i}", "reward": float(i)} for i in range(6)]


def shown(bench: Bench, face: str, **fields: Any) -> list[str]:
    """What the trainer's callbacks write of six samples when it logs."""
    trainer = bench.trainer(face, **fields)
    Path(trainer.args.output_dir).mkdir()
    trainer._loop.source.samples = SAMPLES
    for callback in trainer._loop.callbacks:
        callback.on_log(trainer.args, trainer.state, None)
    file = Path(trainer.args.output_dir) / "completions.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line)["completion"] for line in lines]


def log_completions(bench: Bench, face: str) -> None:
    assert shown(bench, face) == []
    assert shown(bench, face, log_completions=True) == ["c0", "c1", "c2", "c3"]


def num_completions_to_print(bench: Bench, face: str) -> None:
    assert shown(bench, face, log_completions=True, num_completions_to_print=2) == ["c0", "c1"]


SHARED: dict[str, Check] = {
    "temperature": temperature,
    "top_k": told("top_k", 5, 0),
    "top_p": told("top_p", 0.9, 1.0),
    "max_prompt_length": max_prompt_length,
    "overlong_prompts": overlong_prompts,
    "log_completions": log_completions,
    "num_completions_to_print": num_completions_to_print,
}


# ------------------------------------------------------------------ PPO


def num_ppo_epochs(bench: Bench, face: str) -> None:
    assert plan(bench, face).epochs == 4
    other = plan(bench, face, num_ppo_epochs=3)
    assert (other.epochs, other.steps) == (3, 3)
    with pytest.raises(ConfigError, match="num_ppo_epochs"):
        bench.trainer(face, num_ppo_epochs=0)


def num_mini_batches(bench: Bench, face: str) -> None:
    made = plan(bench, face, num_mini_batches=3)
    assert (made.rows, made.batch_rows, made.batches) == (6, 2, 3)


def batch_size(bench: Bench, face: str) -> None:
    made = plan(bench, face, batch_size=12, num_mini_batches=3)
    assert (made.rows, made.batch_rows) == (12, 4)


def mini_batch_size(bench: Bench, face: str) -> None:
    made = plan(bench, face, batch_size=12, mini_batch_size=2)
    assert (made.rows, made.batch_rows) == (12, 2)
    with pytest.raises(ConfigError, match="num_mini_batches"):
        bench.trainer(face, batch_size=12, mini_batch_size=2, num_mini_batches=3)


def total_episodes(bench: Bench, face: str) -> None:
    # Rollouts of two, each used four times.
    assert bench.trainer(face, total_episodes=6)._loop.total_steps == 12
    assert bench.trainer(face, total_episodes=6, max_steps=5)._loop.total_steps == 5


def response_length(bench: Bench, face: str) -> None:
    assert sampling(bench, face, response_length=9).max_new_tokens == 9


def stop_token(bench: Bench, face: str) -> None:
    assert sampling(bench, face).eos_token_ids == (EOS,)
    assert sampling(bench, face, stop_token=None).eos_token_ids == ()


def stop_token_id(bench: Bench, face: str) -> None:
    assert sampling(bench, face, stop_token_id=17).eos_token_ids == (EOS, 17)
    assert sampling(bench, face, stop_token_id=17, stop_token=None).eos_token_ids == (17,)


def sft_model_path(bench: Bench, face: str) -> None:
    trainer = bench.trainer(face, given={"model": None}, sft_model_path=bench.path)
    assert trainer.model.name_or_path == bench.path
    with pytest.raises(ConfigError, match="needs a model"):
        bench.trainer(face, given={"model": None})


def reward_model_path(bench: Bench, face: str) -> None:
    trainer = bench.trainer(face, given={"reward_model": None}, reward_model_path=bench.path)
    (function,) = trainer._loop.source.rewards.functions
    assert isinstance(function, RewardModel)
    with pytest.raises(ConfigError, match="needs a reward_model"):
        bench.trainer(face, given={"reward_model": None})


PPO: dict[str, Check] = {
    "num_ppo_epochs": num_ppo_epochs,
    "num_mini_batches": num_mini_batches,
    "batch_size": batch_size,
    "mini_batch_size": mini_batch_size,
    "total_episodes": total_episodes,
    "response_length": response_length,
    "stop_token": stop_token,
    "stop_token_id": stop_token_id,
    "sft_model_path": sft_model_path,
    "reward_model_path": reward_model_path,
}


# ------------------------------------------------------------------ GRPO


def num_iterations(bench: Bench, face: str) -> None:
    assert plan(bench, face).epochs == 1
    made = plan(bench, face, num_iterations=3)
    assert (made.epochs, made.steps) == (3, 3)


def steps_per_generation(bench: Bench, face: str) -> None:
    made = plan(bench, face, steps_per_generation=3)
    assert (made.rows, made.batch_rows, made.batches) == (6, 2, 3)


def generation_batch_size(bench: Bench, face: str) -> None:
    made = plan(bench, face, generation_batch_size=8)
    assert (made.rows, made.batch_rows, made.batches) == (8, 2, 4)
    with pytest.raises(ConfigError, match="steps_per_generation and generation_batch_size"):
        bench.trainer(face, generation_batch_size=8, steps_per_generation=4)


def num_generations(bench: Bench, face: str) -> None:
    for group in (2, 4):
        trainer = bench.trainer(face, num_generations=group, per_device_train_batch_size=8)
        assert trainer._loop.source.plan.group == group
        assert len(first_rows(trainer)) == 8 // group  # prompts


def max_completion_length(bench: Bench, face: str) -> None:
    assert sampling(bench, face, max_completion_length=9).max_new_tokens == 9


def reward_weights(bench: Bench, face: str) -> None:
    functions = [length_reward, lambda completions, **_: [1.0] * len(completions)]
    seen = Completions(["p"], ["four"], [[3]], [[4]], [True], {})
    totals = []
    for more in ({}, {"reward_weights": [0.5, -3.0]}):
        trainer = bench.trainer(face, given={"reward_funcs": functions}, **more)
        totals.append(float(trainer._loop.source.rewards(seen).total[0]))
    assert totals == [5.0, -1.0]


def shuffle_dataset(bench: Bench, face: str) -> None:
    in_order = first_rows(bench.trainer(face, shuffle_dataset=False, steps_per_generation=10))
    assert in_order == [tuple(bench.tokenizer(row["prompt"])["input_ids"]) for row in PROMPTS]
    shuffled = first_rows(bench.trainer(face, steps_per_generation=10))
    assert sorted(shuffled) == sorted(in_order) != shuffled


def of_vllm(name: str, value: Any) -> Check:
    def check(bench: Bench, face: str) -> None:
        adapters.say_once.cache_clear()
        with pytest.warns(UserWarning, match=f"{name}: .*its own engine"):
            bench.trainer(face, **{name: value})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bench.trainer(face, **{name: value})  # said once
            bench.trainer(face)

    return check


def vllm_mode(bench: Bench, face: str) -> None:
    with pytest.raises(UnsupportedFieldError, match="vllm_mode='server'"):
        bench.trainer(face, vllm_mode="server")


GRPO: dict[str, Check] = {
    "disable_dropout": dropout_is_turned_off,
    "router_aux_loss_coef": router_is_balanced,
    "num_iterations": num_iterations,
    "steps_per_generation": steps_per_generation,
    "generation_batch_size": generation_batch_size,
    "num_generations": num_generations,
    "max_completion_length": max_completion_length,
    "min_p": told("min_p", 0.1, 0.0),
    "repetition_penalty": told("repetition_penalty", 1.2, 1.0),
    "reward_weights": reward_weights,
    "shuffle_dataset": shuffle_dataset,
    "use_vllm": of_vllm("use_vllm", True),
    "vllm_mode": vllm_mode,
    "vllm_tensor_parallel_size": of_vllm("vllm_tensor_parallel_size", 2),
    "vllm_gpu_memory_utilization": of_vllm("vllm_gpu_memory_utilization", 0.5),
}
TABLES = {"ppo": SHARED | PPO, "grpo": SHARED | GRPO}
CASES = [(face, field) for face, table in TABLES.items() for field in table]


@pytest.mark.parametrize(("face", "field"), CASES)
def test_the_field_acts(face: str, field: str, bench: Bench) -> None:
    TABLES[face][field](bench, face)


@pytest.mark.parametrize("face", ONLINE)
def test_the_rollouts_get_the_config_itself(face: str, bench: Bench) -> None:
    """So what test_policy_fields.py shows of the algorithm holds for the trainer."""
    trainer = bench.trainer(face)
    assert trainer._loop.source.algorithm is trainer.args
