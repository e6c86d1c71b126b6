"""Mesh values: text, mapping and devices agree, or a named error says what would."""

from __future__ import annotations

import math

import jax
import pytest
from jax.sharding import AxisType

from jrlhf.errors import MeshError
from jrlhf.sharding.mesh import (
    AXES,
    check_batch,
    data_shards,
    factorisations,
    make_mesh,
    parse_mesh,
)


def test_text_and_mapping_mean_the_same():
    wanted = {"data": 1, "fsdp": 4, "tensor": 2}
    assert parse_mesh("data=1,fsdp=4,tensor=2") == wanted
    assert parse_mesh(" tensor=2 , fsdp=4, data=1,") == wanted
    assert parse_mesh(wanted) == wanted
    assert parse_mesh({"tensor": "2", "fsdp": 4.0, "data": 1}) == wanted
    assert list(parse_mesh("tensor=2,data=1,fsdp=4")) == ["data", "fsdp", "tensor"]


@pytest.mark.parametrize("nothing", [None, "", {}])
def test_nothing_said_puts_all_devices_on_data(nothing):
    assert make_mesh(nothing).shape["data"] == len(jax.devices())


def test_minus_one_takes_what_is_left():
    assert make_mesh("fsdp=-1").shape["fsdp"] == 8
    mesh = make_mesh({"tensor": 2, "fsdp": -1})
    assert (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]) == (1, 4, 2)


def test_every_axis_is_there_and_left_to_the_compiler():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_subset_of_the_devices_makes_a_smaller_mesh():
    assert make_mesh("data=1,fsdp=2", devices=jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("fdsp=4", ["fdsp", 'Did you mean "fsdp"?']),
        ("fsdp", ["fsdp", "data=1,fsdp=4,tensor=2"]),
        ("fsdp=2,fsdp=4", ["fsdp", "twice"]),
        ("fsdp=two", ["fsdp", "two"]),
        ("fsdp=0", ["fsdp", "0"]),
        ({"fsdp": -2}, ["fsdp", "-2"]),
        ({"fsdp": 1.5}, ["fsdp", "1.5"]),
        ({"fsdp": True}, ["fsdp", "True"]),
        ({"fsdp": None}, ["fsdp", "None"]),
        ("data=-1,fsdp=-1", ["data=-1,fsdp=-1"]),
    ],
)
def test_a_mesh_that_makes_no_sense_is_named(value, names):
    with pytest.raises(MeshError) as error:
        parse_mesh(value)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("shape", ["fsdp=3", "data=2,fsdp=2", "fsdp=16", "tensor=3,fsdp=-1"])
def test_a_mesh_that_does_not_fit_lists_those_that_do(shape):
    with pytest.raises(MeshError) as error:
        make_mesh(shape)
    listed = str(error.value).split("Nearest that fit: ")[1].rstrip(".").split("; ")
    assert "8 devices" in str(error.value)
    assert listed
    for text in listed:
        assert math.prod(parse_mesh(text).values()) == 8
        make_mesh(text)


def test_the_nearest_factorisation_comes_first():
    with pytest.raises(MeshError, match=r"Nearest that fit: fsdp=4,tensor=2;"):
        make_mesh("fsdp=4,tensor=3")


@pytest.mark.parametrize("count", [1, 6, 8, 12])
def test_factorisations_are_all_of_them(count):
    axes = ["data", "fsdp", "tensor"]
    sizes = range(1, count + 1)
    brute = [
        {"data": a, "fsdp": b, "tensor": c}
        for a in sizes
        for b in sizes
        for c in sizes
        if a * b * c == count
    ]
    assert factorisations(count, axes) == brute


def test_a_batch_must_divide_over_data_shards_and_micro_batches():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    assert data_shards(mesh) == 4
    check_batch(8, mesh)
    check_batch(24, mesh, accumulate=3)
    with pytest.raises(MeshError, match=r"10 rows .*data=2 × fsdp=2 = 4.* 8 or 12\."):
        check_batch(10, mesh)
    with pytest.raises(MeshError, match=r"3 micro-batches = 12.* 12\."):
        check_batch(8, mesh, accumulate=3)
    with pytest.raises(MeshError, match=r"0 rows"):
        check_batch(0, mesh)
