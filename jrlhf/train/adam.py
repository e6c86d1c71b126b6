"""Adam's moments, made in place (Kingma and Ba, 2015, arXiv:1412.6980)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from jrlhf.types import PyTree


class Moments(NamedTuple):
    """The state of `scale_by_adam`.

    A step that may be left out gives `good` to the update, which then returns the old moments;
    `choose` relies on it, so a transformation around this one has to pass the argument on.

    Attributes:
        count: updates so far; named as in optax's state, and so in checkpoints.
        mu: means of the gradient, in the params' shapes.
        nu: means of its square.
    """

    count: Int[Array, ""]  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with the argument `good`: where False, the moments stay as they are.

    Left to itself XLA on CPUs makes the moments a second time within the parameters' update. That
    reads the old ones, so both are copied before they are overwritten. Here they are chosen first,
    and what was chosen is read.
    """
    plain = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def init(params: PyTree) -> Moments:
        return Moments(*plain.init(params))  # type: ignore[misc]

    def update(
        gradient: PyTree,
        state: Moments,
        params: PyTree | None = None,
        *,
        good: bool | Bool[Array, ""] = True,
        **_: Any,
    ) -> tuple[PyTree, Moments]:
        moved = Moments(
            optax.safe_increment(state.count),
            optax.tree.update_moment(gradient, state.mu, b1, 1),
            optax.tree.update_moment_per_elem_norm(gradient, state.nu, b2, 2),
        )
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, state)
        mean = optax.tree.bias_correction(kept.mu, b1, moved.count)
        square = optax.tree.bias_correction(kept.nu, b2, moved.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), kept

    return optax.GradientTransformationExtraArgs(init, update)


def choose(good: bool | Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """New leaves where `good`, else old ones; `Moments` have chosen for themselves."""

    def one(a: Any, b: Any) -> Any:
        return a if isinstance(a, Moments) else jnp.where(good, a, b)

    return jax.tree.map(one, new, old, is_leaf=lambda x: isinstance(x, Moments))
