"""How programs are compiled and arrays lie in memory, where that decides what a dot costs."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("jrlhf_target", default=None)


def platform() -> str:
    """What the program in the making is for: "cpu", "cuda", "rocm" or "tpu"."""
    return _target.get() or platform_of(jax.local_devices()[0])


def platform_of(device: jax.Device) -> str:
    """ "cpu", "cuda", "rocm" or "tpu"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


@contextlib.contextmanager
def target(name: str | None) -> Iterator[None]:
    """Programs that are traced in this block are for another platform than this process's."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


LOOPS = "while-loop-invariant-code-motion"


def compiler_options(mesh: jax.sharding.Mesh | None = None) -> dict[str, str] | None:
    """For `jax.jit`, of programs that scan over layers; the mesh says for what platform.

    On CPUs XLA's pass that moves code out of loops is left out. XLA has no slices of bfloat16
    there, and what it moves is the widening of a whole stack: of weights, or of all that layers
    keep for the way back. Passes that XLA_FLAGS leaves out are left out too.
    """
    here = platform() if mesh is None else platform_of(mesh.devices.flat[0])
    if here != "cpu":
        return None
    given = re.findall(r"--xla_disable_hlo_passes=(\S+)", os.environ.get("XLA_FLAGS", ""))
    return {"xla_disable_hlo_passes": ",".join([*given[-1:], LOOPS])}


class jit:
    """`jax.jit` with `compiler_options`, made at the first call: an import starts no backend.

    Called while another program is traced it becomes a part of that one, whose own options count:
    JAX takes options for whole programs alone.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        mesh: jax.sharding.Mesh | None = None,
        **options: Any,
    ) -> None:
        functools.update_wrapper(self, function)
        self._part: Any = jax.jit(function, **options)

        def whole() -> Any:
            wanted = compiler_options(mesh)
            return jax.jit(function, compiler_options=wanted, **options) if wanted else self._part

        self._whole = functools.cache(whole)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        whole = self._whole()
        if whole is not self._part and _traced((args, kwargs)):
            return self._part(*args, **kwargs)
        return whole(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self._whole().lower(*args, **kwargs)

    def _cache_size(self) -> int:
        return int(self._whole()._cache_size())


def _traced(tree: Any) -> bool:
    """Whether a program is being traced, or a gradient taken, where this is called."""
    # Within a program every new array is traced. This one comes without a transfer.
    leaves = (lax.iota(jnp.int32, 1), *jax.tree.leaves(tree))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def written(x: Array) -> Array:
    """`x` as it is written, last axis innermost: on a CPU, a transpose in front of it is made.

    Left to itself, XLA's CPU backend gives a transposed operand the other layout and then has no
    bfloat16 dot for it: it widens both operands to float32, at half the speed, or (from JAX 0.11
    on) refuses to run it. Batched float32 dots over the rows of both lose as much.
    """
    if platform() != "cpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def rows_last(x: Array) -> Array:
    """[rows, ...] -> [..., rows], written so.

    On a CPU in two passes, by panels of one cache line: read in one pass, column by column, every
    number of a wide array brings a line of its own.
    """
    width, size = 64 // x.dtype.itemsize, math.prod(x.shape[1:])
    if platform() != "cpu" or size % width:
        return written(jnp.moveaxis(x, 0, -1))
    panels = x.reshape(-1, size // width, width).transpose(1, 0, 2)
    panels = lax.optimization_barrier(written(panels))
    return written(panels.transpose(0, 2, 1)).reshape(*x.shape[1:], x.shape[0])


@jax.custom_vjp
def joined(first: Array, second: Array) -> Array:
    """[... m], [... n] -> [... m + n].

    On a CPU as a choice between the two, padded, which is part of what comes before and after.
    Newer XLA makes the parts of a concatenation apart and copies them: turning queries took it
    2.4 times as long (JAX 0.12).
    """
    if platform() != "cpu":
        return jnp.concatenate((first, second), axis=-1)
    m, n = first.shape[-1], second.shape[-1]
    others = [(0, 0, 0)] * (first.ndim - 1)
    zero = jnp.zeros((), first.dtype)
    return jnp.where(
        jnp.arange(m + n) < m,
        lax.pad(first, zero, [*others, (0, n, 0)]),
        lax.pad(second, zero, [*others, (m, 0, 0)]),
    )


# Two slices: left to autodiff, the gradient of the choice is made first. Kept for them: a size.
joined.defvjp(
    lambda first, second: (joined(first, second), jnp.zeros((0, first.shape[-1]))),
    lambda like, g: (g[..., : like.shape[-1]], g[..., like.shape[-1] :]),
)
