"""GPT-OSS as it is released: experts of four-bit floats, decoded part by part as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jrlhf.errors import MissingWeightError, ModelError, UnsupportedModelError
from jrlhf.models.hf.mxfp4 import decode
from jrlhf.models.hf.reader import read_json
from jrlhf.models.load import load_pretrained, open_checkpoint
from jrlhf.models.save import save_pretrained
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.place import params_shardings
from tests.models.conftest import Tensors, tensors_of, write_hf

GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 96,
    "sliding_window": 5,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
PACKED = GPT_OSS | {
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
}
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def plain(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers one by one, in float64, as (experts, inputs, outputs)."""
    experts, outputs, count, _ = blocks.shape
    out = np.zeros((experts, count * 32, outputs))
    for e, o, b in np.ndindex(experts, outputs, count):
        for i in range(32):
            byte = int(blocks[e, o, b, i // 2])
            code = byte >> 4 if i % 2 else byte & 15
            sign = -1.0 if code & 8 else 1.0
            value = sign * MAGNITUDES[code & 7] * 2.0 ** (int(scales[e, o, b]) - 127)
            out[e, b * 32 + i, o] = value
    return out


def pack(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The checkpoint with random codes for its experts, and the same with their numbers."""
    rng = np.random.default_rng(1)
    packed, numbers = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = numbers[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
        scales = rng.integers(120, 126, blocks.shape[:-1]).astype(np.uint8)
        packed |= {name + "_blocks": blocks, name + "_scales": scales}
        numbers[name] = plain(blocks, scales).astype(np.float32)
    return packed, numbers


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path, Tensors]:
    """Directories of a packed checkpoint and of what it stands for; the packed tensors."""
    packed, numbers = pack(tensors_of(GPT_OSS))
    return (
        write_hf(tmp_path / "packed", PACKED, packed, shards=3),
        write_hf(tmp_path / "plain", GPT_OSS, numbers),
        packed,
    )


def test_every_code_and_scale_is_the_number_that_the_format_says() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    scales = np.array([[[0, 1, 2, 60, 100, 120, 126, 127, 128, 129, 140, 180, 220, 240, 251, 252]]])
    got = decode(codes, scales.astype(np.uint8))
    np.testing.assert_array_equal(got[0, 0], plain(codes, scales)[0, :, 0].astype(np.float32))


def test_any_part_of_a_packed_tensor_can_be_read(checkpoint) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    packed = open_checkpoint(checkpoint[0])
    whole = packed.read(name, (slice(None),) * 3)
    assert whole.shape == packed.shapes[name] == (4, 64, 192)
    rng = np.random.default_rng(3)
    for shape in (whole.shape, (4, 64, 96, 2)):
        split = whole.reshape(shape)
        for _ in range(100):
            index = tuple(slice(*sorted(rng.integers(0, n + 1, 2))) for n in shape)
            np.testing.assert_array_equal(packed.read(name, index, shape), split[index])


@pytest.mark.parametrize("mesh", [None, "data=1,fsdp=4,tensor=2", "data=1,fsdp=2,tensor=4"])
def test_packed_experts_load_as_their_numbers_on_any_mesh(checkpoint, mesh) -> None:
    packed, numbers, _ = checkpoint
    place = None
    if mesh is not None:

        def place(net: Any, params: Any) -> Any:
            return params_shardings(net, params, make_mesh(mesh))

    _, got, _ = load_pretrained(packed, shardings=place)
    _, expected, _ = load_pretrained(numbers)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert mesh is None or any(not x.is_fully_replicated for x in jax.tree.leaves(got))


def test_they_are_saved_as_plain_weights(checkpoint, tmp_path: Path) -> None:
    net, params, source = load_pretrained(checkpoint[0])
    again = save_pretrained(tmp_path / "again", net, params, source=source, dtype="bfloat16")
    assert "quantization_config" not in read_json(again / "config.json")
    _, reloaded, _ = load_pretrained(again)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, reloaded, rounded)
    # Four-bit floats and their scales are exact in bfloat16.
    jax.tree.map(
        np.testing.assert_array_equal,
        reloaded["layers"]["mlp"]["down"]["kernel"],
        params["layers"]["mlp"]["down"]["kernel"],
    )


def test_halves_that_do_not_belong_together_are_named(checkpoint, tmp_path: Path) -> None:
    tensors = dict(checkpoint[2])
    name = "model.layers.1.mlp.experts.down_proj"
    cut = tensors | {name + "_scales": np.ascontiguousarray(tensors[name + "_scales"][..., :-1])}
    with pytest.raises(ModelError, match=rf"{name}_blocks has shape"):
        load_pretrained(write_hf(tmp_path / "cut", PACKED, cut))

    wrong = tensors | {name + "_scales": tensors[name + "_scales"].astype(np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"stored as F32; known: U8"):
        load_pretrained(write_hf(tmp_path / "wrong", PACKED, wrong))

    twice = tensors | {name: np.zeros((4, 96, 64), np.float32)}
    with pytest.raises(ModelError, match=rf"{name} both as MXFP4 and as plain weights"):
        load_pretrained(write_hf(tmp_path / "twice", PACKED, twice))

    del tensors[name + "_scales"]
    with pytest.raises(MissingWeightError) as caught:
        load_pretrained(write_hf(tmp_path / "half", PACKED, tensors))
    assert f"missing: {name}" in str(caught.value)
    assert f"unexpected: {name}_blocks" in str(caught.value)


@pytest.mark.parity
def test_logits_equal_those_of_transformers(checkpoint) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    # It decodes the experts by itself where it has no kernel for them.
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint[0],
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).double()
    ids = np.random.default_rng(2).integers(0, 61, (2, 17))
    with torch.no_grad():
        expected = oracle(torch.tensor(ids)).logits.numpy()
    net, params, _ = load_pretrained(checkpoint[0])
    got = np.asarray(net.logits(params, net.hidden(params, ids)))
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
