"""Logical axis names, and the hooks through which activations get a layout.

A model says what an axis means; `sharding.rules` decides which mesh axis, if any, it is cut over,
by installing a resolver. Without one, `constrain` is the identity, and `per_shard` too.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Protocol

import jax

from jrlhf.ops import layout

Axes = tuple[str | None, ...]
Resolver = Callable[[jax.Array, Axes], jax.Array]
ArrayFunction = Callable[..., jax.Array]


class Shards(Protocol):
    """The devices that a program is for, as far as a kernel must know them."""

    @property
    def platform(self) -> str:
        """As `ops.layout.platform`."""

    def cuts(self, axis: str, size: int) -> int:
        """Into how many parts an axis of this size is cut."""

    def map(self, function: ArrayFunction, inputs: tuple[Axes, ...]) -> ArrayFunction:
        """See `per_shard`."""


# Of parameters. A stack of layers has "layers" in front. None: never cut.
PARAMETER_AXES = ("layers", "vocab", "embed", "heads", "kv_heads", "mlp", "expert")
# Of activations. Their embed axis is None: it stays whole where parameters are cut along "embed".
ACTIVATION_AXES = ("batch", "sequence", "heads", "kv_heads", "mlp")

_resolver: contextvars.ContextVar[Resolver | None] = contextvars.ContextVar(
    "jrlhf_axes_resolver", default=None
)

_shards: contextvars.ContextVar[Shards | None] = contextvars.ContextVar(
    "jrlhf_axes_shards", default=None
)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Asks for the layout of an activation whose axes have these names (None: not cut)."""
    resolver = _resolver.get()
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names {axes} for an array of shape {x.shape}.")
    return x if resolver is None else resolver(x, axes)


def cuts(axis: str, size: int) -> int:
    """Into how many parts an axis of this name and size is cut; 1 without a mesh."""
    shards = _shards.get()
    return 1 if shards is None else shards.cuts(axis, size)


def per_shard(function: ArrayFunction, *inputs: Axes) -> ArrayFunction:
    """The function, run on every device on its own parts of the arguments.

    For kernels that the compiler cannot cut by itself.

    Args:
        function: of arrays; what it does along an axis that is cut must not mix the parts. Its
            result has the layout of its first argument.
        *inputs: axis names of each argument. An axis named None is whole on every device.
    """
    shards = _shards.get()
    return function if shards is None else shards.map(function, inputs)


@contextlib.contextmanager
def resolve_with(resolver: Resolver | None, shards: Shards | None = None) -> Iterator[None]:
    """Installs the hooks for the duration of a block (while functions are traced)."""
    tokens = _resolver.set(resolver), _shards.set(shards)
    try:
        with layout.target(None if shards is None else shards.platform):
            yield
    finally:
        _resolver.reset(tokens[0])
        _shards.reset(tokens[1])
