"""The container format of safetensors: a JSON header that says where each tensor's bytes lie.

The safetensors package reads it too, but keeps every page that it touched in memory as long as a
file is open. Here pages are given back after each read, so that loading a model costs the host no
more than the part being read; and a header that lies is refused with the tensor's name.

References:
    https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.array_utils import byte_bounds

from jrlhf.errors import ModelError, UnsupportedModelError

_LENGTH = struct.Struct("<Q")
# What the safetensors package accepts; a longer header is a lie.
_LONGEST_HEADER = 100_000_000
# Of a file that is mapped into memory at a time.
_BLOCK = 4 * 2**20
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
# What weights are read from. The others are valid, and refused when they are asked for.
_NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {"U8": np.dtype(np.uint8)}


@dataclass(frozen=True)
class Stored:
    """One tensor as it is stored.

    Attributes:
        dtype: the format's name of it, e.g. "BF16".
        shape: its shape.
        start, stop: where its bytes lie in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)


class SafetensorsFile:
    """A safetensors file, mapped into memory.

    Attributes:
        path: the file.
        tensors: what it holds, by name.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header and checks all of it.

        Raises:
            ModelError: the file is damaged or cut short, or its header contradicts itself.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.tensors: Mapping[str, Stored] = _tensors(self._buffer)
        except (OSError, ValueError, RecursionError) as error:  # ValueError: also not JSON, empty
            raise ModelError(f"{path} is not a readable safetensors file: {error}") from error

    def read(
        self,
        name: str,
        index: tuple[slice, ...],
        shape: tuple[int, ...] | None = None,
        *,
        codes: bool = False,
    ) -> np.ndarray:
        """A copy of one rectangular part of a tensor.

        Args:
            name: of the tensor.
            index: the part.
            shape: the tensor's with axes split further, of which `index` then is.
            codes: bytes that the caller decodes are wanted, not numbers.

        Raises:
            UnsupportedModelError: a type that weights, or codes, are not read from.
        """
        stored, known = self.tensors[name], _CODES if codes else _NUMPY
        if stored.dtype not in known:
            raise UnsupportedModelError(
                f"{name} in {self.path} is stored as {stored.dtype}; known: {', '.join(known)}."
            )
        flat = np.frombuffer(self._buffer, known[stored.dtype], stored.count, stored.start)
        rectangle: tuple[Any, ...] = (*index, ...)  # a view, also of a tensor without axes
        view = flat.reshape(stored.shape if shape is None else shape)[rectangle]
        part = np.empty(view.shape, view.dtype)
        if part.size:
            self._copy(view, part, byte_bounds(flat)[0] - stored.start)
        return part

    def _copy(self, view: np.ndarray, part: np.ndarray, base: int) -> None:
        """Copies a view of the file, which lies at address `base`, block by block."""
        low, high = byte_bounds(view)
        if high - low <= _BLOCK:
            part[...] = view
            self._forget(low - base, high - base)
            return
        # A few columns touch every page of their rows, so it is the rows' span that counts.
        rows = max(_BLOCK // view.strides[0], int(view.ndim == 1))
        for at in range(0, len(view), max(rows, 1)):
            here = slice(at, at + rows) if rows else at
            self._copy(view[here], part[here], base)

    def _forget(self, start: int, stop: int) -> None:
        """Gives the pages of a range back; the system still has them in its cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._buffer.madvise(mmap.MADV_DONTNEED, first, stop - first)


def _tensors(buffer: mmap.mmap) -> dict[str, Stored]:
    """The tensors of a file, from its header. ValueError where it cannot be true."""
    if len(buffer) < _LENGTH.size:
        raise ValueError(f"it has {len(buffer)} bytes, fewer than the {_LENGTH.size} of a length")
    (length,) = _LENGTH.unpack_from(buffer)
    begin = _LENGTH.size + length
    if length > _LONGEST_HEADER or begin > len(buffer):
        raise ValueError(
            f"its header is said to have {length} bytes, the file has {len(buffer)} in all"
        )
    header = json.loads(buffer[_LENGTH.size : begin].decode("utf-8"), object_pairs_hook=_object)
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is not a table of texts")
    found = {name: _stored(name, entry, begin) for name, entry in header.items()}
    at = begin
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != at:
            kind = "overlaps the tensor before it" if stored.start < at else "leaves a hole"
            raise ValueError(f"{name} begins at byte {stored.start}, which {kind} (expected {at})")
        at = stored.stop
    if at != len(buffer):
        raise ValueError(f"its tensors end at byte {at}, the file at byte {len(buffer)}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header names {twice!r} twice")
    return found


def _stored(name: str, entry: Any, begin: int) -> Stored:
    fields = entry if isinstance(entry, dict) else {}
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has dtype {dtype!r}, which the format does not know")
    shape = _naturals(name, "shape", fields)
    offsets = _naturals(name, "data_offsets", fields)
    if len(offsets) != 2:
        raise ValueError(f"{name} has data_offsets {offsets!r}, expected two")
    start, stop = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (stop - start):
        raise ValueError(
            f"{name}, {dtype} of shape {shape}, needs {-(-bits // 8)} bytes, and has {stop - start}"
        )
    return Stored(dtype, tuple(shape), begin + start, begin + stop)


def _naturals(name: str, key: str, fields: Mapping[str, Any]) -> list[int]:
    value = fields.get(key)
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{name} has {key} {value!r}, expected a list of whole numbers")
    return value
