"""How arrays lie in memory, where that decides what a dot costs."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
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


def written(x: Array) -> Array:
    """`x` as it is written, last axis innermost: on a CPU, a transpose in front of it is made.

    Left to itself, XLA's CPU backend gives a transposed operand the other layout and then has no
    bfloat16 dot for it: it widens both operands to float32, at half the speed, or (from JAX 0.11
    on) refuses to run it. Batched float32 dots over the rows of both lose as much.
    """
    if platform() != "cpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
