"""Any part of any tensor is read from its own ranges of the checkpoint."""

from __future__ import annotations

import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jrlhf.models.families import FAMILIES, family_of, spec_from_config
from jrlhf.models.pieces import _read, fill
from tests.models.test_families import SMALL

# What encoders call their sizes.
ENCODERS = SMALL | {
    "dim": 12, "hidden_dim": 20, "n_layers": 2, "n_heads": 3, "num_hidden_layers": 2,
    "conv_kernel_size": 3, "relative_attention": True, "position_buckets": 8, "num_labels": 2,
}  # fmt: skip


class Memory:
    """A checkpoint that lies in memory and counts what is read of it."""

    def __init__(self, tensors):
        self.tensors, self.read_entries, self.largest = tensors, 0, 0
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def read(self, name, index, shape):
        part = self.tensors[name].reshape(shape)[index]
        self.read_entries += part.size
        self.largest = max(self.largest, part.size)
        return part


def tensors_of(spec):
    """Every kind of tensor as (row, our array), and the checkpoint that holds them."""
    rows, held, count = [], {}, itertools.count()
    for row in family_of(spec).weights(spec):
        size = math.prod(row.shape)
        ours = (next(count) * 10_000 + np.arange(size)).reshape(row.shape)
        rows.append((row, ours))
        theirs = row.to_hf(ours)
        if row.part is not None:
            whole = held.setdefault(row.name, np.full(row.hf_shape, -1))
            row.part.put(whole, theirs)
            theirs = whole
        held[row.name] = theirs
    return rows, Memory(held)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_part_is_read_from_its_ranges_alone(family):
    spec = spec_from_config({"model_type": family, **ENCODERS})
    rng = np.random.default_rng(0)
    rows, memory = tensors_of(spec)
    for row, ours in rows:
        # Every cut of one axis, and some of all axes at once.
        whole = tuple((0, size) for size in row.shape)
        cuts = [
            (*whole[:axis], bounds, *whole[axis + 1 :])
            for axis, size in enumerate(row.shape)
            for bounds in itertools.combinations(range(size + 1), 2)
        ]
        cuts += [
            tuple(tuple(sorted(rng.choice(n + 1, 2, replace=False))) for n in row.shape)
            for _ in range(20)
        ]
        for bounds in cuts:
            cut = ours[tuple(slice(*bound) for bound in bounds)]
            memory.read_entries = 0
            np.testing.assert_array_equal(_read(memory, row, row.name, bounds), cut)
            assert memory.read_entries == cut.size


def test_devices_read_the_parts_of_a_fused_encoder_weight_once_each():
    if len(jax.devices()) < 6:
        pytest.skip("needs 6 devices")
    spec = spec_from_config({"model_type": "modernbert", **ENCODERS})
    rows, memory = tensors_of(spec)
    row, ours = next(pair for pair in rows if pair[0].path == ("layers", "attn", "qkv", "kernel"))
    assert row.shape == (12, 3, 3, 4)  # [d, q k v, h, e]
    mesh = jax.make_mesh(
        (2, 3), ("x", "y"), devices=jax.devices()[:6], axis_types=(AxisType.Auto,) * 2
    )
    sharding = NamedSharding(mesh, PartitionSpec(None, "x", None, "y"))
    places = {(0,): (row, row.name), (1,): (row, row.name)}
    leaf = fill((2, *row.shape), sharding, memory, places, "float32")
    np.testing.assert_array_equal(leaf, np.stack((ours, ours)))
    assert leaf.sharding == sharding
    assert memory.read_entries == leaf.size
    assert memory.largest <= ours.size // 6


def test_replicas_share_what_was_read():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    spec = spec_from_config({"model_type": "llama", **SMALL})
    rows, memory = tensors_of(spec)
    row, ours = rows[0]
    mesh = jax.make_mesh(
        (2, 2), ("x", "y"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2
    )
    sharding = NamedSharding(mesh, PartitionSpec(None, "y"))
    leaf = fill(row.shape, sharding, memory, {(): (row, row.name)}, "float32")
    np.testing.assert_array_equal(leaf, ours)
    assert memory.read_entries == ours.size
