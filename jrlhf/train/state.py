"""The training state: trainable parameters, optimizer state and two counters, born sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jrlhf.sharding.place import optimizer_shardings, replicated
from jrlhf.types import PyTree


class TrainState(NamedTuple):
    """What a step maps to its successor.

    Attributes:
        step: batches consumed, int32.
        skipped: updates left out, because a gradient was not finite or no token was trained on.
        params: trainable parameters, float32.
        opt_state: optax state of `params`.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: PyTree
    opt_state: PyTree


def state_shardings(
    tx: optax.GradientTransformation, params: PyTree, shardings: PyTree
) -> TrainState:
    """A sharding per leaf of the state.

    Args:
        tx: the optimizer.
        params: trainable parameters or their shapes.
        shardings: their shardings.
    """
    masters = jax.eval_shape(_masters, params)
    whole = replicated(jax.tree.leaves(shardings)[0].mesh)
    moments = optimizer_shardings(tx, masters, shardings)
    return TrainState(whole, whole, shardings, moments)  # type: ignore[arg-type]


def new_state(
    params: PyTree | Callable[[], PyTree],
    tx: optax.GradientTransformation,
    *,
    shardings: TrainState | None = None,
    donate: bool = False,
) -> TrainState:
    """Makes the first state inside jit, so that no unsharded copy of anything ever exists.

    Args:
        params: trainable parameters, or a traceable function that makes them. Arrays are copied:
            the step donates the state, and the caller's arrays must survive that.
        tx: the optimizer.
        shardings: from `state_shardings`; None: wherever the parameters are.
        donate: takes the caller's arrays instead of copying them.
    """

    def make(given: PyTree) -> TrainState:
        masters = _masters(params() if callable(params) else given)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, masters, tx.init(masters))

    given = None if callable(params) else params
    return jax.jit(make, out_shardings=shardings, donate_argnums=(0,) if donate else ())(given)


def _masters(params: PyTree) -> PyTree:
    """Float32 copies; an explicit copy, because jit hands an unchanged input back as it is."""
    return jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), params)


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a tree of arrays, without their values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
