"""Compiles for a TPU on a machine without one: does it fit, and with which kernel?

    pip install 'jax[tpu]'                    # brings libtpu, the compiler (200 MB)
    JAX_PLATFORMS=cpu python benchmarks/compile_tpu.py [--quick]

The SFT step and the sampling loop of Llama models, laid out over a topology of TPU chips by the
trainer's own functions. Nothing runs: the numbers are the compiler's own account of the program.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

# No TPU's metadata server is asked, and the process itself computes on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from jrlhf.models.build import Net, partition
from jrlhf.models.spec import DecoderSpec, RopeSpec
from jrlhf.ops import logps
from jrlhf.rollout.sampling import SamplingParams, sample
from jrlhf.rollout.score import Actor
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.place import batch_shardings, params_shardings, replicated
from jrlhf.train.optim import make_optimizer
from jrlhf.train.state import TrainState, state_shardings
from jrlhf.train.step import make_step
from jrlhf.trainers.sft import SFTConfig

TOPOLOGY, CHIPS = "v5e:4x4", 16
HBM_GIB = {"v5e": 16.0}
ROPE = RopeSpec(rope_type="llama3", rope_theta=5e5, factor=8.0)


def llama(**sizes: Any) -> DecoderSpec:
    """A Llama in bfloat16 that recomputes its layers."""
    fields = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope": ROPE,
              "dtype": "bfloat16", "remat": "full", "norm_eps": 1e-5}  # fmt: skip
    return DecoderSpec(**{**fields, **sizes})


SPECS = {
    "tiny": llama(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=128,
    ),
    "Llama 3.2 1B": llama(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "Llama 3.1 8B": llama(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    ),
}  # fmt: skip


def topology_mesh(shape: str, name: str = TOPOLOGY) -> Mesh:
    """A mesh of chips that are not here."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    # So many chips share a chunk of the logits, not the one device of the machine that compiles.
    logps.CHUNK_BYTES["tpu"] = logps.CHUNK_BYTES_PER_DEVICE * len(found.devices)
    return make_mesh(shape, devices=found.devices)


def shaped(tree: Any, shardings: Any) -> Any:
    """Shapes with their layouts: what a program is compiled for."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def sft_step(spec: DecoderSpec, mesh: Mesh, *, rows: int, length: int, packed: bool) -> Any:
    """The trainer's SFT step, lowered for the mesh."""
    net = Net(spec)
    args = SFTConfig(output_dir="unused", bf16=True)
    trainable, frozen = partition(net.abstract(), net)
    axes = partition(net.axes(), net)[0]
    tx, schedule = make_optimizer(args, 100, axes=axes)
    placed = params_shardings(net, trainable, mesh)
    shardings = state_shardings(tx, trainable, placed)
    actor = Actor(net)

    def loss(trainable: Any, frozen: Any, batch: Any) -> Any:
        return actor.loss(args, trainable, frozen, batch, entropy=True)

    step = make_step(loss, tx, max_grad_norm=1.0, mesh=mesh, shardings=shardings, schedule=schedule)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, count, trainable, jax.eval_shape(tx.init, trainable))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch: dict[str, Any] = {
        "ids": ids,
        "lengths": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((rows, length), jnp.float32),
    }
    if packed:
        batch |= {"segments": ids, "positions": ids}
    return step.lower(shaped(state, shardings), frozen, shaped(batch, batch_shardings(mesh, batch)))


