"""How long a deep model takes to compile: layers stacked and scanned, against a Python loop.

    python benchmarks/bench_compile.py [--quick] [--layers 2 8 32]

Forward and backward of one SFT step, jrlhf's own in both columns: the same maths on the same
stacked weights. Only what runs the layers differs: `jax.lax.scan` (what jrlhf does) or a Python
loop over slices. The program's size is that of the lowered text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from measure import CLOCKS, report, write

from jrlhf.algos import SFT
from jrlhf.models import decoder
from jrlhf.models.build import Net
from jrlhf.models.spec import DecoderSpec
from jrlhf.rollout.score import Actor

ROWS, LENGTH = 4, 256


def spec_of(layers: int, dtype: str) -> DecoderSpec:
    """A Qwen2-type model of 28M parameters at eight layers."""
    return DecoderSpec(
        model_type="qwen2", vocab_size=8192, hidden_size=512, intermediate_size=1408,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        attention_bias=True, output_bias=False, tie_word_embeddings=True, dtype=dtype,
    )  # fmt: skip


def loop(body: Any, carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`lax.scan` as a Python loop."""
    outputs = []
    for i in range(jax.tree.leaves(inputs)[0].shape[0]):
        carry, output = body(carry, jax.tree.map(lambda leaf, i=i: leaf[i], inputs))
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


class Looped:
    """`jax.lax` for the decoder, with `loop` in place of `scan`."""

    scan = staticmethod(loop)

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.lax, name)


def gradient(spec: DecoderSpec) -> Any:
    """The gradient of a step's loss, not yet traced."""
    actor, algorithm = Actor(Net(spec)), SFT()

    def total(params: Any, batch: Any) -> jax.Array:
        return actor.loss(algorithm, params, {}, batch).objective.total

    return jax.jit(jax.value_and_grad(total))


def compile_times(spec: DecoderSpec, *, unrolled: bool, now: Callable[[], float]) -> dict[str, Any]:
    """Seconds to trace and lower, to compile, and the size of the program."""
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = {
        "ids": ids,
        "lengths": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32),
    }
    # Only the decoder's own scan over its layers is replaced: the head's chunks are as they are.
    used = Looped() if unrolled else jax.lax
    jax.clear_caches()
    with mock.patch.object(decoder, "lax", used):
        begun = now()
        lowered = gradient(spec).lower(Net(spec).abstract(), batch)
        traced = now()
        compiled = lowered.compile()
        done = now()
    memory = compiled.memory_analysis()
    return {
        "trace s": traced - begun,
        "compile s": done - traced,
        "both s": done - begun,
        "program kB": len(lowered.as_text()) / 1024,
        "temporary MiB": memory.temp_size_in_bytes / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="eight layers at most, one round")
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="the fastest round counts")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: seconds of processor time, for a machine that others use too",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds = [2, 8], 1
    rows = []
    for layers in options.layers:
        spec = spec_of(layers, options.dtype)
        best: dict[bool, dict[str, Any]] = {}
        for _ in range(options.rounds):  # they take turns
            for unrolled in (False, True):
                found = compile_times(spec, unrolled=unrolled, now=CLOCKS[options.clock])
                if unrolled not in best or found["both s"] < best[unrolled]["both s"]:
                    best[unrolled] = found
        for unrolled, found in best.items():
            name = "python loop" if unrolled else "scan (jrlhf)"
            share = found["both s"] / best[True]["both s"]
            rows.append({"layers": layers, "layers run by": name, **found, "of the loop": share})
    report("forward and backward of an SFT step, Qwen2 type", rows)
    write("compile", options, rows, rows=ROWS, length=LENGTH)


if __name__ == "__main__":
    main()
