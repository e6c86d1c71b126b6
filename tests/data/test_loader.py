"""The order of the data is a function of (seed, epoch, step) and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jrlhf.data.collate import lm_batch
from jrlhf.data.loader import Loader, Order, StreamLoader
from jrlhf.data.rows import Rows, RowStream
from jrlhf.errors import ConfigError, EmptyDatasetError

sizes = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**40))


def rows_of(n: int) -> Rows:
    return Rows(
        [{"ids": np.array([i, i], np.int32), "mask": np.ones(2, np.uint8)} for i in range(n)]
    )


def taken(batch: dict) -> list[int]:
    return batch["ids"][batch["lengths"] > 0, 0].tolist()


collate = partial(lm_batch, length=2, pad_id=0)


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(0, 3))
def test_each_epoch_is_a_permutation(size: tuple[int, int, int], epoch: int) -> None:
    n, batch, seed = size
    order = Order(n, batch_size=batch, seed=seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = np.concatenate([order.indices(step) for step in steps])
    assert sorted(seen.tolist()) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_wrapped_batches_are_all_full_and_lose_nothing(size: tuple[int, int, int]) -> None:
    n, batch, seed = size
    order = Order(n, batch_size=batch, seed=seed, wrap=True)
    stream = np.concatenate([order.indices(step) for step in range(ceil(3 * n / batch))])
    assert len(stream) % batch == 0
    for epoch in range(3):
        part = stream[epoch * n : (epoch + 1) * n]
        np.testing.assert_array_equal(part, order.permutation(epoch))


def test_any_integer_is_a_seed() -> None:
    seeds = (-1, -2, 2**63, 2**64 - 3)
    orders = {tuple(Order(50, batch_size=50, seed=seed).indices(0).tolist()) for seed in seeds}
    assert len(orders) == len(seeds)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = Order(50, batch_size=50, seed=1)
    first, second = order.indices(0), order.indices(1)
    assert (first != second).any()
    assert (Order(50, batch_size=50, seed=2).indices(0) != first).any()
    np.testing.assert_array_equal(Order(50, batch_size=50, seed=1).indices(1), second)
    np.testing.assert_array_equal(Order(50, batch_size=50, shuffle=False).indices(3), np.arange(50))


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    whole = Order(24, batch_size=24, seed=5).indices(0)
    for batch in (1, 5, 8):
        order = Order(24, batch_size=batch, seed=5)
        parts = np.concatenate([order.indices(s) for s in range(order.steps_per_epoch)])
        np.testing.assert_array_equal(parts, whole)


def test_every_place_is_as_likely_as_any_other() -> None:
    # Chi-square of row 0's place over 4,000 seeds and 8 places: 7 degrees of freedom, far tail.
    places = [
        np.flatnonzero(Order(8, batch_size=8, seed=s).indices(0) == 0)[0] for s in range(4000)
    ]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 30


def test_a_loader_has_no_memory() -> None:
    loader = Loader(rows_of(10), collate, batch_size=4, seed=3)
    straight = [taken(loader.batch(step)) for step in range(7)]
    resumed = Loader(rows_of(10), collate, batch_size=4, seed=3)
    for step in (5, 0, 6, 2):
        assert taken(resumed.batch(step)) == straight[step]


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"wrap": True}])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_read_what_one_reads(processes: int, options: dict) -> None:
    one = Loader(rows_of(20), collate, batch_size=6, **options)
    many = [Loader(rows_of(20), collate, batch_size=6, process_index=p, process_count=processes,
                   **options) for p in range(processes)]  # fmt: skip
    for step in range(8):
        whole = one.batch(step)
        parts = [loader.batch(step) for loader in many]
        for key in whole:
            np.testing.assert_array_equal(whole[key], np.concatenate([p[key] for p in parts]))
        np.testing.assert_array_equal(
            one.indices(step), np.concatenate([loader.indices(step) for loader in many])
        )


def test_the_last_batch_is_padded_dropped_or_filled() -> None:
    got = {}
    for name in ("pad", "drop_last", "wrap"):
        loader = Loader(
            rows_of(10), collate, batch_size=4, **({name: True} if name != "pad" else {})
        )
        got[name] = [len(taken(loader.batch(s))) for s in range(loader.steps_per_epoch)]
    assert got == {"pad": [4, 4, 2], "drop_last": [4, 4], "wrap": [4, 4, 4]}


def test_steps_are_counted_as_transformers_counts_them() -> None:
    loader = Loader(rows_of(10), collate, batch_size=4)
    assert loader.total_steps(epochs=3.0) == 9
    assert loader.total_steps(epochs=0.5) == 2
    assert loader.total_steps(epochs=0.01) == 1
    assert loader.total_steps(epochs=3.0, max_steps=5) == 5
    assert loader.epoch(6) == 2.0


def test_dropping_all_rows_is_an_error() -> None:
    with pytest.raises(EmptyDatasetError, match="3 rows, fewer than one batch of 4"):
        Loader(rows_of(3), collate, batch_size=4, drop_last=True)
    with pytest.raises(EmptyDatasetError):
        Loader(rows_of(0), collate, batch_size=4)


def test_a_batch_that_does_not_divide_over_processes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="3 processes"):
        Loader(rows_of(9), collate, batch_size=4, process_count=3)


def stream_of(n: int) -> RowStream:
    def source() -> Iterator[dict]:
        yield from rows_of(n)

    return RowStream(source)


@pytest.mark.parametrize("buffer", [0, 3, 100])
def test_a_stream_gives_each_row_once_per_epoch(buffer: int) -> None:
    loader = StreamLoader(stream_of(11), collate, batch_size=4, shuffle_buffer=buffer)
    steps = [taken(loader.batch(step)) for step in range(6)]
    epochs = [[row for step in half for row in step] for half in (steps[:3], steps[3:])]
    for epoch in epochs:
        assert sorted(epoch) == list(range(11))
    assert (epochs[0] != epochs[1]) == (buffer > 1)
    assert (epochs[0] == list(range(11))) == (buffer <= 1)


def test_a_stream_resumes_from_any_step() -> None:
    options = {"batch_size": 4, "shuffle_buffer": 5, "seed": 9}
    straight = StreamLoader(stream_of(11), collate, **options)
    expected = [taken(straight.batch(step)) for step in range(8)]
    for start in (0, 4, 7):
        loader = StreamLoader(stream_of(11), collate, **options)
        assert [taken(loader.batch(s)) for s in range(start, 8)] == expected[start:]
    assert taken(straight.batch(2)) == expected[2]  # also backwards


def test_stream_processes_together_read_what_one_reads() -> None:
    one = StreamLoader(stream_of(11), collate, batch_size=4)
    many = [StreamLoader(stream_of(11), collate, batch_size=4, process_index=p, process_count=2)
            for p in range(2)]  # fmt: skip
    for step in range(5):
        parts = [taken(loader.batch(step)) for loader in many]
        assert taken(one.batch(step)) == parts[0] + parts[1]


def test_a_stream_needs_max_steps() -> None:
    loader = StreamLoader(stream_of(3), collate, batch_size=4)
    assert loader.total_steps(epochs=1.0, max_steps=7) == 7
    with pytest.raises(ConfigError, match="max_steps"):
        loader.total_steps(epochs=1.0)


def test_a_stream_without_a_batch_is_an_error_not_a_hang() -> None:
    with pytest.raises(EmptyDatasetError):
        StreamLoader(stream_of(0), collate, batch_size=4).batch(0)
    with pytest.raises(EmptyDatasetError):
        StreamLoader(stream_of(3), collate, batch_size=4, drop_last=True).batch(0)
