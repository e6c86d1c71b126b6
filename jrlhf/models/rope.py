"""Rotary position embedding (types default, linear, llama3), in transformers' half-split order.

References:
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    The llama3 rescaling follows `transformers.modeling_rope_utils`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jrlhf.models.spec import RopeSpec


class Rotation(NamedTuple):
    """cos and sin of every angle, float32 [b s e/2] (b may be 1); made once per forward."""

    cos: Array
    sin: Array


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> np.ndarray:
    """The angle per position of each pair of channels, float64 [e/2]."""
    inv = rope.rope_theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.rope_type == "linear":
        return inv / rope.factor
    if rope.rope_type == "llama3":
        wavelength = 2 * math.pi / inv
        length = rope.original_max_position_embeddings
        # 0 at long wavelengths (divided by factor), 1 at short ones (kept), a ramp between.
        smooth = (length / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * inv / rope.factor + smooth * inv
    return inv


def rotation(positions: Int[Array, "b s"], *, rope: RopeSpec, head_dim: int) -> Rotation:
    """The rotation of each position, in float32 as transformers computes it."""
    inv = jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * inv
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "b s n e"], r: Rotation) -> Float[Array, "b s n e"]:
    """Turns channel pairs (i, i + e/2) of every head by the position's angles."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = r.cos[:, :, None, :], r.sin[:, :, None, :]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
