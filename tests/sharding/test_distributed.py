"""Processes join from the environment; half a configuration is an error."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from jrlhf.errors import ConfigError
from jrlhf.sharding.distributed import initialize
from tests.processes import finish, free_port

FULL = {
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "0",
}


def test_without_the_variables_there_is_one_process():
    assert initialize({}) is False
    assert initialize({"JAX_NUM_PROCESSES": ""}) is False


@pytest.mark.parametrize("missing", sorted(FULL))
def test_a_missing_variable_is_named(missing):
    with pytest.raises(ConfigError, match=f"not {missing}"):
        initialize({k: v for k, v in FULL.items() if k != missing})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("JAX_NUM_PROCESSES", "two", "integer, got 'two'"),
        ("JAX_PROCESS_ID", "2", "JAX_PROCESS_ID=2 must lie between 0 and"),
    ],
)
def test_a_number_that_cannot_be_is_named(name, value, says):
    with pytest.raises(ConfigError, match=says):
        initialize({**FULL, name: value})


PROGRAM = """
    import sys
    import numpy as np
    from jrlhf.sharding.distributed import barrier, initialize, is_main
    assert initialize() and initialize()
    import jax, jax.numpy as jnp
    from jrlhf.sharding.mesh import make_mesh
    from jrlhf.sharding.place import put_batch
    assert jax.process_count() == 2 and is_main() == (jax.process_index() == 0)
    mesh = make_mesh("data=2,fsdp=2")
    mine = np.arange(4, dtype=np.float32) + 4 * jax.process_index()
    x = put_batch(mesh, {"x": mine})["x"]
    assert x.shape == (8,)
    barrier("all here")
    # To a file of its own: what Gloo says on stdout falls into the middle of lines.
    with open(sys.argv[1], "w") as file:
        print(float(jax.jit(jnp.sum)(x)), float(jax.jit(lambda x: x[-1])(x)), file=file)
"""


def test_two_processes_make_one_global_batch(tmp_path):
    port = free_port()
    environment = {
        **os.environ,
        **FULL,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / str(index))],
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    finish(processes, timeout=120)
    for index in range(2):
        assert (tmp_path / str(index)).read_text().split() == [f"{sum(range(8)):.1f}", "7.0"]
