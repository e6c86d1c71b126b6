"""Softmax attention with grouped key-value heads, and the masks that go with it.

Keys and values are never repeated: the query heads of one group are rows of the same small matrix.
Dots take operands of the compute dtype and give float32; the softmax is float32.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row with no allowed key (there is none by construction) could not make nan.
BLOCKED = -1e30


def causal_mask(length: int) -> Bool[Array, "1 s s"]:
    """Query i sees keys 0..i. Right-padding needs nothing more: no real query sees padding."""
    return jnp.tril(jnp.ones((length, length), bool))[None]


def segment_mask(segments: Int[Array, "b s"]) -> Bool[Array, "b s s"]:
    """Causal, and only within the same document; padding (segment 0) sees padding only."""
    same = segments[:, :, None] == segments[:, None, :]
    return same & causal_mask(segments.shape[1])


def attend(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b k t e"],
    v: Float[Array, "b k t e"],
    mask: Bool[Array, "#b s t"],
    *,
    dtype: str,
) -> Float[Array, "b s h e"]:
    """softmax(q k^T / sqrt(e)) v under a mask; True where a query may read a key."""
    b, s, h, e = q.shape
    n = k.shape[1]
    q = (q * e**-0.5).astype(dtype).reshape(b, s, n, h // n, e)
    scores = jnp.einsum("bsnge,bnte->bngst", q, k.astype(dtype), preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, BLOCKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum(
        "bngst,bnte->bsnge",
        weights.astype(dtype),
        v.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    out = out / total.transpose(0, 3, 1, 2)[..., None]
    return out.reshape(b, s, h, e)
