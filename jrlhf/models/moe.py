"""Routed experts: every token visits a few of many MLPs, and none is dropped.

Tokens are sorted by expert, so that each expert's tokens are one block of rows, and the three maps
are `jax.lax.ragged_dot`s over the blocks. The router is float32.

References:
    Shazeer et al., "Outrageously Large Neural Networks", 2017.
    Fedus et al., "Switch Transformers", 2021 (the load-balancing loss).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.errors import ConfigError
from jrlhf.models.axes import Axes
from jrlhf.models.encoder_spec import AnySpec
from jrlhf.models.layers import ACTIVATIONS, Keys, Shape, constant, normal
from jrlhf.models.spec import DecoderSpec, MoeSpec
from jrlhf.types import Routing as Routing


def balancing_loss(routing: Routing) -> Float[Array, ""]:
    """The load-balancing loss, as transformers' `load_balancing_loss_func`.

    It is a product of two means, so it is taken once, of sums over everything that shall be
    balanced together.
    """
    return routing.value()


def balancing_coefficient(spec: AnySpec, asked: float | None) -> float:
    """The weight of the load-balancing loss in training; 0 is off.

    Args:
        spec: the model.
        asked: a config's `router_aux_loss_coef`; None: the model's own.

    Raises:
        ConfigError: a weight was asked for and the model has no experts.
    """
    if asked is not None and asked < 0:
        raise ConfigError(f"router_aux_loss_coef={asked} must not be negative; 0 turns it off.")
    moe = spec.moe if isinstance(spec, DecoderSpec) else None
    if moe is None:
        if asked:
            raise ConfigError(
                f"router_aux_loss_coef={asked} balances the experts of a model, and a "
                f"{spec.model_type} model has none: leave it out."
            )
        return 0.0
    # Frozen layers route as they do; there is nothing to balance without trained ones.
    trained = isinstance(spec, DecoderSpec) and spec.trainable_layers > 0
    return (moe.router_aux_loss_coef if asked is None else asked) if trained else 0.0


class ExpertMap(nnx.Module):
    """One linear map per expert: kernel [x inputs outputs], and perhaps a bias [x outputs]."""

    def __init__(
        self, keys: Keys, shape: Shape, axes: Axes, *, bias: bool, scale: float, lead: Shape
    ) -> None:
        self.kernel = normal(keys, shape, lead=lead, axes=axes, scale=scale)
        self.has_bias = bias
        if bias:
            outputs = (shape[0], shape[2])
            self.bias = constant(0.0, outputs, lead=lead, axes=(axes[0], axes[2]))

    def __call__(
        self, rows: Float[Array, "m i"], sizes: Int[Array, " x"], experts: Int[Array, " m"]
    ) -> Float[Array, "m o"]:
        """Maps rows that are sorted by expert; `sizes` of them belong to each."""
        kernel = self.kernel[...].astype(rows.dtype)
        y = lax.ragged_dot(rows, kernel, sizes, preferred_element_type=jnp.float32)
        return y + self.bias[...].astype(jnp.float32)[experts] if self.has_bias else y


class Router(nnx.Module):
    """Float32 scores of the experts for each token."""

    def __init__(self, keys: Keys, spec: DecoderSpec, moe: MoeSpec, *, lead: Shape) -> None:
        shape = (spec.hidden_size, moe.num_experts)
        self.kernel = normal(
            keys, shape, lead=lead, axes=("embed", None), scale=spec.initializer_range
        )
        self.has_bias = moe.router_bias
        if self.has_bias:
            self.bias = constant(0.0, shape[1:], lead=lead, axes=(None,))

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t x"]:
        kernel = self.kernel[...].astype(jnp.float32)
        logits = jnp.dot(x.astype(jnp.float32), kernel, precision=lax.Precision.HIGHEST)
        return logits + self.bias[...].astype(jnp.float32) if self.has_bias else logits


class Moe(nnx.Module):
    """The router and its experts, each a gated MLP."""

    def __init__(self, spec: DecoderSpec, keys: Keys, *, lead: Shape = ()) -> None:
        assert spec.moe is not None
        moe, d, f = spec.moe, spec.hidden_size, spec.intermediate_size

        def experts(shape: Shape, axes: Axes) -> ExpertMap:
            return ExpertMap(
                keys,
                (moe.num_experts, *shape),
                ("expert", *axes),
                bias=moe.expert_bias,
                scale=spec.initializer_range,
                lead=lead,
            )

        self.moe, self.act, self.dtype = moe, spec.hidden_act, spec.dtype
        self.router = Router(keys, spec, moe, lead=lead)
        self.gate = experts((d, f), ("embed", "mlp"))
        self.up = experts((d, f), ("embed", "mlp"))
        self.down = experts((f, d), ("mlp", "embed"))

    def __call__(
        self, x: Float[Array, "b s d"], real: Bool[Array, "b s"] | None = None
    ) -> tuple[Float[Array, "b s d"], Routing | None]:
        """Mixes the chosen experts' outputs; with `real` also counts where those tokens went."""
        k, d = self.moe.experts_per_token, x.shape[-1]
        flat = x.reshape(-1, d)
        probs = jax.nn.softmax(self.router(flat), axis=-1)
        weights, chosen = lax.top_k(probs, k)
        if self.moe.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

        visits = chosen.reshape(-1)
        order = jnp.argsort(visits, stable=True)
        experts = visits[order]
        sizes = jnp.bincount(visits, length=self.moe.num_experts).astype(jnp.int32)
        rows = flat.astype(self.dtype)[order // k]
        gate, up = (each(rows, sizes, experts) for each in (self.gate, self.up))
        mixed = self._gated(gate, up).astype(self.dtype)
        out = self.down(mixed, sizes, experts)
        # Back by a gather: a scatter would add in no fixed order on some devices.
        back = out[jnp.argsort(order)].reshape(-1, k, d)
        y = jnp.sum(back * weights[..., None], axis=1).reshape(x.shape)
        return y, None if real is None else _routing(probs, chosen, real.reshape(-1))

    def nowhere(self) -> Routing:
        """The routing of no token."""
        none = jnp.zeros(self.moe.num_experts, jnp.float32)
        return Routing(none, none, jnp.float32(0))

    def _gated(self, gate: Array, up: Array) -> Array:
        limit = self.moe.clamp
        if limit is None:
            return ACTIVATIONS[self.act](gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(self.moe.alpha * gate) * (up + 1.0)


def _routing(
    probs: Float[Array, "t x"], chosen: Int[Array, "t k"], real: Bool[Array, " t"]
) -> Routing:
    weight = real.astype(jnp.float32)
    visits = jnp.sum(jax.nn.one_hot(chosen, probs.shape[1], dtype=jnp.float32), axis=1)
    return Routing(weight @ visits, weight @ probs, jnp.sum(weight))
