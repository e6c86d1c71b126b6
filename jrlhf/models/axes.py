"""Logical axis names, and the one hook through which activations get a layout.

A model says what an axis means; `sharding.rules` decides which mesh axis, if any, it is cut over,
by installing a resolver. Without one, `constrain` is the identity.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

Axes = tuple[str | None, ...]
Resolver = Callable[[jax.Array, Axes], jax.Array]

# Of parameters. A stack of layers has "layers" in front. None: never cut.
PARAMETER_AXES = ("layers", "vocab", "embed", "heads", "kv_heads", "mlp", "expert")
# Of activations. Their embed axis is None: it stays whole where parameters are cut along "embed".
ACTIVATION_AXES = ("batch", "sequence", "heads", "kv_heads", "mlp")

_resolver: contextvars.ContextVar[Resolver | None] = contextvars.ContextVar(
    "jrlhf_axes_resolver", default=None
)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Asks for the layout of an activation whose axes have these names (None: not cut)."""
    resolver = _resolver.get()
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names {axes} for an array of shape {x.shape}.")
    return x if resolver is None else resolver(x, axes)


@contextlib.contextmanager
def resolve_with(resolver: Resolver | None) -> Iterator[None]:
    """Installs the resolver for the duration of a block (while functions are traced)."""
    token = _resolver.set(resolver)
    try:
        yield
    finally:
        _resolver.reset(token)
