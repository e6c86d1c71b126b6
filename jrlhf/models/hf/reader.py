"""Reads a directory of safetensors: names and shapes at once, values only as far as asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jrlhf.errors import MissingFileError, ModelError
from jrlhf.models.hf.safetensors_file import SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The longest file name in bytes, on every file system in use.
_LONGEST = 255


class Checkpoint(Protocol):
    """Weights under Hugging Face's names and in its layout, whatever the file format is.

    Attributes:
        kind: the file format: "hf", "gguf" or "glassllm".
        path: the directory or file.
        config: what config.json says, or what it would say.
        generation_config: what generation_config.json says, or None.
        shapes: every tensor's name and shape.
    """

    kind: str
    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]

    def read(
        self, name: str, index: tuple[slice, ...], shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """One rectangular part of a tensor, touching no more of the file than it must.

        Args:
            name: of the tensor.
            index: the part; slices have no step.
            shape: the tensor's with axes split further, of which `index` then is.
        """
        ...


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: it is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    # ValueError: JSONDecodeError and UnicodeDecodeError; RecursionError: nested without end.
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected an object.")
    return value


class SafetensorsCheckpoint:
    """A directory with config.json and one or several safetensors files."""

    kind: str = "hf"

    def __init__(self, path: Path) -> None:
        """Opens every shard and reads its header.

        Raises:
            MissingFileError: no config.json, no weights, or a shard that the index names is absent.
            ModelError: a file is damaged, the index names something other than a plain file, or
                two shards hold the same tensor.
        """
        self.path = path
        config = path / "config.json"
        if not config.is_file():
            raise MissingFileError(f"{path} has no config.json: it is not a model directory.")
        self.config: Mapping[str, Any] = read_json(config)
        generation = path / "generation_config.json"
        self.generation_config: Mapping[str, Any] | None = (
            read_json(generation) if generation.is_file() else None
        )
        self._home: dict[str, SafetensorsFile] = {}
        for file in map(SafetensorsFile, self._files()):
            if twice := sorted(self._home.keys() & file.tensors.keys()):
                raise ModelError(
                    f"{file.path} holds {', '.join(twice)}, and so does"
                    f" {self._home[twice[0]].path.name}."
                )
            self._home |= dict.fromkeys(file.tensors, file)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: file.tensors[name].shape for name, file in self._home.items()
        }

    def _files(self) -> list[Path]:
        """The shards; as in transformers, a single file wins over an index."""
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        if not (self.path / INDEX).is_file():
            others = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt"))
            hint = f" It has {', '.join(others)}: convert them to safetensors." if others else ""
            raise MissingFileError(f"{self.path} has neither {SINGLE} nor {INDEX}.{hint}")
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{self.path / INDEX} has no weight_map.")
        names = sorted({_plain_name(value) for value in weight_map.values()})
        absent = [name for name in names if not (self.path / name).is_file()]
        if absent:
            raise MissingFileError(f"{self.path} lacks shards of its index: {', '.join(absent)}.")
        return [self.path / name for name in names]

    def read(
        self, name: str, index: tuple[slice, ...], shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        return self._home[name].read(name, index, shape)


def _plain_name(value: object) -> str:
    """A shard's file name, refused unless it can only mean a file inside the directory."""
    name = value if isinstance(value, str) else ""
    plain = name and not name.startswith(".") and not set(name) & set("/\\:\0")
    if not plain or not name.endswith(".safetensors"):
        raise ModelError(f"{INDEX} names {value!r}, expected a plain *.safetensors file name.")
    if len(name.encode(errors="surrogatepass")) > _LONGEST:
        raise ModelError(
            f"{INDEX} names {name[:40]!r}…, {len(name)} characters long; file names end at"
            f" {_LONGEST} bytes."
        )
    return name
