"""Trainers of a tiny model, made in milliseconds: nothing is compiled until one is run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf import (
    AutoModelForCausalLM,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSequenceClassification,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from jrlhf.errors import ConfigError
from jrlhf.model import Model
from jrlhf.peft import LoraConfig
from jrlhf.sharding.mesh import make_mesh
from jrlhf.trainers.adapters import say_once
from tests.rollout.conftest import EOS, VOCAB, word_tokenizer

Rows = list[dict[str, Any]]

FACES: dict[str, tuple[type, type]] = {
    "sft": (SFTConfig, SFTTrainer),
    "reward": (RewardConfig, RewardTrainer),
    "dpo": (DPOConfig, DPOTrainer),
    "ppo": (PPOConfig, PPOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
}
OFFLINE, ONLINE = ("sft", "reward", "dpo"), ("ppo", "grpo")
CONTEXT = 64
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": EOS,
}
# What keeps the runs small; anything else has its default.
SMALL: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward": {},
    "dpo": {},
    "ppo": {"response_length": 4},
    "grpo": {"num_generations": 2, "max_completion_length": 4},
}
# Turns without a word between them.
PLAIN_CHAT = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"


def words(*numbers: int) -> str:
    return " ".join(f"w{3 + n % (VOCAB - 3)}" for n in numbers)


# Ten rows of which no two are alike: of 3 to 12 words, prompts of 2, answers of 1 to 3.
TEXTS: Rows = [{"text": words(*range(9 * i, 10 * i + 3))} for i in range(10)]
PROMPTS: Rows = [{"prompt": words(7 * i, 7 * i + 1)} for i in range(10)]
PAIRS: Rows = [
    {**row, "chosen": " " + words(*range(i, i + 1 + i % 3)), "rejected": " " + words(40 + i)}
    for i, row in enumerate(PROMPTS)
]
DATA = {"sft": TEXTS, "reward": PAIRS, "dpo": PAIRS, "ppo": PROMPTS, "grpo": PROMPTS}


def length_reward(completions: Sequence[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


class Bench:
    """Makes trainers.

    Attributes:
        path: a directory with the tiny language model and its tokenizer.
        tokenizer: of words w3, w4, … .
    """

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "tiny")
        self.tokenizer = word_tokenizer([f"w{i}" for i in range(3, VOCAB)])
        self.tokenizer.chat_template = PLAIN_CHAT
        mesh = make_mesh("data=1", devices=jax.devices()[:1])
        made = AutoModelForCausalLM.from_config(CONFIG, mesh=mesh, tokenizer=self.tokenizer)
        made.save_pretrained(self.path, tokenizer=self.tokenizer)
        value = AutoModelForCausalLMWithValueHead.from_pretrained(self.path, mesh=mesh)
        judge = AutoModelForSequenceClassification.from_pretrained(
            self.path, mesh=mesh, num_labels=1
        )
        self._models = {"sft": made, "dpo": made, "grpo": made, "ppo": value, "reward": judge}
        self._directory, self._number = directory, itertools.count()

    @functools.cached_property
    def experts(self) -> Model:
        """A model whose router wants to be balanced, with a weight of a quarter."""
        sizes = {"model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 2}
        config = {**CONFIG, **sizes, "num_hidden_layers": 1, "router_aux_loss_coef": 0.25}
        mesh = make_mesh("data=1", devices=jax.devices()[:1])
        return AutoModelForCausalLM.from_config(config, mesh=mesh, tokenizer=self.tokenizer)

    def model(self, face: str) -> Model:
        """A model for a trainer, on one device; a copy, for training may give its arrays away."""
        one = self._models[face]
        return Model(
            one.net, jax.tree.map(jnp.copy, one.params), source=one.source, mesh=one.mesh,
            name_or_path=self.path, tokenizer=self.tokenizer,
        )  # fmt: skip

    def trainer(
        self,
        face: str,
        *,
        by_name: bool = False,
        data: Any = None,
        given: Any = None,
        **fields: Any,
    ) -> Any:
        """A trainer; `given` are more of its arguments, `by_name` lets it load its model."""
        config, trainer = FACES[face]
        plain = {"per_device_train_batch_size": 2, "output_dir": self.directory()}
        reward = {"ppo": "reward_model", "grpo": "reward_funcs"}.get(face)
        arguments = {
            "model": self.path if by_name else self.model(face),
            "train_dataset": DATA[face] if data is None else data,
            **({reward: length_reward} if reward else {}),
            **(given or {}),
        }
        return trainer(args=config(**{**plain, **SMALL[face], **fields}), **arguments)

    def directory(self) -> str:
        """A directory that nobody else writes to."""
        return str(self._directory / f"run-{next(self._number)}")


def dropout_is_turned_off(bench: Bench, face: str) -> None:
    """With `disable_dropout` an adapter that asks for dropout is told that it gets none."""
    adapter = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"])

    def told(off: bool) -> bool:
        say_once.cache_clear()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            bench.trainer(face, disable_dropout=off, given={"peft_config": adapter})
        return any("lora_dropout changes nothing" in str(w.message) for w in heard)

    assert told(True)
    assert not told(False)


def router_is_balanced(bench: Bench, face: str) -> None:
    """The weight is the field's, else the model's own; a model without experts takes none.

    What it does to a loss is shown in tests/trainers/test_router_loss.py.
    """

    def weight(**fields: Any) -> float:
        given = {"model": bench.experts}
        return bench.trainer(face, given=given, **fields)._loss.keywords["balance"]

    assert weight() == 0.25
    assert weight(router_aux_loss_coef=0.5) == 0.5
    assert weight(router_aux_loss_coef=0.0) == 0.0
    assert bench.trainer(face)._loss.keywords["balance"] == 0.0
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0\.5 .* llama model has none"):
        bench.trainer(face, router_aux_loss_coef=0.5)


def first_rows(trainer: Any) -> list[tuple[int, ...]]:
    """The token ids of the first batch's rows (of the first rollout's prompts), in order."""
    source = trainer._loop.source
    if hasattr(source, "plan"):
        return [tuple(row["ids"]) for row in source._prompts(0)]
    batch = source.loader.batch(0)
    ids, lengths = batch["ids"], batch["lengths"]
    if ids.ndim == 3:
        ids, lengths = ids[:, 0], lengths[:, 0]
    return [tuple(row[:n].tolist()) for row, n in zip(ids, lengths, strict=True)]


def first_batch(trainer: Any) -> dict[str, np.ndarray]:
    """The first batch of an offline trainer, before it goes to the device."""
    return trainer._loop.source.loader.batch(0)


def declared(config: type) -> list[str]:
    """The names of a config's fields."""
    return [field.name for field in dataclasses.fields(config)]
