"""Which tokens end a completion: a checkpoint's, a config's, a tokenizer's."""

from __future__ import annotations

import json
import tempfile
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
    """In rollouts, in `generate`, and in both of what was saved."""
    model = AutoModelForCausalLM.from_config(config, tokenizer=TOKENIZER)
    ends = eos_ids(model, TOKENIZER)
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(out)
        again = AutoModelForCausalLM.from_pretrained(out)
    for found in (model.eos_token_ids, again.eos_token_ids, eos_ids(again, TOKENIZER)):
        assert sorted(found) == sorted(ends)
    without = AutoModelForCausalLM.from_config(config)
    assert eos_ids(without, TOKENIZER) == ends
    return ends


def test_a_checkpoints_ids_count_beside_the_tokenizers(tmp_path: Path) -> None:
    config = {**SIZES, "eos_token_id": [9, 7]}
    model = AutoModelForCausalLM.from_pretrained(write_hf(tmp_path, config, tensors_of(config)))
    assert eos_ids(model, TOKENIZER) == [9, 7, EOS]


def test_the_id_of_a_config_alone_is_no_word_of_the_tokenizer() -> None:
    """LlamaConfig says 2 whatever is tokenized; a config that knows the tokenizer's id is heard."""
    assert ends_of(LlamaConfig(**SIZES, eos_token_id=5)) == [EOS]
    assert ends_of({**SIZES, "eos_token_id": [9, EOS]}) == [9, EOS]
    assert ends_of({**SIZES, "eos_token_id": (9, EOS)}) == [9, EOS]
    assert ends_of({**SIZES, "eos_token_id": -1}) == [EOS]
    assert ends_of({**SIZES, "eos_token_id": None}) == [EOS]


def test_beside_a_tokenizer_without_an_end_a_config_alone_has_none() -> None:
    tokenizer = word_tokenizer([f"w{i}" for i in range(3, CONFIG["vocab_size"])])
    tokenizer.eos_token = None
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), tokenizer=tokenizer)
    assert model.eos_token_ids == eos_ids(model, tokenizer) == []


@pytest.mark.parametrize(
    ("before", "generation", "after", "ends"),
    [
        (5, None, EOS, [EOS, 5]),
        (EOS, None, EOS, [EOS]),
        (5, [5, 9], EOS, [EOS, 5, 9]),
        ([9, 7], [9, 7], [EOS, 9, 7], [EOS, 9, 7]),
        ([9, EOS], [9, EOS], [9, EOS], [9, EOS]),
        (None, None, EOS, [EOS]),
    ],
)
def test_configs_take_up_the_special_tokens_of_a_tokenizer_that_is_given(
    tmp_path: Path, before: Any, generation: Any, after: Any, ends: list[int]
) -> None:
    """As transformers' Trainer does: a chat's new end stops generation wherever it is loaded."""
    config = {**SIZES, "eos_token_id": before, "bos_token_id": 11, "pad_token_id": 12}
    origin = write_hf(tmp_path / "a", config, tensors_of(config))
    if generation is not None:
        (origin / "generation_config.json").write_text(
            json.dumps({"eos_token_id": generation, "top_p": 0.9, "pad_token_id": 12})
        )
    model = AutoModelForCausalLM.from_pretrained(origin)
    model.save_pretrained(tmp_path / "b", tokenizer=TOKENIZER)
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["eos_token_id"] == after
    assert (saved["bos_token_id"], saved["pad_token_id"]) == (1, 0)
    written = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert (written["bos_token_id"], written["pad_token_id"]) == (1, 0)
    assert written.get("top_p") == (None if generation is None else 0.9)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").eos_token_ids == ends
    # Saved by itself a checkpoint says what it said.
    model.save_pretrained(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "config.json").read_text())["eos_token_id"] == before
    assert model.source.config["eos_token_id"] == before


@pytest.mark.parametrize("row", [[1, 2, 3], [4]])
def test_no_id_lies_beyond_a_small_vocabulary(row: list[int], tmp_path: Path) -> None:
    """GPT2Config says 50256."""
    config = GPT2Config(vocab_size=11, n_embd=8, n_head=2, n_layer=1, n_positions=16)
    assert config.eos_token_id >= config.vocab_size
    model = AutoModelForCausalLM.from_config(config)
    assert model.eos_token_ids == []
    made = model.generate([[0] * 3, [0] * (3 - len(row)) + row], max_new_tokens=4)
    assert made.shape == (2, 7)
    assert made.max() < config.vocab_size
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).eos_token_ids == []
