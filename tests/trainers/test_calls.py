"""The calls that users write, as they stand; on eight devices, since tests have so many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardTrainer,
    SFTTrainer,
)

Rows = list[dict[str, Any]]


def reward_len(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def logged(directory: str) -> Rows:
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def finite(trainer: Any, steps: int) -> None:
    assert trainer.state.global_step == steps
    assert all(np.isfinite(x).all() for x in map(np.asarray, jax.tree.leaves(trainer.model.params)))


def test_sft_on_columns_text_and_label(glassllm: str, texts: Rows) -> None:
    dataset = texts * 4
    trainer = SFTTrainer(model=glassllm, train_dataset=dataset)
    output = trainer.train()
    finite(trainer, 3)
    assert output.global_step == 3
    assert output.training_loss > 0
    assert logged("glassllm-SFT")[-1]["step"] == 3


def test_reward_on_columns_chosen_and_rejected(glassllm: str, hh: Rows) -> None:
    dataset = hh * 4
    trainer = RewardTrainer(model=glassllm, train_dataset=dataset)
    trainer.train()
    finite(trainer, 3)


def test_dpo_with_tokenizer_and_beta(glassllm: str, hh: Rows) -> None:
    model = AutoModelForCausalLM.from_pretrained(glassllm)
    tokenizer, dataset = model.tokenizer, {"train": hh * 4}
    with pytest.warns(DeprecationWarning, match="tokenizer is now processing_class"):
        trainer = DPOTrainer(
            model=model, tokenizer=tokenizer, beta=0.1, train_dataset=dataset["train"]
        )
    assert trainer.args.beta == 0.1
    trainer.train()
    finite(trainer, 3)
    # At the first step the policy is its own reference, and its loss is log 2.
    first = trainer.state.log_history[0]
    assert "rewards/margins" in first or "train_loss" in first


def test_grpo_with_vllm_fields(glassllm: str, prompts: Rows, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="its own engine"):
        trainer = GRPOTrainer(
            model=glassllm,
            reward_funcs=reward_len,
            args=GRPOConfig(
                output_dir=str(tmp_path / "grpo"),
                logging_steps=1,
                use_vllm=True,
                vllm_mode="colocate",
                vllm_tensor_parallel_size=1,
                vllm_gpu_memory_utilization=0.3,
                max_prompt_length=512,
                max_completion_length=1024,
                max_steps=2,
                num_generations=4,
                num_train_epochs=1,
                per_device_train_batch_size=4,
                push_to_hub=False,
                report_to=None,
            ),
            train_dataset=prompts,
        )
    trainer.train()
    finite(trainer, 2)
    rows = logged(str(tmp_path / "grpo"))
    assert {"reward", "reward_std", "rewards/reward_len/mean", "completions/mean_length"} <= set(
        rows[0]
    )
    assert rows[1]["compiles"] == 0, "the second step compiled something"


def test_ppo_of_every_age(glassllm: str, hh: Rows) -> None:
    model = AutoModelForCausalLM.from_pretrained(glassllm)
    reward_model = AutoModelForSequenceClassification.from_pretrained(glassllm, num_labels=1)
    dataset = [{k: v[:60] for k, v in row.items()} for row in hh]
    with pytest.warns(DeprecationWarning, match="log_with is now report_to"):
        config = PPOConfig(learning_rate=1.41e-5, log_with="tensorboard", batch_size=16)
    with pytest.warns(DeprecationWarning, match="dataset is now train_dataset"):
        trainer = PPOTrainer(
            model=model,
            tokenizer=model.tokenizer,
            config=config,
            dataset=dataset,
            reward_model=reward_model,
        )
    trainer.train()
    finite(trainer, 12)  # 3 epochs over 16 prompts, 4 passes over each rollout
    assert list(Path("glassllm-PPO").rglob("events.out.tfevents.*"))
    assert trainer.state.log_history[0]["val/ratio"] > 0


def test_ppo_with_a_reward_model_of_another_tokenizer(glassllm: str, prompts: Rows) -> None:
    from tests.rollout.conftest import word_tokenizer

    words = [w for row in prompts for w in row["prompt"].split()]
    tokenizer = word_tokenizer(sorted(set(words)))
    config = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    }
    reward = AutoModelForSequenceClassification.from_config(
        config, num_labels=1, tokenizer=tokenizer
    )
    trainer = PPOTrainer(
        model=glassllm,
        args=PPOConfig(
            batch_size=8,
            response_length=6,
            max_steps=1,
            num_ppo_epochs=1,
            output_dir="ppo",
            logging_steps=1,
        ),
        train_dataset=prompts,
        reward_model=reward,
    )
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["objective/scores"])


def test_first_ratio_is_exactly_one(glassllm: str, prompts: Rows) -> None:
    trainer = PPOTrainer(
        model=glassllm,
        args=PPOConfig(
            batch_size=16,
            response_length=8,
            max_steps=2,
            num_ppo_epochs=2,
            learning_rate=1e-3,
            output_dir="ppo",
            logging_steps=1,
        ),
        train_dataset=prompts,
        reward_model=lambda completions, **_: [float(len(c)) for c in completions],
    )
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["val/ratio"] == 1.0
    assert first["policy/approxkl_avg"] == 0.0
    assert first["policy/clipfrac_avg"] == 0.0
    assert second["val/ratio"] != 1.0
    # And that is no convention alone: the sampler's log-probs are the scorer's.
    assert first["sampling/sampling_logp_difference/max"] <= 1e-5
