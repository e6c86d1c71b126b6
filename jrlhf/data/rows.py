"""Collections of tokenized rows, and the driver that makes them chunk by chunk."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jrlhf.errors import DataError, EmptyDatasetError

log = logging.getLogger(__name__)

# One row ready for a collator: arrays of ids and masks, and whatever its trainer needs besides.
TokenRow = dict[str, Any]
Chunk = Callable[[list[dict[str, Any]], int], Iterable[TokenRow]]

# Rows per tokenizer call; also what TRL packs at a time.
CHUNK = 1000


class Rows(Sequence[TokenRow]):
    """Tokenized rows of a map-style dataset.

    Attributes:
        counts: what preparation did, by name, e.g. {"dropped: ...": 3}.
    """

    def __init__(self, items: list[TokenRow], counts: Counter[str] | None = None) -> None:
        self.items = items
        self.counts = counts if counts is not None else Counter()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence of any row."""
        return max(len(ids) for row in self.items for ids in sequences(row))

    def fingerprint(self) -> str:
        """Hash of all token ids in order: tells whether a resumed run reads the same data."""
        digest = hashlib.sha256()
        for row in self.items:
            for ids in sequences(row):
                digest.update(len(ids).to_bytes(8, "little"))
                digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
        return digest.hexdigest()


class RowStream(Iterable[TokenRow]):
    """Tokenized rows of a streaming dataset; every iteration starts from its first row.

    Attributes:
        counts: as of `Rows`, over all that was read so far.
    """

    def __init__(
        self, source: Callable[[], Iterator[TokenRow]], counts: Counter[str] | None = None
    ) -> None:
        self._source = source
        self.counts = counts if counts is not None else Counter()

    def __iter__(self) -> Iterator[TokenRow]:
        return self._source()


def sequences(row: TokenRow) -> list[np.ndarray]:
    """The token sequences of a row: one, or chosen and rejected."""
    return [row[key] for key in ("ids", "chosen", "rejected") if key in row]


def prepare(
    dataset: Any,
    chunk: Chunk,
    *,
    name: str,
    counts: Counter[str],
    then: Callable[[Iterable[TokenRow]], Iterator[TokenRow]] | None = None,
) -> Rows | RowStream:
    """Runs a chunk-wise tokenizer over a dataset.

    Args:
        dataset: datasets.Dataset, IterableDataset or a list of rows.
        chunk: rows and the number of the first one to tokenized rows (it may drop some).
        name: the dataset's name in messages.
        counts: filled by `chunk`; reported when done.
        then: applied to the tokenized rows (packing); in a stream to each chunk by itself.

    Raises:
        EmptyDatasetError: no row is left.
    """
    if not hasattr(dataset, "__len__"):

        def source() -> Iterator[TokenRow]:
            told: set[str] = set()
            for start, rows in _chunks_of_stream(dataset):
                made = chunk(rows, start)
                yield from then(made) if then else made
                for what in [what for what in +counts if what not in told]:
                    log.warning("%s dataset: rows %s.", name, what)
                    told.add(what)

        return RowStream(source, counts)
    items: list[TokenRow] = []
    for start in range(0, len(dataset), CHUNK):
        items.extend(chunk(slice_rows(dataset, start, start + CHUNK), start))
    if then:
        items = list(then(items))
    for what, number in (+counts).items():
        log.warning("%s dataset: %d of %d rows %s.", name, number, len(dataset), what)
    if not items:
        reasons = "; ".join(f"{number} {what}" for what, number in (+counts).items())
        raise EmptyDatasetError(
            f"The {name} dataset has nothing to train on: {len(dataset)} rows were read"
            + (f", of which {reasons}." if reasons else ".")
        )
    return Rows(items, +counts)


def limit_ids(rows: Rows | RowStream, vocab_size: int, *, name: str) -> Rows | RowStream:
    """The rows, if all their ids are the model's; a stream is checked while it is read.

    An id beyond the embedding would be clamped on the device, and another word trained on.

    Raises:
        DataError: an id of `vocab_size` or more.
    """

    def checked(row: TokenRow) -> TokenRow:
        highest = max(int(np.max(ids, initial=0)) for ids in sequences(row))
        if highest >= vocab_size:
            raise DataError(
                f"The {name} dataset has token {highest}, the model 0 to {vocab_size - 1}. Is the "
                "tokenizer the model's, and without added tokens?"
            )
        return row

    if isinstance(rows, RowStream):
        return RowStream(lambda: map(checked, rows), rows.counts)
    for row in rows:
        checked(row)
    return rows


def slice_rows(dataset: Any, start: int, stop: int) -> list[dict[str, Any]]:
    """Rows [start, stop) as dicts."""
    part = dataset[start:stop]
    if not isinstance(part, dict):
        return [dict(row) for row in part]
    columns = list(part)
    return [dict(zip(columns, values, strict=True)) for values in zip(*part.values(), strict=True)]


def _chunks_of_stream(dataset: Iterable[Any]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    rows: list[dict[str, Any]] = []
    start = 0
    for row in dataset:
        rows.append(dict(row))
        if len(rows) == CHUNK:
            yield start, rows
            start, rows = start + CHUNK, []
    if rows:
        yield start, rows


def first_row(dataset: Any, name: str) -> dict[str, Any]:
    """The first row of a dataset of either style.

    Raises:
        EmptyDatasetError: there is none.
    """
    for row in dataset:
        if not isinstance(row, dict):
            raise DataError(f"The {name} dataset must hold rows (dicts), got {type(row).__name__}.")
        return row
    raise EmptyDatasetError(f"The {name} dataset has no rows.")
