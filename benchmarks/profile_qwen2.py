"""What a forward pass and a training step of `bench_qwen2` spend, on both sides.

    python benchmarks/profile_qwen2.py [--quick] [--task forward step] [--dtype float32 bfloat16]

Beside the time of a run stand that of its weights' dots, each timed by itself at its shape (theirs
by torch's matmul, ours by the function that every layer calls, transposes included), what is left,
and what the kernel took to hand out memory: processor time in the system, and page faults.
"""

from __future__ import annotations

import collections
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_qwen2
import numpy as np
import peers
from measure import arguments, cores, report, take_turns, write
from task import Size

Shape = tuple[int, int]
SIDES = ("transformers, plain loop", "jrlhf")


def weights(size: Size) -> collections.Counter[Shape]:
    """How often the model has a weight of each shape [inputs, outputs]."""
    narrow = size.hidden // size.heads * size.kv_heads
    layer = [(size.hidden, size.hidden)] * 2 + [(size.hidden, narrow)] * 2
    layer += [(size.hidden, size.ffn)] * 2 + [(size.ffn, size.hidden)]
    return collections.Counter(layer * size.layers + [(size.hidden, size.vocab)])


def their_dots(shape: Shape, count: int, rows: int, dtype: str, *, step: bool) -> Callable[[], Any]:
    import torch

    inputs, outputs = shape
    kind = getattr(torch, dtype)
    x, g = torch.randn(rows, inputs).to(kind), torch.randn(rows, outputs).to(kind)
    weights = [torch.randn(outputs, inputs).to(kind) for _ in range(count)]

    def run() -> None:
        for w in weights:
            _ = (x @ w.t(), g @ w, g.t() @ x) if step else x @ w.t()

    return run


def our_dots(shape: Shape, count: int, rows: int, dtype: str, *, step: bool) -> Callable[[], Any]:
    import jax

    from jrlhf.models.layers import dot
    from jrlhf.ops.layout import jit

    inputs, outputs = shape
    draw = np.random.default_rng(0).standard_normal
    x, weights = (jax.numpy.asarray(draw(s), dtype) for s in ((rows, inputs), (count, *shape)))
    g = jax.numpy.asarray(draw((rows, outputs)), np.float32)

    def one(x: Any, w: Any, g: Any) -> Any:
        if not step:
            return dot(x, w, 1, dtype)
        y, pull = jax.vjp(lambda x, w: dot(x, w, 1, dtype), x, w)
        return y, pull(g)

    def run(x: Any, weights: Any, g: Any) -> Any:
        def layer(none: None, w: Any) -> tuple[None, Any]:
            # The barrier keeps XLA from making the one number alone.
            made = jax.lax.optimization_barrier(one(x, w, g))
            return none, jax.tree.map(lambda y: y[0, 0], made)

        return jax.lax.scan(layer, None, weights)[1]

    compiled = jit(run)
    return lambda: jax.block_until_ready(compiled(x, weights, g))


def spent(run: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Medians over the rounds: wall time, the system's processor time, page faults."""
    rows = []
    for turn in range(rounds + 2):
        before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        run()
        wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
        if turn > 1:
            rows.append(
                (wall, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt)
            )
    wall, system, faults = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"run, ms": 1e3 * wall, "system, ms": 1e3 * system, "page faults": float(faults)}


def look(task: str, dtype: str, size: Size, model: Path, rounds: int) -> list[dict[str, Any]]:
    step, tokens = task == "step", size.rows * size.length
    dots = dict.fromkeys(SIDES, 0.0)
    for shape, count in weights(size).items():
        makers = dict(zip(SIDES, (their_dots, our_dots), strict=True))
        times = take_turns(
            {k: make(shape, count, tokens, dtype, step=step) for k, make in makers.items()},
            rounds=rounds,
        )
        for name, timing in times.items():
            dots[name] += 1e3 * timing.median
    rows, ids = [], bench_qwen2.tokens(size, 4)
    for name in SIDES:
        found = spent(bench_qwen2.CONTENDERS[task][name](model, ids, dtype), rounds)
        whole = found["run, ms"]
        rows.append({"task": task, "dtype": dtype, "contender": name, "run, ms": whole,
                     "dots, ms": dots[name], "rest, ms": whole - dots[name], **found})  # fmt: skip
    return rows


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], alone=True)
    parser.add_argument("--task", nargs="+", default=["forward", "step"],
                        choices=["forward", "step"])  # fmt: skip
    options = parser.parse_args()
    size = bench_qwen2.QUICK if options.quick else bench_qwen2.FULL
    options.rounds = options.rounds or (3 if options.quick else 15)
    peers.quiet()
    threads = peers.use_threads(cores())
    results = []
    with tempfile.TemporaryDirectory() as directory:
        model = bench_qwen2.write_model(Path(directory), size)
        for task in options.task:
            for dtype in options.dtype:
                rows = look(task, dtype, size, model, options.rounds)
                report(f"{task}, {dtype}, {size.rows} x {size.length} tokens", rows)
                results += rows
    write("profile_qwen2", options, results, size=vars(size), torch_threads=threads)


if __name__ == "__main__":
    main()
