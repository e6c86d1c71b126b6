"""What is measured: one tiny-Llama checkpoint and random texts, the same files for everyone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the batches it is trained on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    rows: int
    length: int


# 28 million parameters: large enough that matmuls matter, small enough for two cores.
FULL = Size(layers=8, hidden=512, heads=8, kv_heads=4, ffn=1408, vocab=8192, rows=8, length=256)
QUICK = Size(layers=2, hidden=128, heads=4, kv_heads=2, ffn=352, vocab=1024, rows=4, length=64)


def write_checkpoint(directory: Path, size: Size) -> Path:
    """Random weights as transformers draws them, and a tokenizer with one token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
    words |= {f"w{i}": i for i in range(4, size.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=2048,
    ).save_pretrained(directory)  # fmt: skip
    return directory


class Texts:
    """Random texts of an exact number of tokens."""

    def __init__(self, size: Size, *, seed: int = 0) -> None:
        self._random, self._size = np.random.default_rng(seed), size

    def words(self, count: int) -> str:
        ids = self._random.integers(4, self._size.vocab, count)
        return " ".join(f"w{i}" for i in ids)

    def language_rows(self, count: int) -> list[dict[str, str]]:
        """Texts of `length` tokens, the EOS that trainers append included."""
        return [{"text": self.words(self._size.length - 1)} for _ in range(count)]

    def preference_rows(self, count: int) -> list[dict[str, str]]:
        """A quarter prompt, the rest answer, `length` tokens with the EOS."""
        prompt = self._size.length // 4
        answer = self._size.length - prompt - 1
        return [
            {
                "prompt": self.words(prompt),
                "chosen": " " + self.words(answer),
                "rejected": " " + self.words(answer),
            }
            for _ in range(count)
        ]

    def prompt_rows(self, count: int, length: int) -> list[dict[str, str]]:
        return [{"prompt": self.words(length)} for _ in range(count)]


def dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(rows)
