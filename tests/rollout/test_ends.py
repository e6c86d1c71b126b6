"""Which tokens end a completion: a checkpoint's, a config's, a tokenizer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from jrlhf import AutoModelForCausalLM
from jrlhf.trainers.online import eos_ids
from tests.models.conftest import CONFIG, tensors_of, write_hf
from tests.rollout.conftest import EOS, word_tokenizer

SIZES = {key: CONFIG[key] for key in CONFIG if key not in ("architectures", "eos_token_id")}
TOKENIZER = word_tokenizer([f"w{i}" for i in range(3, CONFIG["vocab_size"])])


def ends_of(config: Any) -> list[int]:
    return eos_ids(AutoModelForCausalLM.from_config(config), TOKENIZER)


def test_a_checkpoints_ids_count_beside_the_tokenizers(tmp_path: Path) -> None:
    config = {**SIZES, "eos_token_id": [9, 7]}
    model = AutoModelForCausalLM.from_pretrained(write_hf(tmp_path, config, tensors_of(config)))
    assert eos_ids(model, TOKENIZER) == [9, 7, EOS]


def test_the_id_of_a_config_alone_is_no_word_of_the_tokenizer() -> None:
    """LlamaConfig says 2 whatever is tokenized; a config that knows the tokenizer's id is heard."""
    assert ends_of(LlamaConfig(**SIZES, eos_token_id=5)) == [EOS]
    assert ends_of({**SIZES, "eos_token_id": [9, EOS]}) == [9, EOS]
    assert ends_of({**SIZES, "eos_token_id": None}) == [EOS]


@pytest.mark.parametrize("row", [[1, 2, 3], [4]])
def test_no_id_lies_beyond_a_small_vocabulary(row: list[int]) -> None:
    """GPT2Config says 50256."""
    config = GPT2Config(vocab_size=11, n_embd=8, n_head=2, n_layer=1, n_positions=16)
    assert config.eos_token_id >= config.vocab_size
    model = AutoModelForCausalLM.from_config(config)
    assert model.eos_token_ids == []
    made = model.generate([[0] * 3, [0] * (3 - len(row)) + row], max_new_tokens=4)
    assert made.shape == (2, 7)
    assert made.max() < config.vocab_size
