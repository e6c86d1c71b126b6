"""The key-value cache of one layer.

A cache has a fixed number of slots. Prefill fills the first ones with the prompt (right-padded);
every decode step then writes one slot, the same for all rows, so that the write is a single
in-place `dynamic_update_slice`. Which slots a row may read is the caller's `valid` mask; a row's
position for RoPE is its own and need not be the slot.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one layer, [b k c e], in the compute dtype."""

    k: Array
    v: Array

    def write(
        self, k: Float[Array, "b s k e"], v: Float[Array, "b s k e"], slot: Int[Array, ""]
    ) -> LayerCache:
        """Stores the keys and values of s tokens at slots slot .. slot + s - 1."""
        start = (0, 0, slot, 0)
        return LayerCache(
            lax.dynamic_update_slice(self.k, k.swapaxes(1, 2).astype(self.k.dtype), start),
            lax.dynamic_update_slice(self.v, v.swapaxes(1, 2).astype(self.v.dtype), start),
        )


Cache = tuple[LayerCache, ...]


def filled(
    k: Float[Array, "b s k e"], v: Float[Array, "b s k e"], *, size: int, dtype: str
) -> LayerCache:
    """A cache of `size` slots that starts with these keys and values; the others hold zeros."""
    pad = ((0, 0), (0, 0), (0, size - k.shape[1]), (0, 0))
    return LayerCache(
        jnp.pad(k.swapaxes(1, 2).astype(dtype), pad), jnp.pad(v.swapaxes(1, 2).astype(dtype), pad)
    )
