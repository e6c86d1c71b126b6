"""An encoder with a tokenizer of its own as the reward of a policy, and as a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrlhf import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
)
from jrlhf.commands.scoring import rewards_of
from jrlhf.errors import ModelError
from jrlhf.rollout.engine import Completion
from jrlhf.rollout.reward_model import RewardModel
from tests.models.conftest import tensors_of, write_hf
from tests.trainers.conftest import TEXTS

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
WIDTH = 192
CONFIG: dict[str, Any] = {
    "model_type": "deberta-v2",
    "vocab_size": 130,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": WIDTH,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "relative_attention": True,
    "position_buckets": 16,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "id2label": {"0": "LABEL_0"},
    "pad_token_id": 0,
}


def own_tokenizer() -> Any:
    """A small Unigram tokenizer that writes [CLS] and [SEP], as DeBERTa's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]",
    )  # fmt: skip


@pytest.fixture
def deberta(tmp_path: Path) -> str:
    """A model directory: weights, config and tokenizer."""
    tensors = tensors_of(CONFIG)
    for name in tensors:
        if name.endswith("LayerNorm.weight"):
            tensors[name] += 1
    path = write_hf(tmp_path / "deberta", CONFIG, tensors)
    own_tokenizer().save_pretrained(path)
    return str(path)


def read_alone(path: str, texts: list[str]) -> np.ndarray:
    """The scores of texts, through the model's public face and its own tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, padding="max_length", max_length=WIDTH, return_tensors="np")
    return np.asarray(model(batch["input_ids"], batch["attention_mask"]).logits)[:, 0]


def test_a_deberta_scores_a_ppo_rollout_by_the_text(
    glassllm: str, deberta: str, prompts: list[dict[str, str]]
) -> None:
    trainer = PPOTrainer(
        model=glassllm,
        reward_model=deberta,
        args=PPOConfig(
            output_dir="ppo", batch_size=16, response_length=8, max_steps=1, num_ppo_epochs=1,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", log_completions=True,
            num_completions_to_print=16,
        ),
        train_dataset=prompts,
    )  # fmt: skip
    trainer.train()
    lines = Path("ppo/completions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [row["prompt"] + row["completion"] for row in rows]
    assert len(rows) == 16
    assert len({row["reward"] for row in rows}) > 4
    np.testing.assert_allclose(
        [row["reward"] for row in rows], read_alone(deberta, texts), rtol=0, atol=1e-4
    )


def test_a_reward_model_with_its_own_tokenizer_is_shown_text_by_the_verbs(
    glassllm: str, deberta: str
) -> None:
    tokenizer = AutoModelForCausalLM.from_pretrained(glassllm).tokenizer
    model = AutoModelForSequenceClassification.from_pretrained(deberta)
    judge = RewardModel(
        model.net, model.params, model.tokenizer, policy_tokenizer=tokenizer, rows=4
    )
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:3]]
    done = [Completion(row[3:], [], False, tokenizer.decode(row[3:])) for row in ids]
    found = rewards_of(judge, tokenizer, [row[:3] for row in ids], done)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    np.testing.assert_allclose(found, read_alone(deberta, texts), rtol=0, atol=1e-4)
    # Also with one tokenizer for both: the ids of a rollout have no [CLS] to stand on.
    same = RewardModel(
        model.net, model.params, model.tokenizer, policy_tokenizer=model.tokenizer, rows=4
    )
    assert not same.reads_ids


def test_an_encoder_learns_to_prefer_and_is_saved_whole(
    deberta: str, hh: list[dict[str, str]]
) -> None:
    trainer = RewardTrainer(
        model=deberta,
        args=RewardConfig(
            output_dir="reward", per_device_train_batch_size=1, max_steps=12, learning_rate=3e-3,
            logging_steps=1, save_strategy="no", num_layers_unfrozen=1,
        ),
        train_dataset=hh,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2
    trainer.save_model()
    texts = [row["chosen"] for row in hh[:4]]
    ids = trainer.processing_class(
        texts, padding="max_length", max_length=WIDTH, return_tensors="np"
    )
    live = trainer.model(ids["input_ids"], ids["attention_mask"]).logits[:, 0]
    np.testing.assert_allclose(read_alone("reward/model", texts), live, rtol=0, atol=1e-5)


def test_an_encoder_is_no_value_model(
    glassllm: str, deberta: str, prompts: list[dict[str, str]]
) -> None:
    with pytest.raises(ModelError, match="value_model is an encoder"):
        PPOTrainer(
            model=glassllm,
            reward_model=deberta,
            value_model=deberta,
            args=PPOConfig(output_dir="ppo", batch_size=16, max_steps=1, response_length=8),
            train_dataset=prompts,
        )
