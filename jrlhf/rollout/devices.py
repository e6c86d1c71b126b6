"""Between host arrays and the device mesh: the few calls that every rollout part shares."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jrlhf.errors import MeshError
from jrlhf.sharding import place, rules
from jrlhf.types import Batch, PyTree


def put(mesh: jax.sharding.Mesh | None, batch: Mapping[str, np.ndarray]) -> Batch:
    """Host arrays on the device; rows over the mesh's data and fsdp axes."""
    if mesh is None:
        return {name: jax.numpy.asarray(x) for name, x in batch.items()}
    return place.put_batch(mesh, dict(batch))


def everywhere(mesh: jax.sharding.Mesh | None, tree: PyTree) -> PyTree:
    """Host arrays whole on every device."""
    return jax.device_put(tree, None if mesh is None else place.replicated(mesh))


def active(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which a model's logical axes mean `mesh`; nothing without a mesh."""
    return contextlib.nullcontext() if mesh is None else rules.activate(mesh)


def row_shards(mesh: jax.sharding.Mesh | None) -> int:
    """Into how many parts the rows of a batch are split."""
    if mesh is None:
        return 1
    return mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)


def to_host(x: jax.Array) -> np.ndarray:
    """This process's rows of a device array: all of them in a single process."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    parts = {s.index[0].start or 0: np.asarray(s.data) for s in x.addressable_shards}
    return np.concatenate([parts[start] for start in sorted(parts)], axis=0)


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def agree_max(number: int) -> int:
    """The largest of all processes' numbers."""
    return int(gather_rows(np.asarray([number])).max())


def own_rows(count: int) -> slice:
    """Which of `count` global rows this process holds: a contiguous share."""
    share, rest = divmod(count, jax.process_count())
    if rest:
        raise MeshError(f"{count} rows do not divide over {jax.process_count()} processes.")
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def gather_rows(x: np.ndarray) -> np.ndarray:
    """Every process's rows, in the order of the processes; the rows themselves in one process."""
    if jax.process_count() == 1:
        return x
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
