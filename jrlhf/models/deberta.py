"""Disentangled attention: what DeBERTa adds to the scores for the distance of two tokens.

    score(i, j) = [q_i·k_j + q_i·K(δ) + k_j·Q(δ)] / sqrt(e · terms),   δ = bucket(i - j)

K and Q are projections of a table of position vectors that all layers share. A text of s tokens has
2s-1 distances: their vectors are taken from the table once, every layer projects them, and the
products [s, 2s-1] are sheared into [s, s]. No score is gathered, nor scattered backwards.

References:
    He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", 2021.
    He et al., "DeBERTaV3", 2021. The buckets follow `transformers.models.deberta_v2`.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jrlhf.models.encoder_spec import RelativeSpec

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def table_rows(relative: RelativeSpec, length: int) -> np.ndarray:
    """Row of the position table for each distance -(s-1) … s-1, int [2s-1]."""
    distances = np.arange(1 - length, length)
    places = log_buckets(distances, relative) if relative.buckets else distances
    return np.clip(places + relative.span, 0, 2 * relative.span - 1)


def log_buckets(distances: np.ndarray, relative: RelativeSpec) -> np.ndarray:
    """Near distances as they are; farther ones by their logarithm, up to ±(buckets - 1).

    In float32, where transformers rounds up: a boundary moves if a logarithm is rounded otherwise.
    """
    mid = relative.buckets // 2
    size = np.maximum(np.abs(distances), mid - 1)
    far = np.log(size.astype(np.float32) / np.float32(mid))
    far /= np.log(np.float32((relative.max_distance - 1) / mid))
    far = np.ceil(far * np.float32(mid - 1)) + mid
    return np.where(size <= mid, distances, np.sign(distances) * far).astype(np.int64)


def position_scores(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b s h e"],
    position_keys: Float[Array, "t h e"] | None,
    position_queries: Float[Array, "t h e"] | None,
    *,
    dtype: str,
) -> Float[Array, "b h s s"] | None:
    """The part of the scores that depends on distances (t = 2s-1, in increasing order).

    Args:
        q: queries, scaled.
        k: keys.
        position_keys: K of every distance, for "c2p"; None: that term is off.
        position_queries: Q of every distance, scaled, for "p2c"; None: that term is off.
        dtype: of the dots' operands.
    """
    total = None
    if position_keys is not None:
        keys = position_keys[::-1].astype(dtype)
        total = _shear(_einsum("bshe,the->bhst", q.astype(dtype), keys))
    if position_queries is not None:
        products = _einsum("bshe,the->bhst", k.astype(dtype), position_queries.astype(dtype))
        turned = _shear(products).swapaxes(2, 3)
        total = turned if total is None else total + turned
    return total


def _shear(x: Float[Array, "b h s t"]) -> Float[Array, "b h s s"]:
    """out[i, j] = x[i, j - i + s - 1]: rows of 2s, read again as rows of 2s-1."""
    b, h, s, t = x.shape
    flat = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(b, h, s * (t + 1))
    return flat[:, :, s - 1 : s - 1 + s * t].reshape(b, h, s, t)[..., :s]
