"""The low-rank path beside one linear map.

    y = W x + s B A x                                             (LoRA)
    y = m / |W + s B A| * (W x + s B A x)                         (DoRA)

with s = alpha / r, |.| the norm of each output's weights (taken as a constant by the gradient, as
in section 4.3 of the DoRA paper) and m learnt.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, UInt32

from jrlhf.models.axes import Axes
from jrlhf.models.layers import Linear, Shape, dot
from jrlhf.models.lora.plan import Adapter, Target

# One key per row while a training step is traced; None: nothing is dropped.
_row_keys: contextvars.ContextVar[Array | None] = contextvars.ContextVar(
    "jrlhf_dropout_keys", default=None
)


@contextlib.contextmanager
def dropping(keys: UInt32[Array, "b 2"] | None) -> Iterator[None]:
    """Gives the rows of the forward that is traced in this block their dropout keys (raw data)."""
    token = _row_keys.set(keys)
    try:
        yield
    finally:
        _row_keys.reset(token)


class LowRank(nnx.Module):
    """One adapter's path beside one linear map.

    Args:
        linear: the map; its kernel is [stack..., inputs..., outputs...].
        target: rank and scale of each position of the stack; lower ranks are padded with zeros,
            which stay zeros: neither factor gets a gradient where the other is zero.
        adapter: dropout and variant.
        lead: the stack's axis, () for a single layer.
        ready: `magnitude` is m / |W + s B A| already (see `gain`): a decoder's weights do not
            change, and the norm would be taken anew for every token.
    """

    def __init__(
        self, linear: Linear, target: Target, adapter: Adapter, *, lead: Shape, ready: bool
    ) -> None:
        shape, axes = linear.kernel.shape, linear.kernel.get_metadata()["axes"]
        stack, cut = len(lead), len(lead) + linear.inputs
        r = target.rank
        self.inputs, self.dtype = linear.inputs, linear.dtype
        self.rate, self.ready = adapter.dropout, ready

        def zeros(shape: Shape, axes: Axes) -> nnx.Param:
            return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)

        self.a = zeros((*shape[:cut], r), (*axes[:cut], None))
        self.b = zeros((*lead, r, *shape[cut:]), (*axes[:stack], None, *axes[cut:]))
        self.scale = zeros(lead, axes[:stack])
        self.tag = nnx.Param(jnp.zeros(lead, jnp.uint32), axes=axes[:stack])
        self.magnitude = nnx.data(None)
        if adapter.dora:
            self.magnitude = zeros((*lead, *shape[cut:]), (*axes[:stack], *axes[cut:]))

    def __call__(self, x: Array, y: Array, kernel: Array) -> Array:
        """Adds the path to y = W x; x has the rows first, then the map's input axes."""
        keys = _row_keys.get()
        dropped = x
        if self.rate and keys is not None:
            dropped = _drop(x, keys, self.tag[...], self.rate)
        scale = self.scale[...]
        low = dot(dot(dropped, self.a[...], self.inputs, self.dtype), self.b[...], 1, self.dtype)
        low = low * scale
        if self.magnitude is None:
            return y + low
        factor = self.magnitude[...]
        if not self.ready:
            factor = gain(factor, kernel, self.a[...], self.b[...], scale)
        if dropped is x:
            return factor * (y + low)
        # The base result stays whole; only what the adapter adds sees the dropped input.
        return y + (factor - 1) * dot(dropped, kernel, self.inputs, self.dtype) + factor * low


def delta(a: Array, b: Array, scale: Array) -> Array:
    """s B A of one map, in the layout of its kernel, float32."""
    product = lax.dot_general(
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        (((a.ndim - 1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    return scale * product


def norm(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    """|W + s B A| of each output: the norm over the map's input axes."""
    whole = kernel.astype(jnp.float32) + delta(a, b, scale)
    return jnp.sqrt(jnp.sum(whole * whole, axis=tuple(range(a.ndim - 1))))


def gain(magnitude: Array, kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    """m / |W + s B A|, the norm a constant for the gradient; 1 in layers that are not adapted."""
    whole = lax.stop_gradient(norm(kernel, a, b, scale))
    return jnp.where(scale == 0, 1.0, magnitude / whole)


def _drop(x: Array, keys: Array, tag: Array, rate: float) -> Array:
    """Inverted dropout; the mask is a function of (the row's key, the module)."""

    def one(key: Array, row: Float[Array, s * d]) -> Array:
        own = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), tag)
        kept = jax.random.bernoulli(own, 1.0 - rate, row.shape)
        return jnp.where(kept, row / (1.0 - rate), 0.0).astype(row.dtype)

    return jax.vmap(one)(keys, x)
