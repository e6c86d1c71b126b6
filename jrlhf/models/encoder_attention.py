"""Attention that reads both ways: by document, within a window, with an optional score bias.

Dots have operands of the compute dtype and float32 results; the softmax is float32. Long texts are
done in blocks of queries, each computed again in the backward pass, so that no [s s] array of all
heads is kept.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jrlhf.models.attention import BLOCKED

# Queries that are done at once.
BLOCK = 1024

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Reach(NamedTuple):
    """Which keys a query may read.

    Attributes:
        segments: document of each token [b s], 0 for padding; a token reads its own document.
        window: farthest distance, if `local`; 0: there is no local attention at all.
        local: scalar, whether the window holds in this layer.
    """

    segments: Int[Array, "b s"]
    window: int = 0
    local: Bool[Array, ""] | bool = False

    def allowed(self, rows: Int[Array, " m"], own: Int[Array, "b m"]) -> Bool[Array, "b 1 m s"]:
        """For the queries at the places `rows`, whose documents are `own`."""
        same = own[:, :, None] == self.segments[:, None, :]
        if self.window:
            places = jnp.arange(self.segments.shape[1])
            near = jnp.abs(rows[:, None] - places[None]) <= self.window
            same = same & (near | ~jnp.asarray(self.local))
        return same[:, None]


def attend_both_ways(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b s h e"],
    v: Float[Array, "b s h e"],
    reach: Reach,
    *,
    dtype: str,
    bias: Float[Array, "b h s s"] | None = None,
    block: int = BLOCK,
) -> Float[Array, "b s h e"]:
    """softmax(q kᵀ + bias) v over the keys that `reach` allows; q comes scaled.

    Padding reads padding, so that its values stay finite; they mean nothing.
    """
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    length = q.shape[1]
    if bias is not None or length <= block:
        return _rows(q, k, v, reach.allowed(jnp.arange(length), reach.segments), bias)
    count = -(-length // block)
    extra = count * block - length
    q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0)))
    own = jnp.pad(reach.segments, ((0, 0), (0, extra)))

    @jax.checkpoint
    def one(i: Array) -> Array:
        rows = i * block + jnp.arange(block)
        some = jax.lax.dynamic_slice_in_dim(q, i * block, block, axis=1)
        mine = jax.lax.dynamic_slice_in_dim(own, i * block, block, axis=1)
        return _rows(some, k, v, reach.allowed(rows, mine), None)

    out = jax.lax.map(one, jnp.arange(count))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)[:, :length]


def _rows(q: Array, k: Array, v: Array, allowed: Array, bias: Array | None) -> Array:
    scores = _einsum("bmhe,bthe->bhmt", q, k)
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(jnp.where(allowed, scores, BLOCKED), axis=-1)
    return _einsum("bhmt,bthe->bmhe", weights.astype(v.dtype), v).astype(v.dtype)
