"""`generate` against transformers' own, on one tiny model and a left-padded batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrlhf.models.load import load_pretrained
from jrlhf.rollout.generate import generate_like_transformers
from tests.rollout.conftest import Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    path: Path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(path)
    net, params, _ = load_pretrained(str(path))
    return theirs, Model(net, params)


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.3, "min_new_tokens": 4}])
def test_greedy_arrays_equal_those_of_transformers(pair: Any, extra: dict[str, Any]) -> None:
    theirs, ours = pair
    draw = np.random.default_rng(4)
    ids = draw.integers(3, 61, (6, 9))
    mask = np.ones_like(ids)
    for row, start in enumerate([0, 3, 8, 1, 5, 0]):
        ids[row, :start], mask[row, :start] = 0, 0
    options = {
        "max_new_tokens": 12,
        "eos_token_id": [7, 11, 19, 23, 31],
        "pad_token_id": 0,
        **extra,
    }
    wanted = theirs.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, **options
    ).numpy()
    found = generate_like_transformers(ours.net, ours.params, ids, mask, **options)
    np.testing.assert_array_equal(found, wanted)
    assert (wanted[:, -1] == 0).any()  # some rows ended early


def test_dynamic_rope_generates_beyond_the_length_where_it_begins_to_grow(tmp_path: Path) -> None:
    torch.manual_seed(3)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        rope_parameters=rope, initializer_range=0.5, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    net, params, _ = load_pretrained(str(tmp_path))
    for length in (12, 20):
        # A new one each time: it remembers the longest text that it has read.
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        ids = np.random.default_rng(length).integers(3, 61, (1, length))
        wanted = theirs.generate(torch.tensor(ids), do_sample=False, max_new_tokens=12).numpy()
        found = generate_like_transformers(net, params, ids, max_new_tokens=12)
        np.testing.assert_array_equal(found, wanted)
