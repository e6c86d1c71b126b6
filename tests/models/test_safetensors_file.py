"""Safetensors headers that lie, and files cut short: each is named, none is believed."""

from __future__ import annotations

import json
import re
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from jrlhf.errors import ModelError, UnsupportedModelError
from jrlhf.models.hf import safetensors_file
from jrlhf.models.hf.safetensors_file import SafetensorsFile


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def pack(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"a": entry([2, 3], 0, 24), "b": entry([4], 24, 32, "BF16")}
# What is wrong -> (the file's bytes, what the error says).
LIES = {
    "offsets beyond the file": (pack({"a": entry([2], 0, 8)}, b"1234"), "end at byte"),
    "an offset at the end of all numbers": (
        pack({"a": entry([2], 2**63, 2**63 + 8)}, b"12345678"),
        "leaves a hole",
    ),
    "two tensors on the same bytes": (
        pack({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        "b begins at byte .* overlaps",
    ),
    "bytes that belong to none": (
        pack({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
        "b begins at byte .* hole",
    ),
    "more bytes than its shape needs": (pack({"a": entry([2], 0, 12)}, bytes(12)), "needs 8 bytes"),
    "fewer bytes than its shape needs": (
        pack({"a": entry([9, 9], 0, 12)}, bytes(12)),
        r"\[9, 9\], needs 324 bytes, and has 12",
    ),
    "a shape whose size overflows": (
        pack({"a": entry([2**33, 2**33], 0, 12)}, bytes(12)),
        "needs",
    ),
    "a negative size": (pack({"a": entry([-2, -2], 0, 16)}, bytes(16)), r"shape \[-2, -2\]"),
    "offsets the wrong way round": (pack({"a": entry([1], 4, 0)}, bytes(4)), "needs 4 bytes"),
    "a size that is no whole number": (pack({"a": entry([2.0], 0, 8)}, bytes(8)), r"\[2.0\]"),
    "a size that is a truth": (pack({"a": entry([True], 0, 4)}, bytes(4)), "True"),
    "an unknown type": (pack({"a": entry([1], 0, 4, "F33")}, bytes(4)), "dtype 'F33'"),
    "a type that is a list": (pack({"a": entry([1], 0, 4, ["F32"])}, bytes(4)), r"dtype \['F32'\]"),
    "a size beyond all floats": (pack({"a": entry([10**400], 0, 4)}, bytes(4)), "needs 4000"),
    "no type": (pack({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "dtype None"),
    "an entry that is none": (pack({"a": 7}), "dtype None"),
    "a header longer than the file": (struct.pack("<Q", 10**6) + b"{}", "1000000 bytes"),
    "a huge header": (struct.pack("<Q", 2**63) + b"{}", "is said to have 9223372036854775808"),
    "a header cut short": (pack(GOOD)[:40], "is said to have"),
    "a length cut short": (b"\x08\0\0", "3 bytes"),
    "nothing at all": (b"", "empty"),
    "no JSON": (pack(b"{,}"), "not a readable"),
    "no text": (pack(b"\xff\xfe{}"), "not a readable"),
    "a list": (pack(b"[]"), "expected an object"),
    "JSON too deep": (pack(b"[" * 200_000), "not a readable"),
    "a name twice": (pack(b'{"a":1,"a":2}'), "'a' twice"),
    "metadata that is no text": (pack({"__metadata__": {"n": 1}}), "__metadata__"),
    "bytes after the last tensor": (pack({"a": entry([1], 0, 4)}, bytes(5)), "the file at byte"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_header_is_a_named_error(tmp_path, case):
    content, message = LIES[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable") as caught:
        SafetensorsFile(file)
    assert re.search(message, str(caught.value))


def test_the_packages_reader_refuses_them_too(tmp_path):
    file = tmp_path / "model.safetensors"
    ours_alone = []
    for case, (content, _) in LIES.items():
        file.write_bytes(content)
        try:
            with safe_open(file, framework="np"):
                ours_alone.append(case)
        except (SafetensorError, OSError):
            pass
    assert set(ours_alone) <= {"a name twice"}


def test_what_is_flipped_in_a_header_is_refused_or_still_inside_the_file(tmp_path):
    file = tmp_path / "model.safetensors"
    content = pack(GOOD, bytes(range(32)))
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(content) - 32, 300):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        try:
            found = SafetensorsFile(file)
        except ModelError:
            refused += 1
            continue
        for name, stored in found.tensors.items():
            assert len(content) - 32 <= stored.start <= stored.stop <= len(content)
            if stored.dtype in ("F32", "BF16"):
                assert found.read(name, tuple(map(slice, stored.shape))).shape == stored.shape
    assert 100 < refused < 300


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_part_is_what_the_package_reads(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_BLOCK", 64)  # so that parts are read in several
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 7), "scalar": (), "none": (0, 3), "deep": (2, 3, 4), "flat": (1,)}
    shapes |= {"wide": (6, 40), "long": (90,)}
    tensors = {n: np.asarray(rng.normal(size=shape), dtype=dtype) for n, shape in shapes.items()}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    ours = SafetensorsFile(file)
    assert {name: stored.shape for name, stored in ours.tensors.items()} == shapes
    for name, value in load_file(file).items():
        for _ in range(10):
            cuts = [sorted(rng.integers(0, n + 1, 2)) for n in value.shape]
            index = tuple(slice(*cut) for cut in cuts)
            part = ours.read(name, index)
            assert part.dtype == value.dtype
            np.testing.assert_array_equal(part.astype(float), value[index].astype(float))
            assert part.flags.owndata
            assert part.flags.writeable
    split = tuple(map(slice, (1, 0, 3, 1), (3, 2, 4, 2)))  # strides longer than a block
    part = ours.read("wide", split, (3, 2, 20, 2))
    np.testing.assert_array_equal(part, tensors["wide"].reshape(3, 2, 20, 2)[split])


def test_types_that_hold_no_weights_are_valid_and_refused_when_asked_for(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(3, ml_dtypes.float8_e4m3fn), "n": np.zeros(2, np.int64)}, file)
    found = SafetensorsFile(file)
    for name, kind in (("a", "F8_E4M3"), ("n", "I64")):
        with pytest.raises(UnsupportedModelError, match=f"{name} in .* is stored as {kind}"):
            found.read(name, (slice(None),))
