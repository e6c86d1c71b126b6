"""Values that cannot work are named before anything is loaded, whichever way they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from jrlhf import (
    GRPOConfig,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from jrlhf.commands import generate, label
from jrlhf.commands.adapters import AdapterArguments, peft_config
from jrlhf.commands.arguments import parse
from jrlhf.errors import CheckpointError, ConfigError, DataError
from jrlhf.report.build import TIMES, _seconds
from jrlhf.report.curves import read_stage
from jrlhf.report.judge import naive_bayes
from jrlhf.train.checkpoint import _read_source


def test_numbers_of_a_list_are_numbers_however_they_are_written() -> None:
    for words in (["0.5", "0.25"], ["0.5,0.25"], ["[0.5, 0.25]"]):
        (cfg,) = parse(["--reward_weights", *words], GRPOConfig, verb="grpo")
        assert cfg.reward_weights == [0.5, 0.25]
    with pytest.raises(ConfigError, match=r"reward_weights\[1\] must be float, got 'x'"):
        parse(["--reward_weights", "1", "x"], GRPOConfig, verb="grpo")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", float("inf")),
        ("learning_rate", float("nan")),
        ("num_train_epochs", float("inf")),
        ("adam_beta1", 2.0),
        ("adam_beta2", 1.0),
        ("adam_epsilon", -1.0),
        ("seed", 10**20),
    ],
)
def test_numbers_without_sense_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"SFTConfig\.{field} must"):
        SFTConfig(**{field: value})


@pytest.mark.parametrize("text", ["text,label\nfine,1\n", "5\n", "\x00"])
def test_judge_rows_that_are_no_rows_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(text)
    with pytest.raises(DataError, match="rows"):
        naive_bayes(tmp_path / "rows")


def test_metrics_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"metrics\.jsonl is not UTF-8"):
        read_stage("sft", tmp_path)


def test_a_checkpoint_without_its_position_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"processes": 1}))
    with pytest.raises(CheckpointError, match=r"lacks source-0\.npz"):
        _read_source(tmp_path)


@pytest.mark.parametrize("verb", [generate, label])
def test_an_output_that_is_a_directory_is_named(verb: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    words = ["--model_name_or_path", "nowhere", "--dataset_name", str(rows)]
    more = ["--reward_model_path", "nowhere"] if verb is label else []
    with pytest.raises(ConfigError, match="is a directory"):
        verb.main([*words, *more, "--output", str(tmp_path)])


def test_a_saved_head_of_a_tied_model_needs_no_more_words() -> None:
    script = AdapterArguments(use_peft=True, lora_modules_to_save=["lm_head"])
    assert peft_config(script).ensure_weight_tying


def test_two_reward_models_are_one_too_many(glassllm: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward_model .* are both given"):
        PPOTrainer(
            model=glassllm,
            args=PPOConfig(reward_model_path="a"),
            reward_model="b",
            train_dataset=[{"prompt": "x"}],
        )


def test_a_margin_that_is_no_number_is_named(glassllm: Path, tmp_path: Path) -> None:
    rows = [{"chosen": "a", "rejected": "b", "margin": "high"}]
    args = RewardConfig(output_dir=str(tmp_path))
    with pytest.raises(DataError, match="margin must be a number"):
        RewardTrainer(model=glassllm, args=args, train_dataset=rows)


def test_a_streamed_evaluation_set_is_named(glassllm: Path, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "a b c"}] * 4)
    args = SFTConfig(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=1, max_steps=1)
    with pytest.raises(ConfigError, match="eval_dataset is a stream"):
        SFTTrainer(
            model=glassllm,
            args=args,
            train_dataset=rows,
            eval_dataset=rows.to_iterable_dataset(),
        )


@pytest.mark.parametrize("text", ["{", "[]", '{"sft": 3}', '{"sft": {}}'])
def test_times_that_are_none_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / TIMES).write_text(text)
    with pytest.raises(DataError, match="seconds of stages"):
        _seconds(tmp_path / TIMES)
