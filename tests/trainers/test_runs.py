"""What a run promises: the trained model comes out, resumed runs are bitwise the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf import (
    AutoModelForCausalLM,
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    SFTConfig,
    SFTTrainer,
)

Rows = list[dict[str, Any]]


def leaves(model: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.params)]


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


def sft(model: Any, texts: Rows, **changes: Any) -> SFTTrainer:
    fields = {
        "output_dir": "sft",
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return SFTTrainer(model=model, args=SFTConfig(**(fields | changes)), train_dataset=texts)


def test_training_learns_and_the_saved_model_is_the_trained_one(glassllm: str, texts: Rows) -> None:
    trainer = sft(glassllm, texts, max_steps=8, eval_strategy="no")
    before = trainer.evaluate(texts)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(texts)["eval_loss"]
    assert after < before - 0.5
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained("sft/model")
    assert same(again, trainer.model)
    ids = np.asarray(again.tokenizer("Alice was")["input_ids"])[None]
    both = [model.generate(ids, max_new_tokens=8) for model in (again, trainer.model)]
    np.testing.assert_array_equal(*both)


def test_a_resumed_sft_run_is_bitwise_the_same(
    glassllm: str, texts: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    whole = sft(glassllm, texts, output_dir="whole")
    whole.train()
    sft(
        glassllm,
        texts,
        output_dir="cut",
        save_strategy="steps",
        save_steps=2,
    ).train()
    newest = sorted(Path("cut").glob("checkpoint-*"))[0]
    assert newest.name == "checkpoint-2"
    resumed = sft(glassllm, texts, output_dir="cut")
    resumed.train(resume_from_checkpoint=newest)
    assert same(whole.model, resumed.model)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert not [r for r in caplog.records if "other values of" in r.getMessage()]
    elsewhere = sft(glassllm, texts[1:], output_dir="cut")
    elsewhere.train(resume_from_checkpoint=newest)
    assert [r for r in caplog.records if "other values of train_rows;" in r.getMessage()]


def test_ppo_resumed_in_the_middle_of_a_rollout_is_bitwise_the_same(
    glassllm: str, prompts: Rows
) -> None:
    def trainer(**changes: Any) -> PPOTrainer:
        fields = {
            "output_dir": "ppo",
            "batch_size": 16,
            "response_length": 8,
            "max_steps": 4,
            "num_ppo_epochs": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "adap_kl_ctrl": True,
        }
        return PPOTrainer(
            model=glassllm,
            args=PPOConfig(**(fields | changes)),
            train_dataset=prompts,
            reward_model=lambda completions, **_: [float(len(c)) for c in completions],
        )

    whole = trainer(output_dir="whole")
    whole.train()
    trainer(output_dir="cut", save_strategy="steps", save_steps=2).train()
    resumed = trainer(output_dir="cut")
    resumed.train(resume_from_checkpoint="cut/checkpoint-2")  # step 2 of 3 of the first rollout
    assert same(whole.model, resumed.model)


def test_the_reference_of_dpo_stays_what_it_was(glassllm: str, hh: Rows) -> None:
    model = AutoModelForCausalLM.from_pretrained(glassllm)
    start = leaves(model)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir="dpo",
            per_device_train_batch_size=1,
            max_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=hh,
    )
    trainer.train()
    kept = [np.asarray(x) for x in jax.tree.leaves(trainer._reference)]
    assert all(np.array_equal(a, b) for a, b in zip(start, kept, strict=True))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert not same(model, AutoModelForCausalLM.from_pretrained(glassllm))


def test_frozen_layers_do_not_move(glassllm: str, texts: Rows) -> None:
    trainer = sft(glassllm, texts, num_layers_unfrozen=1, max_steps=2)
    start = jax.tree.map(np.asarray, trainer.model.params)
    trainer.train()
    end = trainer.model.params
    for name in ("embed", "trunk"):
        pairs = zip(jax.tree.leaves(start[name]), jax.tree.leaves(end[name]), strict=True)
        assert all(np.array_equal(a, np.asarray(b)) for a, b in pairs)
    moved = zip(jax.tree.leaves(start["layers"]), jax.tree.leaves(end["layers"]), strict=True)
    assert all(not np.array_equal(a, np.asarray(b)) for a, b in moved)


def test_accumulation_and_mesh_give_the_same_update(glassllm: str, texts: Rows) -> None:
    def update(**changes: Any) -> list[np.ndarray]:
        trainer = sft(
            glassllm,
            texts,
            max_steps=1,
            optim="sgd",
            learning_rate=10.0,  # updates far above the rounding of the weights
            max_grad_norm=0.0,
            **changes,
        )
        start = leaves(trainer.model)
        trainer.train()
        return [a - b for a, b in zip(leaves(trainer.model), start, strict=True)]

    plain = update(per_device_train_batch_size=2)
    for other in (
        update(gradient_accumulation_steps=2),
        update(mesh="fsdp=4,tensor=2", per_device_train_batch_size=4),
    ):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(a).max(), 1e-9))
