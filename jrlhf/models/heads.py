"""What sits on the final hidden state: next-token weights, a classifier, a value."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jrlhf.models.layers import Keys, constant, normal


class CausalHead(nnx.Module):
    """What maps hidden states to logits besides a tied embedding: a kernel, a bias, or both.

    Only the arrays are handed out (contract 4).
    """

    def __init__(
        self, keys: Keys, *, embed: int, vocab: int, scale: float, kernel: bool, bias: bool
    ) -> None:
        if kernel:
            axes = ("embed", "vocab")
            self.kernel = normal(keys, (embed, vocab), lead=(), axes=axes, scale=scale)
        if bias:
            self.bias = constant(0.0, (vocab,), lead=(), axes=("vocab",))


class Readout(nnx.Module):
    """A small float32 linear map on hidden states: scores of a classifier, or a value."""

    def __init__(self, keys: Keys, *, embed: int, outputs: int, bias: bool, scale: float) -> None:
        self.kernel = normal(keys, (embed, outputs), lead=(), axes=("embed", None), scale=scale)
        if bias:
            self.bias = constant(0.0, (outputs,), lead=(), axes=(None,))
        self.has_bias = bias

    def __call__(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows n"]:
        kernel = self.kernel[...].astype(jnp.float32)
        contract = (((hidden.ndim - 1,), (0,)), ((), ()))
        y = lax.dot_general(
            hidden.astype(jnp.float32), kernel, contract, precision=lax.Precision.HIGHEST
        )
        return y + self.bias[...].astype(jnp.float32) if self.has_bias else y


def last_token(hidden: Float[Array, "b s d"], lengths: Int[Array, " b"]) -> Float[Array, "b d"]:
    """The hidden state of each row's last real token; of position 0 in an empty row."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]
