"""Bad input is a named error before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from jrlhf import (
    AutoModelForCausalLM,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from jrlhf.errors import (
    ConfigError,
    DataError,
    EmptyDatasetError,
    MeshError,
    MissingColumnError,
    MissingFileError,
    ModelError,
    PromptTooLongError,
    RewardError,
    UnsupportedFieldError,
)

ROWS = [{"text": "Alice was tired."}] * 8
PROMPTS = [{"prompt": "Alice was"}] * 8


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def grpo(model: str, **changes: Any) -> GRPOTrainer:
    fields = {"output_dir": "grpo", "num_generations": 4, "max_completion_length": 8}
    return GRPOTrainer(
        model=model,
        reward_funcs=length,
        args=GRPOConfig(**(fields | changes)),
        train_dataset=PROMPTS,
    )


CASES: dict[str, tuple[type[Exception], str, Callable[[str], Any]]] = {
    "missing file": (
        MissingFileError,
        "nowhere.jsonl",
        lambda m: SFTTrainer(model=m, train_dataset="nowhere.jsonl"),
    ),
    "missing column": (
        MissingColumnError,
        "text",
        lambda m: SFTTrainer(model=m, train_dataset=[{"txt": "a"}]),
    ),
    "missing pair column": (
        MissingColumnError,
        "rejected",
        lambda m: RewardTrainer(model=m, train_dataset=[{"chosen": "a", "reject": "b"}]),
    ),
    "empty dataset": (
        EmptyDatasetError,
        "no rows",
        lambda m: SFTTrainer(model=m, train_dataset=[]),
    ),
    "misspelt field": (
        ConfigError,
        'Did you mean "learning_rate"',
        lambda m: SFTConfig(lerning_rate=1.0),
    ),
    "misspelt argument": (
        ConfigError,
        'Did you mean "train_dataset"',
        lambda m: SFTTrainer(model=m, train_datset=ROWS),
    ),
    "mesh that does not fit": (
        MeshError,
        "fsdp=4",
        lambda m: SFTTrainer(model=m, train_dataset=ROWS, args=SFTConfig(mesh="fsdp=3")),
    ),
    "batch that does not divide": (
        MeshError,
        "does not divide",
        lambda m: PPOTrainer(
            model=m,
            reward_model=length,
            train_dataset=PROMPTS,
            args=PPOConfig(batch_size=12, response_length=4),
        ),
    ),
    "group that does not divide": (
        ConfigError,
        "num_generations",
        lambda m: grpo(m, num_generations=3, per_device_train_batch_size=1),
    ),
    "prompt longer than the context": (
        PromptTooLongError,
        "tokens",
        lambda m: PPOTrainer(
            model=m,
            reward_model=length,
            train_dataset=[{"prompt": "Alice was " * 200}],
            args=PPOConfig(batch_size=8),
        ),
    ),
    "an evaluation set of a face that samples": (
        ConfigError,
        "eval_dataset is not supported: the rollouts are the evaluation",
        lambda m: PPOTrainer(
            model=m, reward_model=length, train_dataset=PROMPTS, eval_dataset=PROMPTS
        ),
    ),
    "server mode": (UnsupportedFieldError, "colocate", lambda m: GRPOConfig(vllm_mode="server")),
    "an id that no hub has": (
        ConfigError,
        "hub_model_id.*a/b/c",
        lambda m: SFTConfig(hub_model_id="a/b/c"),
    ),
    "a field of PyTorch": (UnsupportedFieldError, "mesh", lambda m: SFTConfig(deepspeed="z3.json")),
    "an adapter": (
        ConfigError,
        "no field 'rank'",
        lambda m: SFTTrainer(model=m, train_dataset=ROWS, peft_config={"rank": 8}),
    ),
    "no model": (
        ConfigError,
        "model_name_or_path",
        lambda m: SFTTrainer(train_dataset=ROWS),
    ),
    "a config of another trainer": (
        ConfigError,
        "DPOConfig",
        lambda m: DPOTrainer(model=m, args=SFTConfig()),
    ),
    "wrong head": (
        ModelError,
        "SequenceClassification",
        lambda m: RewardTrainer(
            model=AutoModelForCausalLM.from_pretrained(m),
            train_dataset=[{"chosen": "a", "rejected": "b"}] * 64,
        ),
    ),
    "no reward": (
        RewardError,
        "No reward",
        lambda m: GRPOTrainer(
            model=m,
            reward_funcs=[],
            train_dataset=PROMPTS,
            args=GRPOConfig(num_generations=8, max_completion_length=4),
        ),
    ),
    "a length below 1": (
        ConfigError,
        "SFTConfig.max_length must be at least 1, got -3",
        lambda m: SFTTrainer(model=m, train_dataset=ROWS, args=SFTConfig(max_length=-3)),
    ),
    "a temperature of 0": (
        ConfigError,
        "PPOConfig.temperature must be positive",
        lambda m: PPOConfig(temperature=0.0),
    ),
    "a min_p of 3": (
        ConfigError,
        "GRPOConfig.min_p must lie in",
        lambda m: GRPOConfig(min_p=3.0),
    ),
    "a top_p above 1": (
        ConfigError,
        "GRPOConfig.top_p must lie in",
        lambda m: GRPOConfig(top_p=1.5),
    ),
    "a directory without a model": (
        MissingFileError,
        "has no config.json",
        lambda m: SFTTrainer(model=str(Path().absolute()), train_dataset=ROWS),
    ),
    "a token that the model does not have": (
        DataError,
        "has token 100000, the model 0 to",
        lambda m: SFTTrainer(model=m, train_dataset=[{"input_ids": [1, 2, 100_000]}] * 8),
    ),
    "a prompt's token that the model does not have": (
        DataError,
        "has token 100000, the model 0 to",
        lambda m: GRPOTrainer(
            model=m, reward_funcs=length, train_dataset=[{"input_ids": [1, 100_000]}] * 8
        ),
    ),
    "an evaluation without a set": (
        ConfigError,
        "eval_strategy='steps' needs an eval_dataset",
        lambda m: SFTTrainer(model=m, train_dataset=ROWS, args=SFTConfig(eval_strategy="steps")),
    ),
    "callbacks that are no list": (
        ConfigError,
        "callbacks must be a list, got int",
        lambda m: SFTTrainer(model=m, train_dataset=ROWS, callbacks=5),
    ),
    "a callback without an event": (
        ConfigError,
        "none of the methods on_init_end",
        lambda m: SFTTrainer(model=m, train_dataset=ROWS, callbacks=[object()]),
    ),
    "no tokenizer": (
        ConfigError,
        "processing_class must be a tokenizer",
        lambda m: SFTTrainer(model=m, train_dataset=ROWS, processing_class=5),
    ),
    "an unknown model": (
        MissingFileError,
        "no-such",
        lambda m: SFTTrainer(model="./no-such", train_dataset=ROWS),
    ),
    "an optimizer that is not there": (
        ConfigError,
        "adamw",
        lambda m: SFTTrainer(model=m, train_dataset=ROWS * 8, args=SFTConfig(optim="adamww")),
    ),
    "the other's ref model": (
        ModelError,
        "DPOTrainer",
        lambda m: DPOTrainer(
            model=m,
            ref_model=object(),
            train_dataset=[{"prompt": "a", "chosen": "b", "rejected": "c"}] * 64,
            args=DPOConfig(),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_a_named_error(case: str, glassllm: str) -> None:
    error, words, call = CASES[case]
    with pytest.raises(error, match=words):
        call(glassllm)
    assert not list(Path().glob("*/metrics.jsonl")), "training began"


def test_a_tokenizer_may_be_given_by_path(glassllm: str) -> None:
    trainer = SFTTrainer(model=glassllm, train_dataset=ROWS * 8, processing_class=glassllm)
    assert trainer.processing_class("Alice") == SFTTrainer(
        model=glassllm, train_dataset=ROWS * 8
    ).processing_class("Alice")


def test_a_foreign_token_in_a_stream_is_named_when_it_comes(glassllm: str) -> None:
    rows = [*[{"input_ids": [1, 2]}] * 8, {"input_ids": [1, 100_000]}] * 8
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = SFTTrainer(model=glassllm, train_dataset=stream, args=SFTConfig(max_steps=2))
    with pytest.raises(DataError, match="has token 100000"):
        trainer.train()


@pytest.mark.parametrize(
    ("field", "value"),
    [("optim", "adamww"), ("lr_scheduler_type", "cosin"), ("report_to", "tensorbord")],
)
def test_a_name_in_the_config_is_checked_before_the_model_is_read(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match="Did you mean"):
        SFTTrainer(model="./no-such", train_dataset=ROWS, args=SFTConfig(**{field: value}))


def test_a_reward_function_of_the_wrong_length_is_named(glassllm: str) -> None:
    trainer = GRPOTrainer(
        model=glassllm,
        reward_funcs=lambda completions, **_: [1.0],
        args=GRPOConfig(output_dir="grpo", num_generations=8, max_completion_length=4, max_steps=1),
        train_dataset=PROMPTS,
    )
    with pytest.raises(RewardError, match="returned 1 rewards"):
        trainer.train()
