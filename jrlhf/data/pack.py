"""Packing: several short documents in one row of fixed length, none cut, none seeing another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jrlhf.errors import ConfigError

STRATEGIES = ("bfd", "bfd_split", "wrapped")

Document = tuple[np.ndarray, np.ndarray]  # ids, mask


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
        max_length: tokens of a packed row.
        strategy: what happens to documents that do not fit. "bfd" cuts those longer than
            `max_length`, "bfd_split" parts them into documents of their own, and "wrapped" fills
            every row to the brim, in order, and lets the next row go on with the rest.

    Yields:
        Rows of ids, mask and `seq_lengths`, the lengths of their documents. The first token of a
        document is never trained on: nothing before it predicts it. (TRL's "wrapped" forgets the
        boundaries, so that documents attend to their neighbours; here they never do.)

    Raises:
        ConfigError: another strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"packing_strategy must be one of {STRATEGIES}, got {strategy!r}.")
    if strategy == "wrapped":
        made = map(_joined, _wrapped(rows, max_length))
        yield from (row for row in made if row["mask"].any())
        return
    documents: list[Document] = []
    for row in rows:
        last = len(row["ids"]) if strategy == "bfd_split" else max_length
        for start in range(0, min(len(row["ids"]), last), max_length):
            piece = _piece(row, start, start + max_length)
            if piece[1].any():
                documents.append(piece)
    for members in best_fit_decreasing([len(ids) for ids, _ in documents], max_length):
        yield _joined([documents[number] for number in members])


def _wrapped(rows: Iterable[dict[str, Any]], max_length: int) -> Iterator[list[Document]]:
    filled: list[Document] = []
    room = max_length
    for row in rows:
        start = 0
        while start < len(row["ids"]):
            filled.append(_piece(row, start, start + room))
            start += room
            room -= len(filled[-1][0])
            if room < 2:  # one token alone has nothing to be predicted from
                yield filled
                filled, room = [], max_length
    if filled:
        yield filled


def _piece(row: dict[str, Any], start: int, stop: int) -> Document:
    mask = row["mask"][start:stop].copy()
    mask[:1] = 0
    return row["ids"][start:stop], mask


def _joined(documents: Sequence[Document]) -> dict[str, Any]:
    return {
        "ids": np.concatenate([ids for ids, _ in documents]),
        "mask": np.concatenate([mask for _, mask in documents]),
        "seq_lengths": [len(ids) for ids, _ in documents],
    }
