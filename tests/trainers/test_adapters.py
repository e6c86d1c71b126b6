"""Training adapters: nothing but the adapter moves, its size is the optimizer's, resumed runs are
bitwise the same, and the base is the reference for free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf import (
    AutoModelForCausalLM,
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
from jrlhf.errors import ConfigError, ModelError
from jrlhf.peft import LoraConfig, PeftModel, get_peft_model
from jrlhf.trainers.adapters import dropout_seed, say_once
from tests.rollout.conftest import word_tokenizer

DEVICES = jax.device_count()
WORDS = [f"w{i}" for i in range(40)]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
FIELDS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.3)
STILL = LORA.replace(lora_dropout=0.0)


def base(kind: Any = AutoModelForCausalLM, **choices: Any) -> Any:
    return kind.from_config(CONFIG, tokenizer=word_tokenizer(WORDS), **choices)


def text(seed: int, words: int = 6) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def pairs() -> list[dict[str, str]]:
    return [{"prompt": text(i, 3), "chosen": text(i + 50), "rejected": text(i + 99)}
            for i in range(16)]  # fmt: skip


def host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def same(one: Any, other: Any) -> bool:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def without_adapters(params: Any) -> Any:
    return {name: leaf for name, leaf in params.items() if name != "adapters"}


def sft(model: Any = None, peft_config: Any = LORA, **changes: Any) -> SFTTrainer:
    return SFTTrainer(
        model=model or base(),
        args=SFTConfig(**{"output_dir": "sft", **FIELDS, **changes}),
        train_dataset=[{"text": text(i, 8)} for i in range(16)],
        peft_config=peft_config,
    )


def test_training_moves_the_adapter_alone_and_saves_it() -> None:
    model = base()
    before = host(model.params)
    trainer = sft(model)
    start = host(trainer.model.params["adapters"])
    trainer.train()
    after = trainer.model.params
    assert same(before, host(without_adapters(after)))
    assert same(before, host(model.params))
    moved = zip(jax.tree.leaves(start), jax.tree.leaves(after["adapters"]), strict=True)
    assert all(not np.array_equal(a, b) for a, b in moved)

    # Two float32 moments of each number of the adapter, and a few counters.
    state = trainer._loop.state
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (start, state.opt_state)]
    assert 2 * sizes[0] <= sizes[1] <= 2 * sizes[0] + 8
    assert sizes[0] == trainer.model.get_nb_trainable_parameters()[0]

    trainer.save_model()
    assert {p.name for p in Path("sft/model").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"
    }  # fmt: skip
    assert not Path("sft/model/model.safetensors").exists()
    again = PeftModel.from_pretrained(model, "sft/model")
    assert same(host(again.params), host(after))


def test_a_resumed_run_with_dropout_is_bitwise_the_same() -> None:
    whole = sft(output_dir="whole")
    whole.train()
    sft(output_dir="cut", save_strategy="steps", save_steps=2).train()
    resumed = sft(output_dir="cut")
    resumed.train(resume_from_checkpoint="cut/checkpoint-2")
    assert same(host(whole.model.params), host(resumed.model.params))
    held = sum(p.stat().st_size for p in Path("cut/checkpoint-2/state").rglob("*") if p.is_file())
    assert held < 200_000, "a checkpoint holds the adapter's state, not the base"
    assert "lora_alpha" in Path("cut/checkpoint-2/config.json").read_text()


def test_dropout_acts_in_training_alone_and_no_split_of_the_batch_changes_it() -> None:
    def loss(peft_config: LoraConfig, **changes: Any) -> Any:
        trainer = sft(peft_config=peft_config, max_steps=1, learning_rate=0.0, **changes)
        return trainer, trainer.train().training_loss

    chosen = LORA.replace(init_lora_weights=False)
    trainer, plain = loss(
        chosen.replace(lora_dropout=0.0), per_device_train_batch_size=16 // DEVICES
    )
    _, dropped = loss(chosen, per_device_train_batch_size=16 // DEVICES)
    _, split = loss(chosen, per_device_train_batch_size=8 // DEVICES, gradient_accumulation_steps=2)
    assert abs(plain - dropped) > 1e-3
    assert dropped == pytest.approx(split, rel=1e-6)
    rows = [{"text": text(i, 8)} for i in range(16)]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(plain, rel=1e-6)


def dpo(model: Any, **more: Any) -> DPOTrainer:
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir="dpo", **FIELDS),
        train_dataset=pairs(),
        **more,
    )
    trainer.train()
    return trainer


def test_dpo_against_the_base_for_free_equals_dpo_against_an_explicit_copy() -> None:
    free = dpo(base(), peft_config=STILL)
    assert free._reference == {}, "the reference holds no array of its own"
    explicit = dpo(base(), peft_config=STILL, ref_model=base())
    logs = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (free, explicit)]
    assert logs[0][0] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(logs[0][-1] - logs[0][0]) > 1e-3
    assert logs[0] == logs[1]
    assert same(host(free.model.params), host(explicit.model.params))


def test_a_trained_adapter_is_its_own_reference_when_training_goes_on() -> None:
    start = get_peft_model(base(), STILL.replace(init_lora_weights=False))
    trainer = dpo(start)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_where_dropout_is_turned_off_it_is_said() -> None:
    model = get_peft_model(base(), LORA)
    assert dropout_seed(model, 3, wanted=True) == 3
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="lora_dropout changes nothing here"):
        assert dropout_seed(model, 3, wanted=False) is None
    assert dropout_seed(get_peft_model(base(), STILL), 3, wanted=False) is None
    assert DPOConfig().disable_dropout
    assert RewardConfig().disable_dropout
    assert not GRPOConfig().disable_dropout


def test_rewards_train_an_adapter_and_the_score() -> None:
    model = base(AutoModelForSequenceClassification, num_labels=1)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir="reward", **FIELDS),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    )
    trainer.train()
    assert not np.array_equal(
        trainer.model.params["adapters"]["default"]["score"]["kernel"],
        model.params["score"]["kernel"],
    )
    trainer.save_model()
    again = PeftModel.from_pretrained(model, "reward/model")
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(again(ids).logits, trainer.model(ids).logits)


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def test_grpo_and_ppo_sample_from_the_adapter_and_score_the_base() -> None:
    prompts = [{"prompt": text(i, 3)} for i in range(16)]
    grpo = GRPOTrainer(
        model=base(),
        reward_funcs=rewards,
        args=GRPOConfig(output_dir="grpo", num_generations=4, max_completion_length=6, beta=0.1,
                        **FIELDS | {"max_steps": 2, "learning_rate": 0.1,
                                    "per_device_train_batch_size": max(1, 8 // DEVICES)}),
        train_dataset=prompts,
        peft_config=LORA,
    )  # fmt: skip
    grpo.train()
    ppo = PPOTrainer(
        model=base(),
        args=PPOConfig(output_dir="ppo", batch_size=8, response_length=6, num_ppo_epochs=2,
                       **FIELDS | {"max_steps": 4, "learning_rate": 0.1}),
        train_dataset=prompts,
        reward_model=rewards,
        peft_config=STILL,
    )  # fmt: skip
    ppo.train()
    for trainer, kl in ((grpo, "kl"), (ppo, "objective/kl")):
        logs = [e for e in trainer.state.log_history if kl in e]
        # Rollouts score the reference: at first the policy is its base, then no longer.
        assert logs[0][kl] == pytest.approx(0, abs=1e-6)
        assert abs(logs[-1][kl]) > 1e-6
        key = "sampling/sampling_logp_difference/max"
        assert all(e[key] <= 1e-5 for e in logs if key in e)
    assert ppo.state.log_history[0]["val/ratio"] == 1.0
    ppo.save_model()
    assert (Path("ppo/model") / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ConfigError, "num_layers_unfrozen=1", lambda: sft(num_layers_unfrozen=1)),
        (ConfigError, "has an adapter already", lambda: sft(get_peft_model(base(), LORA))),
        (ConfigError, 'Did you mean "q_proj"',
         lambda: sft(peft_config=LoraConfig(target_modules=["q_prj"]))),
        (ConfigError, "task_type must be 'CAUSAL_LM'",
         lambda: sft(peft_config=LoraConfig(task_type="SEQ_CLS"))),
        (ConfigError, "must be a LoraConfig", lambda: sft(peft_config=3)),
        (ModelError, "no active adapter", lambda: sft(PeftModel(base()), peft_config=None)),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_before_anything_is_compiled(
    error: type[Exception], match: str, call: Any
) -> None:
    with pytest.raises(error, match=match):
        call()
