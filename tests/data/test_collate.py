"""Batches: masks come from lengths, shapes are static, packed documents never touch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jrlhf.data.collate import lm_batch, padded_length, pair_batch
from jrlhf.data.pack import best_fit_decreasing, pack
from jrlhf.errors import DataError

PAD = 7


def document(*ids: int, trained: str = "") -> dict:
    mask = [int(c) for c in trained] or [1] * len(ids)
    return {"ids": np.array(ids, np.int32), "mask": np.array(mask, np.uint8)}


ROWS = [document(7, 7, 3, 7), document(1, 2, trained="01")]


def test_pad_ids_inside_a_row_are_trained_on() -> None:
    # pad == eos in most tokenizers: a mask from `ids != pad` would lose every EOS.
    batch = lm_batch(ROWS, 2, length=6, pad_id=PAD)
    assert batch["mask"].tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["lengths"].tolist() == [4, 2]


def test_only_padded_ids_depend_on_the_pad_token() -> None:
    a, b = (lm_batch(ROWS, 3, length=5, pad_id=pad) for pad in (PAD, 0))
    inside = np.arange(5) < a["lengths"][:, None]
    np.testing.assert_array_equal(a["ids"][inside], b["ids"][inside])
    for key in ("mask", "lengths"):
        np.testing.assert_array_equal(a[key], b[key])


def test_missing_rows_have_no_length_and_no_weight() -> None:
    for batch in (
        lm_batch(ROWS, 4, length=5),
        pair_batch([{"chosen": [1, 2], "rejected": [1, 3], "prompt_length": 1}] * 2, 4, length=5),
    ):
        assert not batch["lengths"][2:].any()
        assert not batch["mask"][2:].any()
        assert batch["ids"].shape[0] == 4


def test_types_and_shapes_are_those_of_the_contract() -> None:
    lm = lm_batch(ROWS, 2, length=8)
    pair = pair_batch(
        [{"chosen": [1, 2], "rejected": [1], "prompt_length": 0, "margin": 2}], 2, length=8
    )
    assert {k: (v.dtype.name, v.shape) for k, v in lm.items()} == {
        "ids": ("int32", (2, 8)), "lengths": ("int32", (2,)), "mask": ("float32", (2, 8)),
    }  # fmt: skip
    assert {k: (v.dtype.name, v.shape) for k, v in pair.items()} == {
        "ids": ("int32", (2, 2, 8)), "lengths": ("int32", (2, 2)), "mask": ("float32", (2, 2, 8)),
        "margin": ("float32", (2,)),
    }  # fmt: skip


def test_pairs_train_on_what_follows_the_prompt() -> None:
    row = {"chosen": [1, 2, PAD], "rejected": [1, 3], "prompt_length": 1}
    batch = pair_batch([row], 1, length=4, pad_id=PAD)
    assert batch["ids"][0].tolist() == [[1, 2, 7, 7], [1, 3, 7, 7]]
    assert batch["mask"][0].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0]]


def test_the_first_position_is_never_a_target() -> None:
    assert lm_batch([document(1, 2)], 1, length=2)["mask"].tolist() == [[0, 1]]
    pair = pair_batch([{"chosen": [1, 2], "rejected": [1], "prompt_length": 0}], 1, length=2)
    assert pair["mask"][0].tolist() == [[0, 1], [0, 0]]


def test_reference_log_probs_lie_where_their_tokens_lie() -> None:
    row = {
        "chosen": [1, 2, 3],
        "rejected": [1],
        "prompt_length": 1,
        "ref_logps": ([0, -1, -2], [0]),
    }
    batch = pair_batch([row], 2, length=4)
    assert batch["ref_logps"].tolist() == [[[0, -1, -2, 0], [0] * 4], [[0] * 4] * 2]


def test_rows_that_do_not_fit_are_an_error_not_a_cut() -> None:
    with pytest.raises(DataError, match=r"4 tokens.*3"):
        lm_batch(ROWS, 2, length=3)
    with pytest.raises(ValueError, match="2 rows"):
        lm_batch(ROWS, 1, length=8)


@pytest.mark.parametrize(
    ("longest", "limit", "multiple", "length"),
    [(5, None, 8, 8), (9, None, 8, 16), (9, 8, 8, 8), (100, 60, 16, 64), (64, 64, 1, 64)],
)
def test_one_length_fits_the_run(
    longest: int, limit: int | None, multiple: int, length: int
) -> None:
    assert padded_length(longest, max_length=limit, multiple=multiple) == length


lengths = st.lists(st.integers(1, 16), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths)
def test_packing_keeps_every_document_once_and_within_capacity(sizes: list[int]) -> None:
    bins = best_fit_decreasing(sizes, 16)
    assert sorted(number for members in bins for number in members) == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in members) <= 16 for members in bins)
    # Two bins that are both at most half full would have been one.
    assert sum(sum(sizes[n] for n in members) <= 8 for members in bins) <= 1


@settings(max_examples=100, deadline=None)
@given(lengths, st.sampled_from(["bfd", "bfd_split"]))
def test_packed_batches_hold_every_token_once_and_documents_never_cross(
    sizes: list[int], strategy: str
) -> None:
    # Token value = document * 100 + position: every token is known by its value.
    rows = [document(*range(100 * (d + 1), 100 * (d + 1) + n)) for d, n in enumerate(sizes)]
    limit = 10
    packed = list(pack(rows, max_length=limit, strategy=strategy))
    if not packed:
        return
    batch = lm_batch(packed, len(packed), length=limit)
    kept = [t for r in rows for t in (r["ids"] if strategy == "bfd_split" else r["ids"][:limit])]
    lonely = {t for n, r in zip(sizes, rows, strict=True) for t in r["ids"][-1:]
              if n == 1 or (strategy == "bfd_split" and n % limit == 1)}  # fmt: skip
    real = batch["segments"] > 0
    assert sorted(batch["ids"][real].tolist()) == sorted(set(kept) - lonely)
    for ids, segments, positions, mask in zip(
        batch["ids"], batch["segments"], batch["positions"], batch["mask"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            tokens = ids[inside]
            assert len(set(tokens // 100)) == 1, "two documents in one segment"
            np.testing.assert_array_equal(tokens, tokens[0] + np.arange(len(tokens)))
            np.testing.assert_array_equal(positions[inside], np.arange(len(tokens)))
            np.testing.assert_array_equal(mask[inside], np.arange(len(tokens)) > 0)
    assert not batch["mask"][~real].any()
    np.testing.assert_array_equal(batch["lengths"], real.sum(1))


@settings(max_examples=100, deadline=None)
@given(lengths)
def test_wrapped_rows_are_full_and_keep_every_token_in_order(sizes: list[int]) -> None:
    rows = [document(*range(100 * (d + 1), 100 * (d + 1) + n)) for d, n in enumerate(sizes)]
    packed = list(pack([*rows, document(1, 2)], max_length=10, strategy="wrapped"))
    kept = np.concatenate([row["ids"] for row in packed])
    stream = np.concatenate([row["ids"] for row in rows] + [[1, 2]])
    # Only rows without a target (documents of one token) may be missing.
    if min(sizes) > 1:
        np.testing.assert_array_equal(kept, stream)
    assert set(kept.tolist()) <= set(stream.tolist())
    assert all(len(row["ids"]) in (9, 10) for row in packed[:-1])
    for row in packed:
        starts = np.cumsum([0, *row["seq_lengths"]])
        assert starts[-1] == len(row["ids"])
        for a, b in itertools.pairwise(starts):
            assert len(set((row["ids"][a:b] // 100).tolist())) == 1, "two documents in one segment"


def test_the_first_token_of_a_document_is_no_target_even_if_its_row_says_so() -> None:
    row = {"ids": np.arange(5), "mask": np.ones(5, np.uint8), "seq_lengths": [2, 3]}
    assert lm_batch([row], 1, length=6)["mask"].tolist() == [[0, 1, 0, 1, 1, 0]]


def test_packing_leaves_the_callers_masks_alone() -> None:
    rows = [document(1, 2, 3), document(4, 5)]
    list(pack(rows, max_length=8))
    assert all(row["mask"].all() for row in rows)


def test_packed_and_plain_batches_train_on_the_same_tokens() -> None:
    rows = [document(*range(10 * d, 10 * d + 4), trained="1011") for d in range(1, 6)]
    plain = lm_batch(rows, 5, length=8)
    packed = list(pack(rows, max_length=8))
    full = lm_batch(packed, len(packed), length=8)
    np.testing.assert_array_equal(*(np.sort(b["ids"][b["mask"] > 0]) for b in (plain, full)))
