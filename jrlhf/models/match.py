"""Which tensor of a checkpoint goes where in our tree, and what of it is missing or left over."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jrlhf.errors import MissingWeightError
from jrlhf.models.encoder_spec import AnySpec, EncoderSpec
from jrlhf.models.families import Weight, family_of
from jrlhf.models.hf.reader import Checkpoint

Keys = tuple[str, ...]
# Index of a tensor along the stacked axes of a leaf: none, the layer, or the layer and the expert.
At = tuple[int, ...]
# Rows of two tables that are compared at a time.
_ROWS = 4096
# The classifier's leaves.
_HEAD = "score"
_DRAW = "A classifier's head of another size is drawn anew with ignore_mismatched_sizes=True."
# Leaves with a row or column per token: only they may have padding.
VOCABULARY = {("embed", "table"): 0, ("head", "kernel"): 1, ("head", "bias"): 0}


def match(checkpoint: Checkpoint, spec: AnySpec, *, new_head: bool = False) -> dict[str, str]:
    """{name in the weight table: name in the checkpoint}, for all that the spec needs.

    Rows beyond `vocab_size` are padding, of which nothing is read: a warning says so.

    Args:
        checkpoint: what is there.
        spec: what is wanted.
        new_head: leaves out tensors of a classifier's head that have another shape.

    Raises:
        MissingWeightError: the two disagree.
    """
    shapes = dict(checkpoint.shapes)
    theirs = _our_names(shapes, spec)
    problems: list[str] = []
    found: dict[str, str] = {}
    longer: list[str] = []
    other_head = False
    absent: set[str] = set()  # a fused tensor has several rows, and is one difference
    for row in family_of(spec).weights(spec):
        for name, _, _ in row.places(spec):
            if name in theirs:
                found[name] = theirs.pop(name)
                shape = shapes[found[name]]
                if row.path in VOCABULARY and _padded(shape, row.hf_shape):
                    longer.append(f"{name} {shape[0]}")
                elif shape != row.hf_shape and new_head and row.path[0] == _HEAD:
                    del found[name]
                elif shape != row.hf_shape:
                    other_head |= row.path[0] == _HEAD
                    problems.append(f"shape of {name} is {shape}, expected {row.hf_shape}")
            elif not row.optional and name not in found and name not in absent:
                absent.add(name)
                problems.append(f"missing: {name}")
    # Heads that this use of the checkpoint leaves aside are no surprise, anything else is.
    aside = {name for row in _all_rows(spec) for name, _, _ in row.places(spec)}
    ignored = re.compile("|".join(family_of(spec).ignored) or r"(?!)")
    problems += [
        f"unexpected: {theirs[name]}"
        for name in theirs
        if name not in aside and not any(map(ignored.fullmatch, (name, theirs[name])))
    ]
    if problems:
        lines = "\n  ".join(problems + [_DRAW] * other_head)
        raise MissingWeightError(
            f"{checkpoint.path} does not hold the weights that its config describes"
            f" ({len(problems)} differences):\n  {lines}"
        )
    if longer:
        warnings.warn(
            f"{checkpoint.path} has vocab_size={spec.vocab_size} and more rows of"
            f" {', '.join(longer)}. The others are taken for padding and left out.",
            stacklevel=3,
        )
    return found


def as_tied(checkpoint: Checkpoint, spec: AnySpec) -> AnySpec:
    """The spec, untied where the checkpoint holds a head that is not the embedding.

    transformers then keeps both too, whatever the config says.
    """
    if isinstance(spec, EncoderSpec) or spec.head != "causal" or not spec.tie_word_embeddings:
        return spec
    theirs = _our_names(checkpoint.shapes, spec)
    untied = {
        row.path: row for row in family_of(spec).weights(spec.replace(tie_word_embeddings=False))
    }
    rows = [untied["head", "kernel"], untied["embed", "table"]]
    names = [theirs[row.name] for row in rows if row.name in theirs]
    if len(names) < 2 or checkpoint.shapes[names[0]] != checkpoint.shapes[names[1]]:
        return spec
    for start in range(0, rows[0].hf_shape[0], _ROWS):
        index = (slice(start, min(start + _ROWS, rows[0].hf_shape[0])), slice(None))
        head, table = (checkpoint.read(name, index) for name in names)
        if not np.array_equal(head, table):
            warnings.warn(
                f"{checkpoint.path} says tie_word_embeddings, and holds a {names[0]} that is not"
                " its embedding: both are kept, as transformers does.",
                stacklevel=4,
            )
            return spec.replace(tie_word_embeddings=False)
    return spec


def _padded(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a tensor has more rows than expected, and is alike otherwise."""
    return shape[:1] > expected[:1] and shape[1:] == expected[1:]


def _our_names(shapes: Mapping[str, Any], spec: AnySpec) -> dict[str, str]:
    """{name in the weight table, were it there: name in the checkpoint}."""
    family = family_of(spec)
    names = {name: name for name in shapes}
    for old, new in family.renames:
        names = {re.sub(old, new, name): theirs for name, theirs in names.items()}
    if any(name.startswith(family.prefix) for name in names):
        return names
    # A bare trunk (transformers' LlamaModel) leaves the prefix off.
    heads = {row.name for row in _all_rows(spec) if not row.layered}
    return {n if n in heads else family.prefix + n: theirs for n, theirs in names.items()}


def _all_rows(spec: AnySpec) -> list[Weight]:
    """The weight tables of every head that a checkpoint of this family may carry."""
    weights = family_of(spec).weights
    if isinstance(spec, EncoderSpec):  # has one head; those of pretraining are ignored by name
        return list(weights(spec))
    causal = spec.replace(head="causal", value_head=True, tie_word_embeddings=False)
    others = [row for head in ("classifier", "tokens") for row in weights(spec.replace(head=head))]
    return [*weights(causal), *others]


def places_of(spec: AnySpec, path: Keys) -> Iterator[tuple[Weight, str, At]]:
    """(row, name, index along the stacked axes) of every tensor that goes into one leaf."""
    for row in family_of(spec).weights(spec):
        for name, where, at in row.places(spec):
            if where == path:
                yield row, name, () if at is None else at if isinstance(at, tuple) else (at,)
