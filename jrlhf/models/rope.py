"""Rotary position embedding, every type that transformers knows for text.

References:
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023.
    Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", 2024.
    What each key means follows `transformers.modeling_rope_utils`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jrlhf.models.spec import RopeSpec
from jrlhf.ops.layout import joined


class Rotation(NamedTuple):
    """cos and sin of every angle, float32 [b s r/2] (b may be 1); made once per forward.

    r of a head's e channels are turned: all of them, or the first ones (partial rotation).
    """

    cos: Array
    sin: Array


def inverse_frequencies(rope: RopeSpec, head_dim: int, *, long: bool = False) -> np.ndarray:
    """The angle per position of each pair of channels, float64 [r/2].

    Args:
        rope: what to compute; of type dynamic, the angles of short documents.
        head_dim: channels of a head.
        long: of type longrope, the angles of documents beyond the original length.
    """
    dim = rope.turned(head_dim)
    inv = rope.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.rope_type == "linear":
        return inv / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, inv)
    if rope.rope_type == "yarn":
        return _yarn(rope, inv, dim)
    if rope.rope_type == "longrope":
        return inv / np.asarray(rope.long_factor if long else rope.short_factor, np.float64)
    return inv


def _llama3(rope: RopeSpec, inv: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / inv
    length = rope.original_max_position_embeddings
    # 0 at long wavelengths (divided by factor), 1 at short ones (kept), a ramp between.
    smooth = (length / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * inv / rope.factor + smooth * inv


def _yarn(rope: RopeSpec, inv: np.ndarray, dim: int) -> np.ndarray:
    def pair_of(turns: float) -> float:
        """The pair (a real number) that turns so often over the original length."""
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    # Fast pairs are kept, slow ones divided by factor, a ramp between.
    slow = np.clip((np.arange(len(inv)) - low) / (high - low), 0.0, 1.0)
    return inv * (1 - slow) + inv / rope.factor * slow


def attention_scaling(rope: RopeSpec) -> float:
    """The factor on cos and sin (types yarn and longrope), which sharpens attention."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.rope_type == "longrope":
        original = rope.original_max_position_embeddings
        return math.sqrt(1 + math.log(rope.factor) / math.log(original))

    def scale(m: float) -> float:
        return 0.1 * m * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rotation(
    positions: Int[Array, "b s"],
    *,
    rope: RopeSpec,
    head_dim: int,
    lengths: Int[Array, "b s"] | None = None,
) -> Rotation:
    """The rotation of each position, in float32 as transformers computes it.

    Args:
        positions: of each token in its document.
        rope: which rotation.
        head_dim: channels of a head.
        lengths: tokens of each token's document (either axis may be 1), for the types that depend
            on it (`rope.by_length`).
    """
    inv = jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
    if rope.by_length:
        assert lengths is not None
        inv = _by_length(rope, head_dim, inv, lengths[..., None])
    angles = positions.astype(jnp.float32)[..., None] * inv
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    scaling = attention_scaling(rope)
    return Rotation(cos, sin) if scaling == 1.0 else Rotation(cos * scaling, sin * scaling)


def _by_length(
    rope: RopeSpec, head_dim: int, short: Float[Array, " r"], lengths: Int[Array, "b s 1"]
) -> Float[Array, "b s r"]:
    original = rope.original_max_position_embeddings
    if rope.rope_type == "longrope":
        long = jnp.asarray(inverse_frequencies(rope, head_dim, long=True), jnp.float32)
        return jnp.where(lengths > original, long, short)
    # Dynamic: theta grows with the length, by this to the power of dim / (dim - 2).
    longer = jnp.maximum(lengths, original).astype(jnp.float32) / original
    growth = rope.factor * longer - (rope.factor - 1)
    dim = rope.turned(head_dim)
    return short * growth ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / (dim - 2))


def choose(index: Int[Array, ""] | int, first: Rotation, second: Rotation | None) -> Rotation:
    """The rotation of a layer: 0 the first, 1 the second, -1 none."""
    cos, sin = first
    if second is not None:
        cos, sin = jnp.where(index == 1, second.cos, cos), jnp.where(index == 1, second.sin, sin)
    return Rotation(jnp.where(index < 0, 1.0, cos), jnp.where(index < 0, 0.0, sin))


def rotate(
    x: Float[Array, "b s n e"], r: Rotation, *, interleaved: bool = False
) -> Float[Array, "b s n e"]:
    """Turns channel pairs of every head by the position's angles.

    Pairs are (i, i + r/2), or (2i, 2i + 1) where interleaved; channels from r on stay.
    """
    width = 2 * r.cos.shape[-1]
    if width < x.shape[-1]:
        turned = rotate(x[..., :width], r, interleaved=interleaved)
        return joined(turned, x[..., width:])
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    cos, sin = r.cos[:, :, None, :], r.sin[:, :, None, :]
    pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        return jnp.stack(pair, axis=-1).reshape(x.shape)
    return joined(*pair)


def document_lengths(
    positions: Int[Array, "#b s"], segments: Int[Array, "b s"]
) -> Int[Array, "b s"]:
    """How many tokens the document of each token has."""

    def row(positions: Array, segments: Array) -> Array:
        last = jax.ops.segment_max(positions, segments, num_segments=segments.shape[0] + 1)
        return last[segments] + 1

    return jax.vmap(row)(jnp.broadcast_to(positions, segments.shape), segments)
