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

from jrlhf.ops.layout import platform


class LayerCache(NamedTuple):
    """Rotated keys [b k e c] and values [b k c e] of one layer, rounded to the compute dtype.

    The slots of the keys are their last axis: so a decoding step's scores are a dot that reads the
    cache as it lies. (On a CPU that takes half the time; one slot's write is scattered, but small.)
    """

    k: Array
    v: Array

    def write(
        self,
        k: Float[Array, "b s k e"],
        v: Float[Array, "b s k e"],
        slot: Int[Array, ""],
        *,
        dtype: str,
    ) -> LayerCache:
        """Stores the keys and values of s tokens at slots slot .. slot + s - 1."""
        k, v = k.transpose(0, 2, 3, 1).astype(dtype), v.swapaxes(1, 2).astype(dtype)
        return LayerCache(
            lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), (0, 0, 0, slot)),
            lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), (0, 0, slot, 0)),
        )


Cache = tuple[LayerCache, ...]


def filled(
    k: Float[Array, "b s k e"], v: Float[Array, "b s k e"], *, size: int, dtype: str
) -> LayerCache:
    """A cache of `size` slots that starts with these keys and values; the others hold zeros."""
    rest = (0, size - k.shape[1])
    k, v = k.transpose(0, 2, 3, 1).astype(dtype), v.swapaxes(1, 2).astype(dtype)
    # XLA's CPU backend updates no bfloat16 array in place: each token would copy the whole cache.
    held = jnp.float32 if platform() == "cpu" else dtype
    return LayerCache(
        jnp.pad(k.astype(held), ((0, 0), (0, 0), (0, 0), rest)),
        jnp.pad(v.astype(held), ((0, 0), (0, 0), rest, (0, 0))),
    )
