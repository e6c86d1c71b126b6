"""The order of the data: a pure function of (seed, epoch, step), at any number of processes.

A loader has no state to save. `batch(step)` gives the same rows whether or not earlier steps were
asked for, so resuming is asking for the next one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jrlhf.data.rows import Rows, RowStream, TokenRow
from jrlhf.errors import ConfigError, EmptyDatasetError

Collate = Callable[[Sequence[TokenRow], int], Any]


class Order:
    """Which rows a step reads.

    Attributes:
        n: rows of the dataset.
        batch_size: rows of a global batch.
        steps_per_epoch: batches that one pass takes (with `wrap`, rounded up).
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        wrap: bool = False,
    ) -> None:
        """Fixes the order.

        Args:
            n: rows of the dataset.
            batch_size: rows of a global batch.
            seed: of the shuffles.
            shuffle: another permutation each epoch; False reads in order.
            drop_last: leave out the rows that do not fill a batch (others, each epoch).
            wrap: fill the last batch of an epoch from the next epoch, so that all batches are full.
        """
        if n < 1:
            raise EmptyDatasetError("The dataset has no rows to order.")
        if drop_last and not wrap and n < batch_size:
            raise EmptyDatasetError(
                f"The dataset has {n} rows, fewer than one batch of {batch_size}, and "
                "dataloader_drop_last=True drops them all: lower the batch size or set it to False."
            )
        self.n, self.batch_size = n, batch_size
        self.seed, self.shuffle, self.wrap = seed, shuffle, wrap
        full = drop_last and not wrap
        self.steps_per_epoch = n // batch_size if full else math.ceil(n / batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, in order."""
        return _permutation(self.n, self.seed, epoch) if self.shuffle else np.arange(self.n)

    def indices(self, step: int) -> np.ndarray:
        """Rows of the global batch of a step; the last of an epoch may be short."""
        if not self.wrap:
            epoch, within = divmod(step, self.steps_per_epoch)
            start = within * self.batch_size
            return self.permutation(epoch)[start : start + self.batch_size]
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while first < last:
            epoch, start = divmod(first, self.n)
            part = self.permutation(epoch)[start : start + last - first]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # Raw Philox output is stable over numpy versions; Generator.permutation is not promised to be.
    key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch], np.uint64)  # of a list, floats may come
    keys = np.random.Philox(key=key).random_raw(n)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


class Loader:
    """Batches of a map-style dataset.

    Attributes:
        rows: the tokenized rows.
        order: which of them a step reads.
    """

    def __init__(
        self,
        rows: Rows | Sequence[TokenRow],
        collate: Collate,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        wrap: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Loads rows.

        Args:
            rows: tokenized rows.
            collate: rows and a size to a batch, e.g. `functools.partial(lm_batch, length=128)`.
            batch_size: rows of a global batch, over all processes.
            seed: of the order.
            shuffle: see `Order`.
            drop_last: see `Order`.
            wrap: see `Order`.
            process_index: this process builds rows [index, index + 1) * batch_size / process_count.
            process_count: processes that share the batch.
        """
        self.rows, self._collate = rows, collate
        self.order = Order(len(rows), batch_size=batch_size, seed=seed, shuffle=shuffle,
                           drop_last=drop_last, wrap=wrap)  # fmt: skip
        self.local_size = _share(batch_size, process_count)
        self._first = process_index * self.local_size

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def total_steps(self, *, epochs: float, max_steps: int = -1) -> int:
        """Optimizer steps of a run, as transformers counts them; `max_steps` > 0 wins."""
        return max_steps if max_steps > 0 else max(math.ceil(epochs * self.steps_per_epoch), 1)

    def epoch(self, step: int) -> float:
        """Passes over the data that are complete after `step` steps."""
        return step / self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """This process's part of the global batch, as row numbers."""
        return self.order.indices(step)[self._first : self._first + self.local_size]

    def batch(self, step: int) -> Any:
        """The local batch of a step."""
        rows = [self.rows[index] for index in self.indices(step).tolist()]
        return self._collate(rows, self.local_size)


class StreamLoader:
    """Batches of a streaming dataset, shuffled through a buffer.

    Every process reads the whole stream and keeps its rows. Asking for a step further on reads and
    forgets what lies between; asking for an earlier one starts over. Epochs follow each other
    without end, the last batch of each is short (or dropped).
    """

    steps_per_epoch = None

    def __init__(
        self,
        rows: RowStream,
        collate: Collate,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        drop_last: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Loads a stream; arguments as of `Loader`, with a buffer of rows in place of `shuffle`.

        Args:
            shuffle_buffer: rows held to draw from; 0 or 1 keeps the stream's order.
        """
        self.rows, self._collate = rows, collate
        self._batch_size, self._seed = batch_size, seed
        self._buffer, self._drop_last = shuffle_buffer, drop_last
        self.local_size = _share(batch_size, process_count)
        self._first = process_index * self.local_size
        self._next, self._epoch = 0, 0
        self._batches = self._all()

    def total_steps(self, *, epochs: float, max_steps: int = -1) -> int:
        """`max_steps`; a stream does not know its length.

        Raises:
            ConfigError: `max_steps` is not positive.
        """
        if max_steps <= 0:
            raise ConfigError("A streaming dataset has no known length: set max_steps.")
        return max_steps

    def epoch(self, step: int) -> float:
        """The number of the pass that is being read."""
        return float(self._epoch)

    def batch(self, step: int) -> Any:
        """The local batch of a step."""
        if step < self._next:
            self._next, self._batches = 0, self._all()
        while True:
            rows = next(self._batches)
            self._next += 1
            if self._next > step:
                mine = rows[self._first : self._first + self.local_size]
                return self._collate(mine, self.local_size)

    def _all(self) -> Iterator[list[TokenRow]]:
        epoch = 0
        while True:
            self._epoch, any_batch = epoch, False
            batch: list[TokenRow] = []
            for row in _shuffled(self.rows, self._buffer, self._seed, epoch):
                batch.append(row)
                if len(batch) == self._batch_size:
                    any_batch = True
                    yield batch
                    batch = []
            if batch and not self._drop_last:
                any_batch = True
                yield batch
            if not any_batch:
                raise EmptyDatasetError(
                    f"The streaming dataset gave no batch. Dropped rows: {dict(self.rows.counts)}."
                )
            epoch += 1


def _shuffled(rows: RowStream, size: int, seed: int, epoch: int) -> Iterator[TokenRow]:
    """Draws each row at random from a buffer of the next `size` ones."""
    if size <= 1:
        yield from rows
        return
    source = np.random.Philox(key=[seed & 0xFFFF_FFFF_FFFF_FFFF, epoch])
    held: list[TokenRow] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        at = int(source.random_raw()) % size
        yield held[at]
        held[at] = row
    while held:
        at = int(source.random_raw()) % len(held)
        held[at], held[-1] = held[-1], held[at]
        yield held.pop()


def _share(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ConfigError(
            f"A batch of {batch_size} rows does not divide over {process_count} processes."
        )
    return batch_size // process_count
