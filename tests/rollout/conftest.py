"""A tiny random policy, a classifier and a word tokenizer: everything that rollouts need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jrlhf.models.build import Net
from jrlhf.models.spec import DecoderSpec

VOCAB, PAD, BOS, EOS = 61, 0, 1, 2


class Model(NamedTuple):
    net: Net
    params: Any


def spec(**changes: Any) -> DecoderSpec:
    small = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 128,
    }
    return DecoderSpec(**{**small, **changes})


def model(seed: int = 0, **changes: Any) -> Model:
    """Weights large enough that distributions are far from uniform; drawn without compiling."""
    net = Net(spec(**changes))
    draw = np.random.default_rng(seed)

    def weight(path: Any, leaf: Any) -> jax.Array:
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jax.numpy.asarray(centre + 0.5 * draw.standard_normal(leaf.shape), "float32")

    return Model(net, jax.tree_util.tree_map_with_path(weight, net.abstract()))


@pytest.fixture(scope="session")
def policy() -> Model:
    return model(value_head=True)


@pytest.fixture(scope="session")
def classifier() -> Model:
    return model(1, head="classifier")


def word_tokenizer(words: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return word_tokenizer([f"w{i}" for i in range(3, VOCAB)])


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, VOCAB, size).tolist() for size in (5, 1, 9, 5, 12, 3)]


def padded(rows: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
    """Rows as a batch, with a token in the padding that is not the pad token."""
    ids = np.full((len(rows), width), 7, np.int32)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = row
    return {"ids": ids, "lengths": np.asarray([len(row) for row in rows], np.int32)}
