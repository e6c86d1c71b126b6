"""Loading a sharded checkpoint onto eight devices: seconds, and the host memory that it takes.

    python benchmarks/bench_load.py [--quick] [--dtype float32 bfloat16] [--mesh fsdp=8 tensor=8]

A random Llama checkpoint in bfloat16, in several files, is loaded onto eight fake CPU devices, cut
as each mesh says, in a fresh process whose high-water mark of memory is read. Here the memory of
the devices is the host's, so the arrays themselves are the process's own slice; what loading may
take besides is 1.3 times the largest file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BOUND = 1.3
DEVICES = 8
MESHES = ("fsdp=8", "tensor=8", "data=2,fsdp=4")


class Size(NamedTuple):
    """A Llama's sizes, and how many bytes go into one file."""

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    shard: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint with a tied head."""
        d, f, kv = self.hidden, self.mlp, self.hidden // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, d)}
        layer = {
            "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
        }  # fmt: skip
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        return shapes | {"model.norm.weight": (d,)}


# The sizes of Llama 3.2 1B.
FULL = Size(128256, 2048, 8192, 16, 32, 8, 500 * 10**6)
QUICK = Size(16000, 512, 2048, 20, 8, 2, 50 * 10**6)


def write_checkpoint(directory: Path, size: Size) -> int:
    """Writes config.json, the shards and their index; returns the largest file's bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size.vocab,
        "hidden_size": size.hidden, "intermediate_size": size.mlp, "tie_word_embeddings": True,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in size.shapes().items():
        held = 2 * sum(int(np.prod(s)) for s in groups[-1].values())
        if groups[-1] and held + 2 * int(np.prod(shape)) > size.shard:
            groups.append({})
        groups[-1][name] = shape
    noise = np.random.default_rng(0).normal(0, 0.02, 2**20 + 7).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: np.resize(noise, shape) for name, shape in group.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(file.stat().st_size for file in directory.glob("*.safetensors"))


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None, field
    return 1024 * int(found[1])


def load(directory: str, dtype: str, mesh: str) -> dict[str, Any]:
    """Loads in this process; what it took."""
    import jax

    from jrlhf import AutoModelForCausalLM

    # A first model, so that what the libraries keep for themselves is there already.
    tiny = Size(64, 64, 64, 1, 8, 8, 10**6)
    with tempfile.TemporaryDirectory() as other:
        write_checkpoint(Path(other), tiny)
        AutoModelForCausalLM.from_pretrained(other, mesh=mesh, param_dtype=dtype)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, mesh=mesh, param_dtype=dtype)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - begun
    peak = memory("VmHWM")
    leaves = jax.tree.leaves(model.params)
    own = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "dtype": dtype,
        "mesh": mesh,
        "devices": len(jax.devices()),
        "seconds": seconds,
        "own_slice_bytes": own,
        "rise_bytes": peak - before,
    }


def measure(directory: Path, dtype: str, mesh: str = MESHES[0]) -> dict[str, Any]:
    """Loads in a fresh process with eight devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--child", str(directory), "--dtype", dtype,
               "--mesh", mesh]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=3600
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def judge(row: dict[str, Any], largest: int) -> dict[str, Any]:
    """The same numbers with what loading took besides its slice, and what it may take."""
    besides = row["rise_bytes"] - row["own_slice_bytes"]
    share = besides / largest
    return {
        **row,
        "largest_shard_bytes": largest,
        "besides_bytes": besides,
        "besides_in_shards": share,
        "bound_in_shards": BOUND,
        "within": share < BOUND,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model; a few seconds")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--mesh", nargs="+", default=MESHES)
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(load(options.child, options.dtype[0], options.mesh[0])))
        return
    from measure import report, write

    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as work:
        largest = write_checkpoint(Path(work), size)
        rows = [
            judge(measure(Path(work), dtype, mesh), largest)
            for dtype in options.dtype
            for mesh in options.mesh
        ]
    report(
        f"loading onto {DEVICES} devices",
        [
            {
                "parameters": f"{row['parameters'] / 1e6:.0f}M",
                "kept as": row["dtype"],
                "mesh": row["mesh"],
                "seconds": row["seconds"],
                "own slice, GB": row["own_slice_bytes"] / 1e9,
                "rise, GB": row["rise_bytes"] / 1e9,
                "largest file, GB": largest / 1e9,
                f"besides / file (bound {BOUND})": row["besides_in_shards"],
            }
            for row in rows
        ],
    )
    write("load", options, rows)
    if not all(row["within"] for row in rows):
        raise SystemExit(f"More than {BOUND} times the largest file.")


if __name__ == "__main__":
    main()
