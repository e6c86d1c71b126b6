"""Writes a model directory that transformers loads: safetensors, index, config files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.errors import ConfigError
from jrlhf.models.hf.reader import INDEX, SINGLE

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_LEFT_OVER = re.compile(rf"\.{_SHARD.pattern}\.\d+")


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: everything about it but its values.

    Attributes:
        name: its name in the checkpoint.
        nbytes: its size in the file.
    """

    name: str
    nbytes: int


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MiB" or a plain number, as transformers writes `max_shard_size`.

    Raises:
        ConfigError: it is not a positive size.
    """
    found = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", str(size))
    if found is None or found[2].upper() not in _UNITS or int(found[1]) == 0:
        raise ConfigError(f'max_shard_size={size!r} is not a size such as "5GB" or "200MB".')
    return int(found[1]) * _UNITS[found[2].upper()]


def plan_shards(tensors: Sequence[Tensor], max_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file, in the given order.

    A tensor larger than `max_bytes` gets a file of its own.

    Returns:
        {file name: tensor names}; a single file is called model.safetensors.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor.name)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups)}


def write_weights(
    directory: Path,
    tensors: Sequence[Tensor],
    values: Iterator[tuple[str, np.ndarray]],
    *,
    max_bytes: int,
) -> None:
    """Writes the shards, and replaces an earlier save by them when all of them lie on disk.

    Args:
        directory: exists already.
        tensors: all tensors, in the order in which `values` yields them.
        values: (name, array); asked for lazily, so that one shard at a time lies in memory.
        max_bytes: largest file.
    """
    from safetensors.numpy import save_file

    plan = plan_shards(tensors, max_bytes)
    partial = {directory / file: _partial(directory / file) for file in plan}
    for old in directory.iterdir():
        if _LEFT_OVER.fullmatch(old.name):  # of a process that was killed
            old.unlink()
    try:
        for file, names in plan.items():
            held: dict[str, np.ndarray] = {}
            for expected in names:
                name, value = next(values)
                assert name == expected, (name, expected)
                held[name] = np.ascontiguousarray(value)
            # transformers 4 refuses a file without it; it names a layout, not a dependency.
            save_file(held, partial[directory / file], metadata={"format": "pt"})
        if len(plan) > 1:
            # Without it, old and new shards of the same names cannot pass for one model.
            (directory / INDEX).unlink(missing_ok=True)
        for whole, written in partial.items():
            os.replace(written, whole)
    finally:
        for written in partial.values():
            written.unlink(missing_ok=True)
    kept = set(plan)
    if len(plan) > 1:
        kept.add(INDEX)
        total = sum(tensor.nbytes for tensor in tensors)
        weight_map = {name: file for file, names in plan.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX, index)
    for old in directory.iterdir():
        # A model.safetensors left from an earlier save would win over the new index.
        if _SHARD.fullmatch(old.name) and old.name not in kept:
            old.unlink()


def _partial(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, all at once; of LoRA's patterns the first that fits wins, so only the
    object's own keys are sorted."""
    text = json.dumps(dict(sorted(value.items())), indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[str], object]) -> None:
    """Writes beside the target and renames, so that a crash never leaves half a file."""
    partial = _partial(path)
    try:
        write(str(partial))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def export_config(
    written: Mapping[str, Any], source: Mapping[str, Any], *, classifier: bool, dtype: str
) -> dict[str, Any]:
    """config.json for a model: what the spec decides over what the origin said besides.

    Args:
        written: the keys that the spec decides (`families.config_from_spec`).
        source: the config that the model was loaded with, {} when it was made from nothing.
        classifier: whether the model has a classification head.
        dtype: type of the saved weights.
    """
    dropped = {"torch_dtype", "rope_scaling", "rope_theta", "auto_map", "num_labels"}
    labels = {"id2label", "label2id", "problem_type"}
    config = {k: v for k, v in source.items() if k not in dropped}
    same_labels = len(source.get("id2label") or {}) == len(written.get("id2label", {}))
    if not (classifier and same_labels):
        config = {k: v for k, v in config.items() if k not in labels}
    keep = {k: config[k] for k in labels if config.get(k) is not None}
    if "id2label" in keep:
        keep.setdefault("label2id", {name: int(i) for i, name in keep["id2label"].items()})
    config |= dict(written) | keep | {"dtype": dtype}
    rope = written.get("rope_parameters")
    # What transformers 4 and the servers built on it read.
    if rope and "rope_theta" in rope and "rope_type" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            config["rope_scaling"] = dict(rope)
    return config


def export_generation_config(
    source: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """generation_config.json: the origin's, else the special tokens of config.json."""
    if source is not None:
        return dict(source)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in tokens if config.get(key) is not None}
