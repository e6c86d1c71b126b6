"""MXFP4: four-bit floats, of which 32 share a power of two. GPT-OSS is released in it.

A packed tensor `X` of shape (experts, inputs, outputs) is stored as `X_blocks`, (experts, outputs,
inputs / 32, 16) with two numbers in a byte, the first in its lower half, and `X_scales`, (experts,
outputs, inputs / 32) with exponents that count from -127 (OCP Microscaling Formats 1.0). Each part
is decoded as it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.errors import ModelError
from jrlhf.models.hf.reader import SafetensorsCheckpoint

BLOCKS, SCALES = "_blocks", "_scales"
_BYTES, _NUMBERS = 16, 32  # of a block
_BIAS = 127
# The eight magnitudes of a sign bit, two bits of exponent and one of mantissa.
_HALF = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_VALUES = np.array(_HALF + [-value for value in _HALF], np.float32)


def open_safetensors(path: Path) -> SafetensorsCheckpoint:
    """A directory of safetensors, packed as MXFP4 or not.

    Raises:
        MissingFileError: see `SafetensorsCheckpoint`.
        ModelError: likewise; or blocks and scales of a tensor do not belong together.
    """
    found = SafetensorsCheckpoint(path)
    method = found.config.get("quantization_config")
    packed = isinstance(method, Mapping) and method.get("quant_method") == "mxfp4"
    return Mxfp4Checkpoint(path) if packed else found


class Mxfp4Checkpoint(SafetensorsCheckpoint):
    """A checkpoint whose packed tensors look like the plain ones that they stand for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # What is read from here is no longer quantized, and is saved as such.
        self.config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        self._packed = {
            name.removesuffix(BLOCKS)
            for name in self.shapes
            if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in self.shapes
        }
        if twice := sorted(self._packed & self.shapes.keys()):
            raise ModelError(f"{path} holds {', '.join(twice)} both as MXFP4 and as plain weights.")
        parts = {name + ending for name in self._packed for ending in (BLOCKS, SCALES)}
        plain = {name: shape for name, shape in self.shapes.items() if name not in parts}
        self.shapes = plain | {name: self._shape(name) for name in sorted(self._packed)}

    def _shape(self, name: str) -> tuple[int, ...]:
        blocks, scales = self.shapes[name + BLOCKS], self.shapes[name + SCALES]
        if len(blocks) != 4 or blocks[-1] != _BYTES or blocks[:-1] != scales:
            raise ModelError(
                f"{name}{BLOCKS} has shape {blocks} and {name}{SCALES} {scales}; expected"
                f" (experts, outputs, blocks, {_BYTES}) and (experts, outputs, blocks)."
            )
        experts, outputs, count, _ = blocks
        return experts, count * _NUMBERS, outputs

    def read(
        self, name: str, index: tuple[slice, ...], shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        if name not in self._packed:
            return super().read(name, index, shape)
        shape = self.shapes[name] if shape is None else shape
        assert shape[:2] == self.shapes[name][:2]  # outputs alone may be split
        experts, inputs, *outputs = index
        start, stop, _ = inputs.indices(shape[1])
        first, last = start // _NUMBERS, -(-stop // _NUMBERS)
        stored = (experts, *outputs, slice(first, last))
        view = (shape[0], *shape[2:], shape[1] // _NUMBERS)
        blocks = self._codes(name + BLOCKS, (*stored, slice(None)), (*view, _BYTES))
        values = decode(blocks, self._codes(name + SCALES, stored, view))
        begin = first * _NUMBERS
        return np.moveaxis(values[..., start - begin : stop - begin], -1, 1)

    def _codes(self, name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        return self._home[name].read(name, index, shape, codes=True)


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray[Any, Any]:
    """The numbers, (..., blocks * 32) in float32, of blocks (..., blocks, 16) and their scales."""
    pairs = np.stack([blocks & 15, blocks >> 4], axis=-1)
    numbers = _VALUES[pairs.reshape(*scales.shape, _NUMBERS)]
    exponents = scales.astype(np.int32)[..., None] - _BIAS
    count = scales.shape[-1] * _NUMBERS
    return np.ldexp(numbers, exponents).reshape(*scales.shape[:-1], count)
