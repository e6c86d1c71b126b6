"""The pieces of a layer as NNX modules: weights with logical axes, dots, norms, the gated MLP.

Every parameter may carry leading axes (`lead`): a stack of layers is one layer whose arrays are
[l, ...], sliced by `lax.scan`. Operands of dots have the spec's dtype; results are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jrlhf.models.axes import Axes, constrain
from jrlhf.models.spec import DecoderSpec

Shape = tuple[int, ...]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Keys:
    """A stream of keys: one per parameter, in order of creation."""

    def __init__(self, key: Array) -> None:
        self._key, self._count = key, 0

    def __call__(self) -> Array:
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def normal(keys: Keys, shape: Shape, *, lead: Shape, axes: Axes, scale: float) -> nnx.Param:
    """A parameter drawn from N(0, scale^2)."""
    value = scale * jax.random.normal(keys(), lead + shape, jnp.float32)
    return nnx.Param(value, axes=_stacked(lead, axes))


def constant(value: float, shape: Shape, *, lead: Shape, axes: Axes) -> nnx.Param:
    """A parameter that starts at one value everywhere."""
    return nnx.Param(jnp.full(lead + shape, value, jnp.float32), axes=_stacked(lead, axes))


def _stacked(lead: Shape, axes: Axes) -> Axes:
    return ("layers",) * len(lead) + axes


def _dot_general(x: Array, w: Array, x_axes: tuple[int, ...], w_axes: tuple[int, ...]) -> Array:
    return lax.dot_general(x, w, ((x_axes, w_axes), ((), ())), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(x: Array, w: Array, inputs: int, dtype: str) -> Array:
    """Contracts the last `inputs` axes of x with the first of w, operands in `dtype`.

    The result is float32. So are both gradients, whose dots have operands in `dtype` too: left to
    autodiff, a bfloat16 dot with a float32 result gets a float32 dot backwards, at a fraction of
    the speed.
    """
    return _dot_forward(x, w, inputs, dtype)[0]


def _dot_forward(
    x: Array, w: Array, inputs: int, dtype: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    low_x, low_w = x.astype(dtype), w.astype(dtype)
    y = _dot_general(low_x, low_w, tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    # Empty arrays carry the types that the gradients must have.
    return y, (low_x, low_w, (jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype)))


def _dot_backward(
    inputs: int, dtype: str, saved: tuple[Array, Array, tuple[Array, Array]], g: Array
) -> tuple[Array, Array]:
    x, w, (like_x, like_w) = saved
    g = g.astype(dtype)
    rows, outputs = x.ndim - inputs, w.ndim - inputs
    dx = _dot_general(g, w, tuple(range(rows, rows + outputs)), tuple(range(inputs, w.ndim)))
    dw = _dot_general(x, g, tuple(range(rows)), tuple(range(rows)))
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


dot.defvjp(_dot_forward, _dot_backward)


class Linear(nnx.Module):
    """y = x W (+ b), with any number of input and output axes: W is [inputs..., outputs...]."""

    def __init__(
        self,
        keys: Keys,
        inputs: Shape,
        outputs: Shape,
        *,
        axes: Axes,
        bias: bool,
        scale: float,
        dtype: str,
        lead: Shape = (),
    ) -> None:
        self.inputs, self.dtype = len(inputs), dtype
        self.kernel = normal(keys, inputs + outputs, lead=lead, axes=axes, scale=scale)
        if bias:
            self.bias = constant(0.0, outputs, lead=lead, axes=axes[len(inputs) :])
        self.has_bias = bias

    def __call__(self, x: Array) -> Array:
        y = dot(x, self.kernel[...], self.inputs, self.dtype)
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y


class Norm(nnx.Module):
    """RMSNorm (a scale) or LayerNorm (a scale and a bias), in float32."""

    def __init__(self, spec: DecoderSpec, *, lead: Shape = ()) -> None:
        self.eps, self.centred = spec.norm_eps, spec.norm == "layer"
        self.scale = constant(1.0, (spec.hidden_size,), lead=lead, axes=(None,))
        if self.centred:
            self.bias = constant(0.0, (spec.hidden_size,), lead=lead, axes=(None,))

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        x = x.astype(jnp.float32)
        if self.centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(x * x, axis=-1, keepdims=True)
        y = x * lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)
        return y + self.bias[...].astype(jnp.float32) if self.centred else y


class Mlp(nnx.Module):
    """The gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, spec: DecoderSpec, keys: Keys, *, lead: Shape = ()) -> None:
        d, f = (spec.hidden_size,), (spec.intermediate_size,)

        def linear(inputs: Shape, outputs: Shape, axes: Axes) -> Linear:
            return Linear(
                keys,
                inputs,
                outputs,
                axes=axes,
                bias=spec.mlp_bias,
                scale=spec.initializer_range,
                dtype=spec.dtype,
                lead=lead,
            )

        self.act = spec.hidden_act
        self.gate = linear(d, f, ("embed", "mlp"))
        self.up = linear(d, f, ("embed", "mlp"))
        self.down = linear(f, d, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        hidden = ACTIVATIONS[self.act](self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, ("batch", "sequence", "mlp")))
