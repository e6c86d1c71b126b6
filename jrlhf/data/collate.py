"""Rows to numpy batches of static shape.

Everything is right-padded and every mask comes from lengths, never from `ids != pad`: pad may be a
token that also ends answers. Missing rows of a short batch have length 0 and mask 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jrlhf.data.rows import TokenRow
from jrlhf.errors import DataError

NumpyBatch = dict[str, np.ndarray]


def padded_length(longest: int, *, max_length: int | None = None, multiple: int = 8) -> int:
    """The one sequence length of a run: min(longest, max_length), rounded up to a multiple."""
    length = longest if max_length is None else min(longest, max_length)
    return -(-length // multiple) * multiple


def lm_batch(rows: Sequence[TokenRow], size: int, *, length: int, pad_id: int = 0) -> NumpyBatch:
    """Batch of rows of ids and mask (SFT).

    Args:
        rows: at most `size` rows.
        size: rows of the batch.
        length: tokens of a row.
        pad_id: written into padding; no number may depend on it.

    Returns:
        ids [b s] int32, lengths [b] int32, mask [b s] float32. Rows that are packed add segments
        (0 padding, 1.. documents) and positions (from 0 in each document), both [b s] int32.
    """
    ids = np.full((size, length), pad_id, np.int32)
    mask = np.zeros((size, length), np.float32)
    lengths = np.zeros(size, np.int32)
    for number, row in enumerate(_fitting(rows, size)):
        lengths[number] = _write(ids[number], row["ids"])
        mask[number, : len(row["ids"])] = row["mask"]
    mask[:, 0] = 0.0  # nothing predicts the first token
    batch = {"ids": ids, "lengths": lengths, "mask": mask}
    if any("seq_lengths" in row for row in rows):
        batch |= _documents(rows, size, length)
        # Nor the first of any later document.
        mask *= batch["positions"] > 0
    return batch


def _documents(rows: Sequence[TokenRow], size: int, length: int) -> NumpyBatch:
    segments = np.zeros((size, length), np.int32)
    positions = np.zeros((size, length), np.int32)
    for number, row in enumerate(rows):
        at = 0
        for document, tokens in enumerate(row.get("seq_lengths", [len(row["ids"])]), start=1):
            segments[number, at : at + tokens] = document
            positions[number, at : at + tokens] = np.arange(tokens)
            at += tokens
    return {"segments": segments, "positions": positions}


def pair_batch(rows: Sequence[TokenRow], size: int, *, length: int, pad_id: int = 0) -> NumpyBatch:
    """Batch of preference pairs; index 0 of axis 1 is chosen, 1 is rejected.

    Returns:
        ids [b 2 s] int32, lengths [b 2] int32, mask [b 2 s] float32 (1 from `prompt_length` to the
        end); margin [b] float32 where rows have it, ref_logps [b 2 s] float32 likewise.
    """
    ids = np.full((size, 2, length), pad_id, np.int32)
    lengths = np.zeros((size, 2), np.int32)
    prompts = np.zeros((size, 2, 1), np.int32)
    for number, row in enumerate(_fitting(rows, size)):
        prompts[number, :, 0] = row["prompt_length"]  # one number, or one per side
        for side, key in enumerate(("chosen", "rejected")):
            lengths[number, side] = _write(ids[number, side], row[key])
    at = np.arange(length)
    # Position 0 is never a target, with an empty prompt neither.
    mask = (at >= np.maximum(prompts, 1)) & (at < lengths[..., None])
    batch = {"ids": ids, "lengths": lengths, "mask": mask.astype(np.float32)}
    if any(row.get("margin") is not None for row in rows):
        batch["margin"] = np.zeros(size, np.float32)
        batch["margin"][: len(rows)] = [row.get("margin") or 0.0 for row in rows]
    if any("ref_logps" in row for row in rows):
        batch["ref_logps"] = np.zeros((size, 2, length), np.float32)
        for number, row in enumerate(rows):
            for side, logps in enumerate(row["ref_logps"]):
                _write(batch["ref_logps"][number, side], logps)
    return batch


def _fitting(rows: Sequence[TokenRow], size: int) -> Sequence[TokenRow]:
    if len(rows) > size:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {size}.")
    return rows


def _write(target: np.ndarray, values: np.ndarray) -> int:
    if len(values) > len(target):
        raise DataError(
            f"A row of {len(values)} tokens does not fit the padded length {len(target)}: lower "
            "max_length, or raise the length given to the collator."
        )
    target[: len(values)] = values
    return len(values)
