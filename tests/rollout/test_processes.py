"""Two processes with two devices each collect what one process with four devices does."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.processes import finish, free_port

PROGRAM = """
    import hashlib, sys, typing
    from jrlhf.sharding.distributed import initialize
    initialize()
    import jax, numpy as np
    from jrlhf.algos import PPO
    from jrlhf.rollout.collect import Plan, Rollouts
    from jrlhf.rollout.devices import to_host
    from jrlhf.rollout.engine import Engine
    from jrlhf.rollout.rewards import RewardSuite
    from jrlhf.rollout.sampling import SamplingParams
    from jrlhf.rollout.score import Actor
    from jrlhf.sharding.mesh import make_mesh
    from jrlhf.sharding.place import params_shardings
    from tests.rollout.conftest import model

    net, params = model(value_head=True, num_hidden_layers=1)
    mesh = make_mesh("data=2,fsdp=2")
    shardings = params_shardings(net, params, mesh)
    params = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i, x=np.asarray(x): x[i]),
        params, shardings,
    )
    draw = np.random.default_rng(0)
    rows = [{"ids": draw.integers(3, 61, n).tolist(), "prompt": "p", "columns": {}}
            for n in (3, 1, 5, 4, 8, 2, 2, 6)]
    sampling = SamplingParams(max_new_tokens=6, eos_token_ids=(3, 4, 5, 6))
    source = Rollouts(
        Actor(net), PPO(), Engine(net, None, sampling, mesh=mesh),
        RewardSuite(lambda completion_ids: [float(len(c)) for c in completion_ids]),
        lambda rollout: rows, Plan(rows=8, batch_rows=4, micro_rows=4, prompt_length=8, seed=1),
        frozen={}, reference=params, mesh=mesh,
    )
    class State(typing.NamedTuple):
        params: typing.Any
    for step in range(2):
        batch = source.batch(step, State(params))
        assert batch["ids"].shape == (4, 14)
        own = 4 // jax.process_count()
        assert to_host(batch["ids"]).shape == (own, 14)
    total = float(jax.jit(lambda b: b["advantages"].sum())(batch))
    # To a file of its own: what Gloo says on stdout falls into the middle of lines.
    with open(sys.argv[1], "w") as file:
        for name in sorted(source._buffer):
            print(name, hashlib.sha256(source._buffer[name].tobytes()).hexdigest(), file=file)
        print("total", total, file=file)
"""


def run(count: int, index: int, port: int, output: Path) -> subprocess.Popen[str]:
    joined = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    root = str(Path(__file__).parents[2])
    environment = {k: v for k, v in os.environ.items() if k not in joined} | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(output)],
        env=environment | (joined if count > 1 else {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_collect_what_one_does(tmp_path: Path) -> None:
    port = free_port()
    files = [tmp_path / name for name in ("first of two", "second of two", "alone")]
    started = [run(2, 0, port, files[0]), run(2, 1, port, files[1]), run(1, 0, port, files[2])]
    finish(started, timeout=500)
    outputs = [file.read_text().splitlines() for file in files]
    assert len(outputs[0]) > 10
    collected = [[line for line in lines if not line.startswith("total ")] for lines in outputs]
    assert collected[0] == collected[1] == collected[2]
    # The loss is summed over devices, in whatever order their parts arrive: equal to rounding.
    totals = [float(lines[-1].removeprefix("total ")) for lines in outputs]
    assert totals == pytest.approx([totals[2]] * 3, abs=1e-5)
