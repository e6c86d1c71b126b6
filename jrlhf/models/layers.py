"""The pieces of a layer as NNX modules: weights with logical axes, dots, norms, the gated MLP.

Every parameter may carry leading axes (`lead`): a stack of layers is one layer whose arrays are
[l, ...], sliced by `lax.scan`. Operands of dots have the spec's dtype; results are float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jrlhf.models.axes import Axes, constrain
from jrlhf.models.spec import DecoderSpec
from jrlhf.ops.layout import platform, rows_last
from jrlhf.ops.turned import Turned

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
    rows = x.ndim - inputs
    y = _dot_general(low_x, low_w, tuple(range(rows, x.ndim)), tuple(range(inputs)))
    # The weight is kept as it came (no copy: it is an input of the layer scan) and cast again.
    return y, (low_x, w, jnp.zeros(0, x.dtype))


def _dot_backward(
    inputs: int, dtype: str, saved: tuple[Array, Array, Array], g: Array
) -> tuple[Array, Array]:
    x, w, like_x = saved
    g = g.astype(dtype)
    rows = x.ndim - inputs
    outputs = w.ndim - inputs
    dx = _dot_general(
        g, w.astype(dtype), tuple(range(rows, rows + outputs)), tuple(range(inputs, w.ndim))
    )
    return dx.astype(like_x.dtype), weight_gradient(x, g, rows).astype(w.dtype)


dot.defvjp(_dot_forward, _dot_backward)


def weight_gradient(x: Array, g: Array, rows: int) -> Array:
    """Contracts the first `rows` axes of both: [inputs..., outputs...] in float32.

    One operand has to be transposed in memory; the narrower one is put on that side.
    """
    inputs, outputs = x.shape[rows:], g.shape[rows:]
    # Not in bfloat16 on CPUs: XLA folds the final transpose into a dot that it cannot run.
    may_turn = x.dtype != jnp.bfloat16 or platform() != "cpu"
    if math.prod(inputs) > math.prod(outputs) and may_turn:
        turned = _contract_rows(g, x, rows)
        axes = tuple(range(turned.ndim))
        return turned.transpose(*axes[len(outputs) :], *axes[: len(outputs)])
    return _contract_rows(x, g, rows)


def _contract_rows(x: Array, g: Array, rows: int) -> Array:
    if platform() != "cpu":
        # Rows are not merged here: a mesh may cut more than one of their axes.
        return _dot_general(x, g, tuple(range(rows)), tuple(range(rows)))
    x, g = x.reshape(-1, *x.shape[rows:]), g.reshape(-1, *g.shape[rows:])
    turned = rows_last(x)
    return _dot_general(turned, g, (turned.ndim - 1,), (0,))


def row_sum(x: Float[Array, "*rows n"], axes: int = 1) -> Array:
    """Sums all but the last `axes` axes, as a dot with ones.

    The same as `jnp.sum`, which XLA on CPUs runs ten times slower over leading axes.
    """
    rows = tuple(range(x.ndim - axes))
    ones = jnp.ones(x.shape[: x.ndim - axes], x.dtype)
    # A sum, so exact products also where the default is to round float32 operands (TPU, TF32).
    return lax.dot_general(
        ones,
        x,
        ((rows, rows), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@jax.custom_vjp
def add_bias(y: Array, bias: Array) -> Array:
    """y + bias, in y's type; the bias's gradient is a `row_sum`."""
    return y + bias.astype(y.dtype)


add_bias.defvjp(
    lambda y, bias: (add_bias(y, bias), bias),
    lambda bias, g: (g, row_sum(g, bias.ndim).astype(bias.dtype)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Float[Array, "*rows d"], scale: Float[Array, "*heads d"], eps: float, dtype: str
) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32, rounded to `dtype`.

    The mean is over the last axis; the scale may differ along the axes before it too.
    """
    return _rms_forward(x, scale, eps, dtype)[0]


