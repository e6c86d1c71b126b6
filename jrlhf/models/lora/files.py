"""adapter_model.safetensors: what PEFT writes and reads, to and from our stacked tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrlhf.errors import MissingFileError, MissingWeightError
from jrlhf.models.families import Weight
from jrlhf.models.hf.safetensors_file import SafetensorsFile
from jrlhf.models.hf.writer import replace_file
from jrlhf.models.lora import tables
from jrlhf.models.lora.config import WEIGHTS_FILE
from jrlhf.models.lora.plan import EMBEDDING, Adapter, Target, Weights
from jrlhf.models.lora.plan import Path as Keys


class Tensor(NamedTuple):
    """One tensor of the file and where it lies in the adapter's tree.

    Attributes:
        name: in the file.
        row: its layout there.
        path: of the leaf.
        part: the part of the leaf that it is.
        copied: whether the file has the same numbers under another name too.
    """

    name: str
    row: Weight
    path: Keys
    part: tuple[Any, ...]
    copied: bool = False


def tensors(
    adapter: Adapter, weights: Weights, shapes: dict[Keys, tuple[int, ...]]
) -> Iterator[Tensor]:
    """Every tensor of an adapter's file; of a fused one each of the leaves that it is made of.

    Args:
        adapter: the plan.
        weights: the family's rows and places.
        shapes: of the adapter's leaves.
    """
    for target in adapter.targets:
        for at, (name, rank) in enumerate(zip(target.names, target.ranks, strict=True)):
            if rank:
                yield from _of_map(target, at, f"{tables.PREFIX}{name}", rank, shapes)
    for row, places in weights:
        for name, path, layer in places:
            if path in adapter.saved:
                stack = layer if isinstance(layer, tuple) else (layer,)
                yield Tensor(tables.PREFIX + name, row, path, () if layer is None else stack)
                if adapter.tied_head and path == EMBEDDING:
                    yield Tensor(tables.PREFIX + adapter.tied_head, row, path, (), copied=True)


def _of_map(
    target: Target, at: int, name: str, rank: int, shapes: dict[Keys, tuple[int, ...]]
) -> Iterator[Tensor]:
    """The tensors of one adapted map; padding beyond its rank is left out."""
    lead = (at,) if target.stacked else ()
    n = len(target.inputs)
    inputs = shapes[(*(target.source or target.path), "a")][len(lead) : -1]
    outputs = shapes[(*target.path, "b")][len(lead) + 1 :]
    part = None if target.part is None else dataclasses.replace(target.part, axis=0)
    rows = {
        "a": ("lora_A.weight", (*inputs, rank), ((n,), target.inputs), None),
        "b": (
            "lora_B.weight",
            (rank, *outputs),
            (tuple(i + 1 for i in target.outputs), (0,)),
            part,
        ),
        "magnitude": ("lora_magnitude_vector", outputs, (target.outputs,), part),
    }
    cuts = {"a": (..., slice(rank)), "b": (slice(rank),), "magnitude": ()}
    for leaf, (ending, shape, groups, stripes) in rows.items():
        path = (*target.path, leaf)
        if path in shapes:
            ending = f"{name}.{ending}"
            row = Weight(path=path, name=ending, shape=shape, groups=groups, part=stripes)
            yield Tensor(row.name, row, path, (*lead, *cuts[leaf]))


def assemble(
    leaves: dict[Keys, np.ndarray], adapter: Adapter, weights: Weights
) -> dict[str, np.ndarray]:
    """The file's tensors from an adapter's leaves, whole and on the host."""
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    held: dict[str, np.ndarray] = {}
    for tensor in tensors(adapter, weights, shapes):
        value = tensor.row.to_hf(leaves[tensor.path][tensor.part])
        if tensor.row.part is None:
            held[tensor.name] = value
        else:
            whole = held.setdefault(tensor.name, np.empty(tensor.row.hf_shape, value.dtype))
            tensor.row.part.put(whole, value)
    return held


def write(
    directory: Path,
    leaves: dict[Keys, np.ndarray],
    adapter: Adapter,
    weights: Weights,
    *,
    beside: Mapping[str, np.ndarray],
    dtype: str = "float32",
) -> None:
    """Writes adapter_model.safetensors; `leaves` are whole, on the host, `beside` the base's."""
    from safetensors.numpy import save_file

    held = {
        name: np.ascontiguousarray(value.astype(dtype))
        for name, value in {**beside, **assemble(leaves, adapter, weights)}.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(
        directory / WEIGHTS_FILE, lambda file: save_file(held, file, metadata={"format": "pt"})
    )


def read(
    directory: Path,
    adapter: Adapter,
    weights: Weights,
    shapes: dict[Keys, tuple[int, ...]],
    tied_head: str,
) -> tuple[dict[Keys, np.ndarray], dict[Keys, np.ndarray]]:
    """Reads the leaves of an adapter, float32, padded with zeros to the stack's rank.

    Returns:
        The leaves, and the base's embedding tables where the file holds them (`tables`).

    Raises:
        MissingFileError: no adapter_model.safetensors.
        MissingWeightError: one error that lists every missing, unexpected and misshapen tensor:
            the adapter is damaged, or of another base.
        ModelError: the file is damaged.
    """
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        others = sorted(p.name for p in directory.glob("adapter_model*"))
        hint = f" It has {', '.join(others)}: convert it to safetensors." if others else ""
        raise MissingFileError(f"{directory} has no {WEIGHTS_FILE}.{hint}")
    found = _load(file)
    leaves = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    problems = []
    used: set[str] = set()
    for tensor in tensors(adapter, weights, shapes):
        value, again = found.get(tensor.name), tensor.name in used
        used.add(tensor.name)
        if value is None:
            problems += [] if again else [f"missing: {tensor.name}"]
        elif value.shape != tensor.row.hf_shape:
            problems.append(
                f"shape of {tensor.name} is {value.shape}, expected {tensor.row.hf_shape}"
            )
        else:
            leaves[tensor.path][tensor.part][tensor.row.inside] = tensor.row.from_hf(value)
    beside, misfits = tables.take(found, used, weights, tied_head)
    problems += misfits
    unexpected = [name for name in found if name not in used]
    problems += [f"unexpected: {name}" for name in unexpected]
    if problems:
        lines = "\n  ".join(problems)
        raise MissingWeightError(
            f"{file} does not fit this base and its own adapter_config.json "
            f"({len(problems)} differences):\n  {lines}{_low_rank_hint(unexpected)}"
            f"{_size_hint(directory, weights) if misfits else ''}"
        )
    return leaves, beside


def _size_hint(directory: Path, weights: Weights) -> str:
    size = tables.vocabulary_of(directory, weights)
    if size is None:  # a head of another size, which no resizing makes
        return ""
    return f"\n  Its base has {size} tokens: model.resize_token_embeddings({size}) first."


def _low_rank_hint(unexpected: list[str]) -> str:
    heads = (f".{head}.lora_" for head in ("lm_head", "embed_out", "score", "classifier"))
    marks = ("lora_embedding_", ".base_layer.", *heads)
    if not any(mark in name for name in unexpected for mark in marks):
        return ""
    return (
        "\n  Low-rank paths beside embeddings and heads are not implemented: merge that adapter"
        " with PEFT and load the model, or train them whole (modules_to_save)."
    )


def _load(path: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path)
    whole = {name: tuple(map(slice, stored.shape)) for name, stored in file.tensors.items()}
    return {name: file.read(name, index).astype(np.float32) for name, index in whole.items()}
