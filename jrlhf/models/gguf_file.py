"""The container format of GGUF: metadata and where each tensor's bytes lie.

The gguf package's own reader takes seconds for a vocabulary, because every string passes through
numpy; this one takes a tenth of that and checks every bound. Dequantizing is left to that package.

References:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.errors import ModelError, UnsupportedModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LARGEST_WHOLE = 2**31 - 1
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor as it is stored.

    Attributes:
        shape: outermost axis first.
        kind: quantization, a `gguf.GGMLQuantizationType`.
        data: raw bytes [..., bytes of the innermost axis].
    """

    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """Some of the outermost axis' rows, dequantized to float32.

        Raises:
            UnsupportedModelError: a quantization that the gguf package cannot undo.
        """
        from gguf.quants import dequantize

        try:
            return dequantize(np.ascontiguousarray(self.data[rows]), self.kind)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"quantization {self.kind.name} is not one that the gguf package dequantizes."
            ) from None


class GGUFFile:
    """A GGUF file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Reads the metadata and the table of tensors.

        Raises:
            ModelError: the file is damaged or cut short.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = 0
            self.metadata = self._header()
            self.tensors = self._tensor_table()
        except (struct.error, OSError, ValueError, IndexError) as error:
            raise ModelError(f"{path} is not a readable GGUF file: {error}") from error

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value."""
        return self.metadata.get(key, default)

    def need(self, key: str) -> Any:
        """A metadata value that must be there.

        Raises:
            ModelError: it is not.
        """
        if key not in self.metadata:
            raise ModelError(f"{self.path} has no {key}.")
        return self.metadata[key]

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number.

        Raises:
            ModelError: it is absent without a default, below `least` or too large, or another kind
                of value (some models have a list here, one number per layer).
        """
        value = self.need(key) if default is None else self.get(key, default)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= _LARGEST_WHOLE:
            what = f"one whole number from {least} to {_LARGEST_WHOLE}"
            raise self._unexpected(key, value, what)
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite number above 0 (with `zero`: or 0 itself).

        Raises:
            ModelError: it is absent without a default, or something else.
        """
        value = self.need(key) if default is None else self.get(key, default)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not (0 < value <= _LARGEST or (zero and value == 0)):
            what = f"a finite number {'of 0 or more' if zero else 'above 0'}"
            raise self._unexpected(key, value, what)
        return shortest(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text.

        Raises:
            ModelError: it is absent without a default, or something else.
        """
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, str):
            raise self._unexpected(key, value, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts.

        Raises:
            ModelError: it is absent or something else.
        """
        values = self.need(key)
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            raise self._unexpected(key, values, "a list of texts")
        return values

    def numbers(self, key: str, default: list[int] | None = None) -> list[float]:
        """A list of numbers.

        Raises:
            ModelError: it is absent without a default, or something else.
        """
        values = self.need(key) if default is None else self.get(key, default)
        if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
            raise self._unexpected(key, values, "a list of numbers")
        return values

    def token_id(self, role: str, vocabulary: int) -> int | None:
        """The id of a special token; None if the file names none, or one outside the vocabulary.

        Files write -1 for none, which reads as 4294967295 without its sign.

        Raises:
            ModelError: it is not a whole number.
        """
        key = f"tokenizer.ggml.{role}_token_id"
        value = self.get(key, -1)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._unexpected(key, value, "one whole number")
        return value if 0 <= value < vocabulary else None

    def _unexpected(self, key: str, value: Any, what: str) -> ModelError:
        # A list can be as long as the vocabulary.
        return ModelError(f"{self.path} has {key}={value!r:.80}, expected {what}.")

    def _header(self) -> dict[str, Any]:
        if self._buffer[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version:#x}, known: {_VERSIONS} in little-endian order")
        self._count = self._scalar("Q")
        pairs = self._scalar("Q")
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            if key in metadata:
                raise ValueError(f"its metadata has {key} twice")
            metadata[key] = self._value(self._scalar("I"))
        return metadata

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._buffer, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._scalar("Q")
        end = self._at + size
        if end > len(self._buffer):
            raise ValueError("a string runs past the end")
        text = self._buffer[self._at : end].decode("utf-8", errors="replace")
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._scalar("I"), self._scalar("Q")
            if item == _STRING:
                return [self._string() for _ in range(count)]
            code = self._code(item)
            if count * struct.calcsize(code) > len(self._buffer) - self._at:
                raise ValueError("an array runs past the end")
            values = struct.unpack_from(f"<{count}{code}", self._buffer, self._at)
            self._at += count * struct.calcsize(code)
            return list(values)
        return self._scalar(self._code(kind))

    @staticmethod
    def _code(kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"metadata of unknown type {kind}")
        return _SCALARS[kind]

    def _tensor_table(self) -> dict[str, GGUFTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        rows = []
        for _ in range(self._count):
            name, dimensions = self._string(), self._scalar("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions")
            shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
            rows.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={alignment!r}, expected a power of two from 8 on")
        start = -(-self._at // alignment) * alignment
        everything = np.frombuffer(self._buffer, np.uint8)
        tensors: dict[str, GGUFTensor] = {}
        spans = []
        for name, shape, number, offset in rows:
            if name in tensors:
                raise ValueError(f"it has {name} twice")
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise ValueError(f"{name} of shape {shape} does not divide into blocks of {block}")
            stored = (*shape[:-1], shape[-1] // block * block_bytes)
            first = start + offset
            last = first + int(np.prod(stored, dtype=object))
            if last > everything.size:
                raise ValueError(f"{name} runs past the end of the file")
            tensors[name] = GGUFTensor(shape, kind, everything[first:last].reshape(stored))
            spans.append((offset, last - first, name))
        _check_contiguous(spans, alignment)
        return tensors


def _check_contiguous(spans: list[tuple[int, int, str]], alignment: int) -> None:
    """Refuses tensors that overlap or leave holes: a wrong offset would read another's bytes.

    Args:
        spans: of every tensor the offset, the number of bytes and the name.
        alignment: what every offset is a multiple of.

    Raises:
        ValueError: there are such.
    """
    end = 0
    for offset, size, name in sorted(spans):
        if offset != end:
            raise ValueError(
                f"{name} lies at offset {offset}, expected {end}: behind the tensor before, at the"
                f" next multiple of general.alignment={alignment}"
            )
        end = -(-(offset + size) // alignment) * alignment


def shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))