def _rms_forward(
    x: Array, scale: Array, eps: float, dtype: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    inverse = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    y = (x * inverse * scale.astype(jnp.float32)).astype(dtype)
    return y, (x, scale, inverse)


def _rms_backward(
    eps: float, dtype: str, saved: tuple[Array, Array, Array], g: Array
) -> tuple[Array, Array]:
    x, scale, inverse = saved
    g = g.astype(jnp.float32)
    unit, scaled = x * inverse, g * scale.astype(jnp.float32)
    dx = inverse * (scaled - unit * jnp.mean(scaled * unit, axis=-1, keepdims=True))
    return dx, row_sum(g * unit, scale.ndim).astype(scale.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gated_dot(gate: Array, up: Array, w: Array, act: str, dtype: str) -> Array:
    """(act(gate) * up) W, float32. The product is computed again backwards instead of kept."""
    return _gated_forward(gate, up, w, act, dtype)[0]


def _gated_forward(
    gate: Array, up: Array, w: Array, act: str, dtype: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    low_gate, low_up = gate.astype(dtype), up.astype(dtype)
    product = _gated(low_gate, low_up, act).astype(dtype)
    y = _dot_general(product, w.astype(dtype), (gate.ndim - 1,), (0,))
    return y, (low_gate, low_up, w)


def _gated(gate: Array, up: Array, act: str) -> Array:
    return ACTIVATIONS[act](gate.astype(jnp.float32)) * up.astype(jnp.float32)


def _gated_backward(
    act: str, dtype: str, saved: tuple[Array, Array, Array], g: Array
) -> tuple[Array, Array, Array]:
    gate, up, w = saved
    g = g.astype(dtype)
    product, pull = jax.vjp(lambda gate, up: _gated(gate, up, act), gate, up)
    d_product = _dot_general(g, w.astype(dtype), (g.ndim - 1,), (1,))
    d_gate, d_up = pull(d_product)
    dw = weight_gradient(product.astype(dtype), g, g.ndim - 1).astype(w.dtype)
    return d_gate.astype(jnp.float32), d_up.astype(jnp.float32), dw


gated_dot.defvjp(_gated_forward, _gated_backward)


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
        # Low-rank paths of the active adapters (`models/lora`), in their order.
        self.lora = nnx.Dict()

    def __call__(self, x: Array) -> Array:
        turned = self.turned
        y = turned.dot(x) if turned else dot(x, self.kernel[...], self.inputs, self.dtype)
        for path in self.lora.values():
            y = path(x, y, self.kernel[...])
        return add_bias(y, self.bias[...]) if self.has_bias else y

    @property
    def turned(self) -> Turned | None:
        """The kernel, if it is laid out for decoding."""
        kernel: object = self.kernel.get_value()
        return kernel if isinstance(kernel, Turned) else None


class Norm(nnx.Module):
    """RMSNorm (a scale) or LayerNorm (a scale, mostly a bias), in float32, rounded to `dtype`."""

    def __init__(self, spec: DecoderSpec, *, lead: Shape = (), dtype: str = "") -> None:
        self.eps, self.centred = spec.norm_eps, spec.norm == "layer"
        self.dtype = dtype or spec.dtype
        self.offset = float(spec.norm_plus_one)
        self.has_scale = spec.norm_scale
        self.has_bias = self.centred and spec.norm_bias and spec.norm_scale
        shape = (spec.hidden_size,)
        if self.has_scale:
            self.scale = constant(1.0 - self.offset, shape, lead=lead, axes=(None,))
        if self.has_bias:
            self.bias = constant(0.0, shape, lead=lead, axes=(None,))

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        scale = self.scale[...] if self.has_scale else jnp.ones(x.shape[-1])
        scale = scale.astype(jnp.float32) + self.offset if self.offset else scale
        if not self.centred:
            return rms_norm(x, scale, self.eps, self.dtype)
        # LayerNorm is RMSNorm of the centred vector, plus a bias.
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = rms_norm(x, scale, self.eps, "float32")
        return (add_bias(y, self.bias[...]) if self.has_bias else y).astype(self.dtype)


class HeadNorm(nnx.Module):
    """The norm of queries or keys, float32: of each head, or over all heads together."""

    def __init__(self, spec: DecoderSpec, heads: int, axis: str, *, lead: Shape = ()) -> None:
        self.eps, self.centred = spec.norm_eps, spec.norm == "layer"
        self.offset, self.whole = float(spec.norm_plus_one), spec.qk_norm == "full"
        shape: Shape = (heads, spec.head_dim)
        axes: Axes = (axis, None)
        if spec.qk_norm == "head":
            shape, axes = shape[1:], axes[1:]
        self.scale = constant(1.0 - self.offset, shape, lead=lead, axes=axes)

    def __call__(self, x: Float[Array, "b s n e"]) -> Float[Array, "b s n e"]:
        scale = self.scale[...]
        scale = scale.astype(jnp.float32) + self.offset if self.offset else scale
        shape = x.shape
        if self.whole:
            x, scale = x.reshape(*shape[:2], -1), scale.reshape(-1)
        if self.centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        return rms_norm(x, scale, self.eps, "float32").reshape(shape)


class Mlp(nnx.Module):
    """The MLP: down(act(gate(x)) * up(x)), or down(act(up(x))) where it has no gate."""

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

        self.act, self.gated = spec.hidden_act, spec.mlp == "gated"
        if self.gated:
            self.gate = linear(d, f, ("embed", "mlp"))
        self.up = linear(d, f, ("embed", "mlp"))
        self.down = linear(f, d, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        axes = ("batch", "sequence", "mlp")
        if not self.gated:
            return self.down(ACTIVATIONS[self.act](constrain(self.up(x), axes)))
        gate, up = constrain(self.gate(x), axes), constrain(self.up(x), axes)
        if self.down.lora or self.down.turned:  # a path reads the product too; no gradient
            low_gate, low_up = gate.astype(self.down.dtype), up.astype(self.down.dtype)
            return self.down(_gated(low_gate, low_up, self.act))
        y = gated_dot(gate, up, self.down.kernel[...], self.act, self.down.dtype)
        return add_bias(y, self.down.bias[...]) if self.down.has_bias else y
