"""GGUF files whose metadata or table of tensors say what cannot be."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from jrlhf.errors import ModelError
from jrlhf.models.gguf_file import GGUFFile
from tests.models.conftest import tensors_of
from tests.models.gguf_cases import CONFIGS, write_gguf


def write_model(path, metadata, arch="llama", **options):
    write_gguf(
        path, CONFIGS[arch], tensors_of(CONFIGS[arch]), metadata=metadata, arch=arch, **options
    )
    return path


@pytest.mark.parametrize("alignment", [1, 7, 24, "32", True])
def test_an_alignment_that_none_can_be_is_a_named_error(tmp_path, alignment):
    path = write_model(tmp_path / "m.gguf", {"general.alignment": alignment})
    with pytest.raises(ModelError, match=f"alignment={alignment!r}, expected a power of two"):
        GGUFFile(path)


def moved(content, name, offset):
    """The file with another offset in its row: dimensions, their sizes, type, offset."""
    at = content.index(name) + len(name)
    (dimensions,) = struct.unpack_from("<I", content, at)
    at += 4 + 8 * dimensions + 4
    (before,) = struct.unpack_from("<Q", content, at)
    return content[:at] + struct.pack("<Q", offset(before)) + content[at + 8 :], before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: 0, "lies at offset 0, expected"),
        (lambda at: at - 32, "lies at offset .*, expected"),
        (lambda at: at + 4, "lies at offset .*general.alignment=32"),
        (lambda at: at + 32, "lies at offset .*, expected"),
    ],
)
def test_an_offset_that_lies_is_a_named_error(tmp_path, change, message):
    path = write_model(tmp_path / "m.gguf", {})
    content, _ = moved(path.read_bytes(), b"blk.1.ffn_up.weight", change)
    path.write_bytes(content + bytes(64))
    with pytest.raises(ModelError, match=message):
        GGUFFile(path)


def test_tensors_may_lie_in_another_order_than_their_rows(tmp_path):
    path = write_model(tmp_path / "m.gguf", {})
    names = ("blk.0.attn_k.weight", "blk.0.attn_v.weight")
    before = GGUFFile(path).tensors
    content, first = moved(path.read_bytes(), names[0].encode(), lambda at: at)
    content, second = moved(content, names[1].encode(), lambda at: first)
    path.write_bytes(moved(content, names[0].encode(), lambda at: second)[0])
    after = GGUFFile(path).tensors
    for one, other in (names, names[::-1]):
        np.testing.assert_array_equal(after[one].data, before[other].data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"),
        (b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"),
    ],
)
def test_a_name_that_is_there_twice_is_a_named_error(tmp_path, old, new):
    path = write_model(tmp_path / "m.gguf", {})
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ModelError, match=f"{new.decode()} twice"):
        GGUFFile(path)
