"""Placement: which sharding every parameter, optimizer moment and batch row gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jrlhf.models.build_encoder import AnyNet
from jrlhf.models.quantize import is_quantized
from jrlhf.sharding.mesh import BATCH_AXES, check_batch
from jrlhf.sharding.rules import DEFAULT, Rules, spec_for
from jrlhf.types import PyTree


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def params_shardings(net: AnyNet, abstract: PyTree, mesh: Mesh, rules: Rules = DEFAULT) -> PyTree:
    """A sharding per parameter, from the logical axes that the net declares.

    Args:
        net: gives the axes.
        abstract: params or their shapes; a sub-tree of the net's params is fine (`partition`).
        mesh: where to.
        rules: logical to mesh axes.
    """
    return axes_shardings(_like(net.axes(), abstract), abstract, mesh, rules)


def axes_shardings(axes: PyTree, abstract: PyTree, mesh: Mesh, rules: Rules = DEFAULT) -> PyTree:
    """The same for any tree of arrays with a tuple of logical axis names per array."""

    def one(leaf: Any, names: tuple[str | None, ...]) -> Any:
        if is_quantized(leaf):  # codes and scales have the kernel's axes
            return jax.tree.map(lambda part: one(part, names), leaf)
        return NamedSharding(mesh, spec_for(names, leaf.shape, mesh, rules))

    return jax.tree.map(one, abstract, axes, is_leaf=is_quantized)


def _like(tree: PyTree, wanted: PyTree) -> PyTree:
    """The entries of a nested dict that another one has."""
    if not isinstance(wanted, Mapping):
        return tree
    empty = {key for key, value in wanted.items() if isinstance(value, Mapping) and not value}
    return {key: {} if key in empty else _like(tree[key], wanted[key]) for key in wanted}


def optimizer_shardings(
    tx: optax.GradientTransformation, params: PyTree, shardings: PyTree
) -> PyTree:
    """A sharding per leaf of `tx.init(params)`: moments lie like their parameters.

    A moment is recognised by the end of its path, which is its parameter's path, and by its shape;
    so wrappers that mask or partition the tree do not matter. Everything else (counters, factored
    statistics) is replicated.

    Args:
        tx: the optimizer.
        params: parameters or their shapes.
        shardings: their shardings, in the same structure; at least one.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    shapes = jax.tree_util.tree_flatten_with_path(params)[0]
    known = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(shapes, jax.tree.leaves(shardings), strict=True)
    }

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = known.get(path[start:], (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(tx.init, params))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    axes = tuple(name for name in BATCH_AXES if mesh.shape[name] > 1)
    if not axes:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(axes if len(axes) > 1 else axes[0]))


def batch_shardings(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """A sharding per entry of a batch; scalars are replicated."""
    rows, whole = batch_sharding(mesh), replicated(mesh)
    return {name: rows if np.ndim(value) else whole for name, value in batch.items()}


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Makes global arrays of this process's rows.

    Args:
        mesh: where to.
        batch: numpy arrays; the leading axis is the example. Each process passes its own rows, in
            the order of the processes; scalars must be the same on all of them.

    Returns:
        Arrays whose leading axis is cut over data and fsdp.

    Raises:
        MeshError: the rows do not divide over these axes.
    """
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    for name, value in arrays.items():
        if value.ndim:
            check_batch(len(value) * jax.process_count(), mesh, what=f"batch ({name!r})")
    return {
        name: jax.make_array_from_process_local_data(sharding, arrays[name])
        for name, sharding in batch_shardings(mesh, arrays).items()
    }
