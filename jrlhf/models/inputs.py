"""What a call is given, looked at on the host.

On the device an index out of range is clamped: wrong numbers without a word.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jrlhf.errors import ModelError
from jrlhf.models.encoder_spec import AnySpec, EncoderSpec


def tokens(spec: AnySpec, input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 [b s]; all tokens are real where no mask is given.

    Raises:
        ModelError: another shape, no token, an id beyond the vocabulary, a mask of other values
            than 0 and 1.
    """
    ids = _ints("input_ids", input_ids)
    if ids.ndim != 2:
        raise ModelError(f"input_ids must be [rows, tokens], got shape {ids.shape}.")
    if not ids.size:
        raise ModelError(f"input_ids of shape {ids.shape} hold no token.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= spec.vocab_size:
        raise ModelError(
            f"input_ids go from {low} to {high}; this {spec.model_type} has tokens 0 to "
            f"{spec.vocab_size - 1}. Are they of its tokenizer?"
        )
    if attention_mask is None:
        return ids.astype(np.int32), np.ones_like(ids, np.int32)
    mask = np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise ModelError(f"attention_mask {mask.shape} and input_ids {ids.shape} differ in shape.")
    if (odd := mask[(mask != 0) & (mask != 1)]).size:
        raise ModelError(
            f"attention_mask holds {odd[0]}; it is 1 for real tokens and 0 for padding."
        )
    return ids.astype(np.int32), mask.astype(np.int32)


def positions(spec: AnySpec, position_ids: Any, mask: np.ndarray) -> np.ndarray:
    """int32 [b s] or [1 s], as transformers counts them; None: over the real tokens.

    Raises:
        ModelError: another shape, or beyond the table of a model that learned its positions.
    """
    offset = spec.position_offset if isinstance(spec, EncoderSpec) else 0
    if position_ids is None:
        longest = int(mask.sum(axis=1).max())
        if _learned(spec) and longest > spec.max_position_embeddings:
            raise ModelError(
                f"A row has {longest} tokens; this {spec.model_type} has positions for "
                f"{spec.max_position_embeddings}. Cut the text."
            )
        counted = np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0) + offset
    else:
        counted = _ints("position_ids", position_ids)
        if counted.shape not in (mask.shape, (1, mask.shape[1])):
            raise ModelError(
                f"position_ids {counted.shape} and input_ids {mask.shape} differ in shape."
            )
    if not _learned(spec):
        return counted.astype(np.int32)
    real = np.where(mask, counted, 0)  # padding may have any
    low, high, rows = int(real.min()), int(real.max()), spec.max_position_embeddings + offset
    if low < 0 or high >= rows:
        raise ModelError(
            f"position_ids go from {low} to {high}; this {spec.model_type} learned positions 0 to "
            f"{rows - 1}."
        )
    return real.astype(np.int32)


def types(spec: EncoderSpec, token_type_ids: Any, ids: np.ndarray) -> np.ndarray:
    """int32 [b s]; all 0 where none are given.

    Raises:
        ModelError: another shape, or a type that the model does not know.
    """
    if token_type_ids is None:
        return np.zeros_like(ids, np.int32)
    kinds = _ints("token_type_ids", token_type_ids)
    if kinds.shape not in (ids.shape, (1, ids.shape[1])):
        raise ModelError(f"token_type_ids {kinds.shape} and input_ids {ids.shape} differ in shape.")
    low, high = int(kinds.min()), int(kinds.max())
    if spec.type_vocab_size > 0 and (low < 0 or high >= spec.type_vocab_size):
        raise ModelError(
            f"token_type_ids go from {low} to {high}; this {spec.model_type} knows types 0 to "
            f"{spec.type_vocab_size - 1}."
        )
    return kinds.astype(np.int32)


def _learned(spec: AnySpec) -> bool:
    return spec.learned_positions if isinstance(spec, EncoderSpec) else spec.positions == "learned"


def _ints(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ModelError(f"{name} must be whole numbers, got {array.dtype}.")
    return array
