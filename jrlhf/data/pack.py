"""Packing: several short documents in one row of fixed length, none cut, none seeing another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jrlhf.errors import ConfigError

STRATEGIES = ("bfd", "bfd_split")


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most `capacity` tokens: longest first, each into the fullest bin that has room.

    Args:
        lengths: tokens of each document, from 1 to `capacity`.
        capacity: tokens of a bin.

    Returns:
        The documents' numbers, bin by bin.

    References:
        Ding et al., "Fewer Truncations Improve Language Modeling", 2024 (arXiv:2404.10830).
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    bins: list[list[int]] = []
    waiting: defaultdict[int, deque[int]] = defaultdict(deque)  # room left -> bins, oldest first
    rooms: list[int] = []  # the keys of `waiting` that have bins, ascending
    for number in order.tolist():
        length = lengths[number]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            bins.append([])
            which, room = len(bins) - 1, capacity
        else:
            room = rooms[at]
            which = waiting[room].popleft()
            if not waiting[room]:
                rooms.pop(at)
        bins[which].append(number)
        left = room - length
        if left:
            if not waiting[left]:
                insort(rooms, left)
            waiting[left].append(which)
    return bins


def pack(
    rows: Iterable[dict[str, Any]], *, max_length: int, strategy: str = "bfd"
) -> Iterator[dict[str, Any]]:
    """Packs rows of ids and mask.

    Args:
        rows: documents.
        max_length: tokens of a packed row. Longer documents are cut there ("bfd") or parted into
            documents of their own ("bfd_split").
        strategy: one of the two.

    Yields:
        Rows of ids, mask and `seq_lengths`, the lengths of their documents. The first token of a
        document is never trained on: nothing before it predicts it.

    Raises:
        ConfigError: another strategy. TRL's "wrapped" lets documents attend to their neighbours.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"packing_strategy must be one of {STRATEGIES}, got {strategy!r}.")
    documents = []
    for row in rows:
        last = len(row["ids"]) if strategy == "bfd_split" else max_length
        for start in range(0, min(len(row["ids"]), last), max_length):
            mask = row["mask"][start : start + max_length].copy()
            mask[:1] = 0
            if mask.any():
                documents.append((row["ids"][start : start + max_length], mask))
    for members in best_fit_decreasing([len(ids) for ids, _ in documents], max_length):
        yield {
            "ids": np.concatenate([documents[number][0] for number in members]),
            "mask": np.concatenate([documents[number][1] for number in members]),
            "seq_lengths": [len(documents[number][0]) for number in members],
        }
