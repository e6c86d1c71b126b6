"""Encoders in transformers' manner: token rows padded on either side, with token types."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jrlhf.errors import ModelError
from jrlhf.models.build_encoder import EncoderNet
from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.rollout.devices import active
from jrlhf.types import PyTree


def classify_like_transformers(
    net: EncoderNet,
    params: PyTree,
    ids: Any,
    mask: Any,
    position_ids: Any = None,
    token_type_ids: Any = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Float[Array, "b n"]:
    """The classifier's scores, the same for padding on the left and on the right.

    Args:
        net: an encoder.
        params: its parameters.
        ids: [b s].
        mask: 1 for real tokens, [b s].
        position_ids: [b s], as transformers counts them; None: over the real tokens.
        token_type_ids: [b s]; None: all 0. Models without a table of them ignore them.
        mesh: where the parameters live, if not on one device.

    Raises:
        ModelError: more tokens than the model has positions, or an unknown token type.
    """
    rows, lengths = right_padded(net.spec, ids, mask, position_ids, token_type_ids)
    return _scores(net, params, rows, lengths, mesh)


def right_padded(
    spec: EncoderSpec, ids: Any, mask: Any, position_ids: Any, token_type_ids: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Moves the real tokens to the start, where encoders pool, and counts them.

    Returns:
        ids, positions (from 0) and types, int32 [b s]; lengths, int32 [b].

    Raises:
        ModelError: as `classify_like_transformers`.
    """
    ids, mask = np.asarray(ids), np.asarray(mask)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    if position_ids is not None:
        positions = np.asarray(position_ids) - spec.position_offset
    types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids)
    longest, highest = mask.sum(axis=1).max(initial=0), types.max(initial=0)
    if spec.learned_positions and longest > spec.max_position_embeddings:
        raise ModelError(
            f"A row has {longest} tokens; this {spec.model_type} has positions for "
            f"{spec.max_position_embeddings}. Cut the text."
        )
    if highest >= spec.type_vocab_size > 0:
        raise ModelError(
            f"token_type_ids go up to {highest}; this {spec.model_type} knows "
            f"{spec.type_vocab_size} types."
        )
    order = np.argsort(mask == 0, axis=1, kind="stable")
    rows = {"ids": ids, "positions": positions, "types": types}
    moved = {
        name: np.take_along_axis(np.broadcast_to(x, ids.shape), order, axis=1).astype(np.int32)
        for name, x in rows.items()
    }
    return moved, (mask != 0).astype(np.int32).sum(axis=1)


@functools.partial(jax.jit, static_argnames=("net", "mesh"))
def _scores(
    net: EncoderNet,
    params: PyTree,
    rows: dict[str, Array],
    lengths: Array,
    mesh: jax.sharding.Mesh | None,
) -> Float[Array, "b n"]:
    with active(mesh):
        hidden = net.hidden(params, **rows, lengths=lengths)
        return net.scores(params, hidden, lengths)
