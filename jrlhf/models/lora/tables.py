"""Embedding tables in an adapter's file: PEFT writes those of a resized base beside the adapter.

They belong to the base, not to the adapter: read, they take the place of its own tables, and
nothing trains them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.models.families import Weight
from jrlhf.models.hf.safetensors_file import SafetensorsFile
from jrlhf.models.lora.config import WEIGHTS_FILE
from jrlhf.models.lora.plan import EMBEDDING, Weights
from jrlhf.models.lora.plan import Path as Keys
from jrlhf.models.match import VOCABULARY
from jrlhf.models.save import to_host

PREFIX = "base_model.model."


def rows(weights: Weights, tied_head: str) -> Iterator[tuple[str, Weight, Keys]]:
    """(name in the base's checkpoint, layout, path) of every leaf with a row for each token.

    Args:
        weights: the family's rows and places.
        tied_head: the name of a head that is the embedding; "" if it is not.
    """
    for row, places in weights:
        for name, path, _ in places:
            if path in VOCABULARY:
                yield name, row, path
                if path == EMBEDDING and tied_head:
                    yield tied_head, row, path


def take(
    found: Mapping[str, np.ndarray], used: set[str], weights: Weights, tied_head: str
) -> tuple[dict[Keys, np.ndarray], list[str]]:
    """The base's tables among a file's tensors, without padding, and what is wrong with them.

    Args:
        found: the file's tensors.
        used: names that are the adapter's own; those of tables are added.
    """
    tables: dict[Keys, np.ndarray] = {}
    problems: list[str] = []
    for name, row, path in rows(weights, tied_head):
        module, _, ending = name.rpartition(".")
        plain = PREFIX + name
        # Of a module that is trained whole PEFT writes the untrained one too, and it twice.
        twice = f"{PREFIX}{module}.modules_to_save.{ending}"
        if plain in found and twice in found and np.array_equal(found[plain], found[twice]):
            used.add(twice)
        for full in (plain, f"{PREFIX}{module}.original_module.{ending}"):
            if full not in found or full in used:
                continue
            value = found[full]
            if value.shape != row.hf_shape:
                problems.append(f"shape of {full} is {value.shape}, expected {row.hf_shape}")
            elif path in tables and not np.array_equal(tables[path], row.from_hf(value)):
                continue  # a head that is the embedding here, and is not there
            else:
                tables[path] = row.from_hf(value)
            used.add(full)
    return tables, problems


def whole(
    params: Mapping[str, Any], weights: Weights, tied_head: str, saved: tuple[Keys, ...]
) -> dict[str, np.ndarray]:
    """The file's tensors of a base's tables, but those that the adapter trains whole."""
    return {
        PREFIX + name: row.to_hf(to_host(params[path[0]][path[1]]))
        for name, row, path in rows(weights, tied_head)
        if path not in saved
    }


def vocabulary_of(directory: Path, weights: Weights) -> int | None:
    """How many tokens the base of an adapter's file has; None: no embedding says."""
    if not (directory / WEIGHTS_FILE).is_file():
        return None
    stored = SafetensorsFile(directory / WEIGHTS_FILE).tensors
    name = next(name for name, _, path in rows(weights, "") if path == EMBEDDING)
    return int(stored[PREFIX + name].shape[0]) if PREFIX + name in stored else None
