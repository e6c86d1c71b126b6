"""Encoders in transformers' manner: token rows padded on either side, with token types."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jrlhf.models.build_encoder import EncoderNet
from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.ops.layout import jit
from jrlhf.rollout.devices import active
from jrlhf.types import PyTree


def classify(
    net: EncoderNet,
    params: PyTree,
    ids: Int[np.ndarray, "b s"],
    mask: Int[np.ndarray, "b s"],
    positions: Int[np.ndarray, "_ s"],
    types: Int[np.ndarray, "_ s"],
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Float[Array, "b n"]:
    """The classifier's scores, the same for padding on the left and on the right.

    Args:
        net: an encoder.
        params: its parameters.
        ids, mask, positions, types: as `models.inputs` gives them.
        mesh: where the parameters live, if not on one device.
    """
    rows, lengths = right_padded(net.spec, ids, mask, positions, types)
    return _scores(net, params, rows, lengths, mesh)


def right_padded(
    spec: EncoderSpec, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, types: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Moves the real tokens to the start, where encoders pool, and counts them.

    Returns:
        ids, positions (from 0) and types, int32 [b s]; lengths, int32 [b].
    """
    order = np.argsort(mask == 0, axis=1, kind="stable")
    rows = {"ids": ids, "positions": positions - spec.position_offset, "types": types}
    moved = {
        name: np.take_along_axis(np.broadcast_to(x, ids.shape), order, axis=1).astype(np.int32)
        for name, x in rows.items()
    }
    return moved, np.count_nonzero(mask, axis=1).astype(np.int32)


@functools.partial(jit, static_argnames=("net", "mesh"))
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
