"""Logical axes become mesh axes, each mesh axis at most once per array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jrlhf.errors import MeshError
from jrlhf.models.axes import ACTIVATION_AXES, PARAMETER_AXES, constrain
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.rules import DEFAULT, Rules, activate, spec_for

MESH = "data=2,fsdp=2,tensor=2"


def test_weights_are_cut_along_embed_and_heads():
    mesh = make_mesh(MESH)
    assert spec_for(("layers", "embed", "heads", None), (3, 8, 4, 16), mesh) == P(
        None, "fsdp", "tensor"
    )
    assert spec_for(("vocab", "embed"), (128, 8), mesh) == P("tensor", "fsdp")


def test_rows_are_cut_over_data_and_fsdp_together():
    mesh = make_mesh(MESH)
    assert spec_for(("batch", "sequence", None), (8, 16, 4), mesh) == P(("data", "fsdp"))


def test_every_name_that_models_use_has_a_rule():
    for name in (*PARAMETER_AXES, *ACTIVATION_AXES):
        assert isinstance(DEFAULT.of(name), tuple)


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh(MESH)
    assert spec_for(("embed", "kv_heads"), (8, 3), mesh) == P("fsdp")
    assert spec_for(("embed", "kv_heads"), (7, 3), mesh) == P()
    # 6 rows divide over data=2 but not over data × fsdp = 4.
    assert spec_for(("batch", None), (6, 3), mesh) == P("data")


def test_mesh_axes_of_one_device_leave_no_trace():
    mesh = make_mesh("fsdp=8")
    assert spec_for(("batch", "sequence", "mlp"), (8, 8, 8), mesh) == P("fsdp")


def test_two_dimensions_cannot_share_a_mesh_axis():
    mesh = make_mesh(MESH)
    with pytest.raises(MeshError, match=r"'batch' and 'embed'.*'fsdp'"):
        spec_for(("batch", "embed"), (8, 8), mesh)
    with pytest.raises(MeshError, match=r"'heads' and 'mlp'.*'tensor'"):
        spec_for(("heads", "mlp"), (7, 7), make_mesh("data=8"))


def test_unknown_names_are_named_on_both_sides():
    mesh = make_mesh(MESH)
    with pytest.raises(MeshError, match=r'Did you mean "heads"\?'):
        spec_for(("head",), (8,), mesh)
    with pytest.raises(MeshError, match=r"rule mlp names 'tensors'.*Did you mean \"tensor\""):
        Rules(mlp=("tensors",))
    with pytest.raises(MeshError, match=r"2 axis names"):
        spec_for(("embed", "heads"), (8,), mesh)


def test_constrain_lays_activations_out_inside_the_block_only():
    mesh = make_mesh(MESH)
    x = jnp.zeros((8, 4, 6))

    def inside(x):
        with activate(mesh):
            return constrain(x * 1, ("batch", "sequence", "mlp"))

    def outside(x):
        return constrain(x * 1, ("batch", "sequence", "mlp"))

    laid = jax.jit(inside)(x).sharding
    assert laid.spec == P(("data", "fsdp"), None, "tensor")
    assert len(jax.jit(outside)(x).sharding.device_set) == 1


def test_without_a_mesh_constrain_is_the_identity():
    x = jnp.ones((2, 2))
    with activate(None):
        assert constrain(x, ("batch", None)) is x
    with activate(make_mesh("data=1", devices=jax.devices()[:1])):
        assert constrain(x, ("batch", None)) is x