def sampling(spec: DecoderSpec, mesh: Mesh, *, rows: int, prompt: int, new: int) -> Any:
    """The sampling loop, lowered for the mesh; rows over data and fsdp, heads over tensor."""
    net = Net(spec.replace(remat="none"))
    abstract = net.abstract()
    params = shaped(abstract, params_shardings(net, abstract, mesh))
    prompts = {
        "ids": jax.ShapeDtypeStruct((rows, prompt), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    prompts = shaped(prompts, batch_shardings(mesh, prompts))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=replicated(mesh))
    params_of = SamplingParams(max_new_tokens=new, eos_token_ids=(1,))
    return sample.lower(net, params, prompts["ids"], prompts["lengths"], keys, params_of, mesh=mesh)


def facts(lowered: Any) -> dict[str, Any]:
    """Compiles, and says what the compiler says of one device's program."""
    begun = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # Not a failure of this program, but its answer: so much would be needed.
        needed = re.search(r"HLO temporaries \(([\d.]+)G\) exceeds", str(error))
        if needed is None:
            raise
        names = (
            "compile s",
            "arguments GiB",
            "temporary GiB",
            "peak GiB",
            "Pallas calls",
            "collectives",
        )
        seconds = round(time.perf_counter() - begun, 1)
        return dict.fromkeys(names) | {
            "compile s": seconds,
            "temporary GiB": float(needed[1]),
            "peak GiB": "too much",
        }
    seconds = time.perf_counter() - begun
    memory, text = compiled.memory_analysis(), compiled.as_text()
    gib = 2**30
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "compile s": round(seconds, 1),
        "arguments GiB": round(memory.argument_size_in_bytes / gib, 3),
        "temporary GiB": round(memory.temp_size_in_bytes / gib, 3),
        "peak GiB": round((held + memory.temp_size_in_bytes) / gib, 3),
        "Pallas calls": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "collectives": len(
            re.findall(r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all)", text)
        ),
    }


PROGRAMS = [
    # (model, mesh, attention, program, sizes)
    ("Llama 3.2 1B", "data=1,fsdp=4,tensor=4", "auto", "sft", {"rows": 16, "length": 4096}),
    ("Llama 3.2 1B", "data=1,fsdp=4,tensor=4", "xla", "sft", {"rows": 16, "length": 4096}),
    ("Llama 3.1 8B", "data=1,fsdp=4,tensor=4", "auto", "sft", {"rows": 16, "length": 4096}),
    ("Llama 3.1 8B", "data=1,fsdp=4,tensor=4", "auto", "sft", {"rows": 4, "length": 4096}),
    ("Llama 3.1 8B", "data=1,fsdp=4,tensor=4", "xla", "sft", {"rows": 4, "length": 4096}),
    ("Llama 3.2 1B", "data=1,fsdp=4,tensor=4", "auto", "sample",
     {"rows": 64, "prompt": 512, "new": 512}),
]  # fmt: skip
QUICK = [
    ("tiny", "data=1,fsdp=4,tensor=4", "auto", "sft", {"rows": 8, "length": 512}),
    ("tiny", "data=1,fsdp=4,tensor=4", "xla", "sft", {"rows": 8, "length": 512}),
    ("tiny", "data=1,fsdp=4,tensor=4", "auto", "sample", {"rows": 8, "prompt": 128, "new": 128}),
]


def run(name: str, shape: str, attention: str, program: str, sizes: dict[str, int]) -> Any:
    """One row of the table."""
    mesh, spec = topology_mesh(shape), SPECS[name].replace(attention=attention)
    if program == "sft":
        lowered = sft_step(spec, mesh, packed=True, **sizes)
    else:
        lowered = sampling(spec, mesh, **sizes)
    tokens = " x ".join(str(size) for size in sizes.values())
    row = {"model": name, "program": program, "sizes": tokens, "attention": attention}
    return row | facts(lowered)


def main() -> None:
    # Only now: measure and its neighbours are found beside this file.
    from measure import report, write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--only", help="a part of a model's name")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    options = parser.parse_args()
    rows = []
    for program in QUICK if options.quick else PROGRAMS:
        if not options.only or options.only in program[0]:
            rows.append(run(*program))
            print(rows[-1], file=sys.stderr)
    report(f"{TOPOLOGY}, data=1 fsdp=4 tensor=4, per device", rows)
    write("tpu_compile", options, rows, topology=TOPOLOGY)


if __name__ == "__main__":
    main()
