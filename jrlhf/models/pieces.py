"""A leaf of the params from the ranges of a checkpoint that its devices want."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.models.families.weights import Weight
from jrlhf.models.hf.reader import Checkpoint
from jrlhf.models.match import VOCABULARY, At

# start and stop per axis
Bounds = tuple[tuple[int, int], ...]
Places = Mapping[At, tuple[Weight, str]]
# What the host holds of a device's part at a time; a larger part is joined on the device.
_HELD = 256 * 2**20


def fill(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    checkpoint: Checkpoint,
    places: Places,
    dtype: str,
) -> jax.Array:
    """Makes one leaf.

    Each part is read once, laid on the devices that want it and forgotten before the next is read:
    the host never holds more than one, and of a large one never more than `_HELD` bytes.

    Args:
        shape: of the leaf.
        sharding: of the leaf; this process reads for its own devices.
        checkpoint: where from.
        places: which tensor is at each index of the stacked axes.
        dtype: of the leaf.
    """
    owners: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    pieces: list[jax.Array] = []
    for bounds, devices in owners.items():
        homes = [
            jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            for device in devices
        ]
        blocks = _blocks(bounds, np.dtype(dtype).itemsize)
        if len(blocks) == 1:
            part = _read_part(checkpoint, places, bounds, np.dtype(dtype))
            pieces += [jax.block_until_ready(jax.device_put(part, home)) for home in homes]
            continue
        sizes = tuple(stop - start for start, stop in bounds)
        wholes = [jnp.zeros(sizes, dtype, device=home) for home in homes]
        for block in blocks:
            part = _read_part(checkpoint, places, (block, *bounds[1:]), np.dtype(dtype))
            at = np.int32(block[0] - bounds[0][0])
            wholes = [
                jax.block_until_ready(_put(whole, jax.device_put(part, home), at))
                for whole, home in zip(wholes, homes, strict=True)
            ]
        pieces += wholes
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _blocks(bounds: Bounds, itemsize: int) -> list[tuple[int, int]]:
    """The first axis in equal blocks (the last may be smaller) of at most `_HELD` bytes."""
    if not bounds:
        return [(0, 1)]
    (start, stop), rest = bounds[0], bounds[1:]
    row = itemsize * math.prod(last - first for first, last in rest)
    step = max(_HELD // max(row, 1), 1)
    return [(at, min(at + step, stop)) for at in range(start, stop, step)] or [(start, stop)]


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, at: np.int32) -> jax.Array:
    """Writes rows into an array in place."""
    return jax.lax.dynamic_update_slice_in_dim(whole, part, at, axis=0)


def _read_part(
    checkpoint: Checkpoint, places: Places, bounds: Bounds, dtype: np.dtype[Any]
) -> np.ndarray:
    out = np.zeros(tuple(stop - start for start, stop in bounds), dtype)
    stacked = len(next(iter(places), ()))
    for at in itertools.product(*(range(*bound) for bound in bounds[:stacked])):
        here = out[tuple(i - start for i, (start, _) in zip(at, bounds))]
        if at not in places:
            continue  # a layer that has no such tensor: there it acts on nothing
        row, name = places[at]
        wanted = tuple(
            (start, min(stop, size))
            for (start, stop), size in zip(bounds[stacked:], row.shape, strict=True)
        )
        if all(start < stop for start, stop in wanted):  # else all of it is padding
            held = here[tuple(slice(stop - start) for start, stop in wanted)]
            held[...] = _read(checkpoint, row, name, wanted)
    return out


def _read(checkpoint: Checkpoint, row: Weight, name: str, bounds: Bounds) -> np.ndarray:
    """A part of one tensor, in our layout."""
    shape, index = row.view(tuple(slice(*bound) for bound in bounds))
    if row.path in VOCABULARY:  # a checkpoint may have rows that are no tokens
        shape = (checkpoint.shapes[name][0], *shape[1:])
    sizes = tuple(stop - start for start, stop in bounds)
    return row.from_hf(checkpoint.read(name, index, shape), sizes)
