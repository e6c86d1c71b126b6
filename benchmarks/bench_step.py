"""SFT and DPO training steps: tokens per second of jrlhf, TRL and a hand-written jax.jit.

    python benchmarks/bench_step.py [--quick] [--task sft dpo] [--dtype float32 bfloat16]

All contenders start from the same checkpoint and the same texts, run their own trainers and take
turns step by step. Peak memory is that of a fresh process per contender (--memory).
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handwritten
import ours
import peers
from measure import arguments, report, speedup, take_turns, write
from task import FULL, QUICK, Size, Texts, dataset, write_checkpoint

BASELINE = "trl"
# name -> (builder's module, gradient checkpointing)
CONTENDERS: dict[str, tuple[str, bool]] = {
    "trl": ("peers", False),
    "trl (checkpointing, its default)": ("peers", True),
    "jrlhf": ("ours", False),
    "jrlhf (checkpointing)": ("ours", True),
    "jax.jit by hand": ("handwritten", False),
}
LEARNING_RATES = {"sft": 2e-5, "dpo": 1e-6}


def build(
    name: str, task: str, dtype: str, size: Size, model: Path, work: Path, threads: int
) -> Callable[[], None]:
    """One contender, having done its first step (which compiles)."""
    side, checkpointing = CONTENDERS[name]
    texts = Texts(size)
    many = 64
    # A pair is two rows, so that every task trains on the same number of tokens.
    rows = size.rows if task == "sft" else size.rows // 2
    data = texts.language_rows(many) if task == "sft" else texts.preference_rows(many)
    if side == "handwritten":
        return handwritten.step(task, model, data, rows=rows, length=size.length, dtype=dtype,
                                learning_rate=LEARNING_RATES[task])  # fmt: skip
    fields = {
        "dtype": dtype,
        "rows": rows,
        "checkpointing": checkpointing,
        "learning_rate": LEARNING_RATES[task],
    }
    if side == "ours":
        return getattr(ours, task)(model, dataset(data), ours.config_fields(work, **fields))
    return getattr(peers, task)(
        model, dataset(data), peers.config_fields(work, **fields), threads=threads
    )


def compare(
    task: str, dtype: str, size: Size, model: Path, options: argparse.Namespace, threads: int
) -> list[dict[str, Any]]:
    """One table: all contenders on one task at one dtype."""
    names = [name for name in CONTENDERS if not options.only or name in (BASELINE, *options.only)]
    with tempfile.TemporaryDirectory() as work:
        runs = {
            name: build(name, task, dtype, size, model, Path(work) / str(i), threads)
            for i, name in enumerate(names)
        }
        times = take_turns(runs, rounds=options.rounds, clock=options.clock)
        for run in runs.values():
            getattr(run, "close", lambda: None)()
    tokens = size.rows * size.length
    rows = []
    for name, timing in times.items():
        row: dict[str, Any] = {
            "task": task,
            "dtype": dtype,
            "contender": name,
            "tokens/s": tokens / timing.median,
            "median s": timing.median,
            "best s": timing.best,
            "x trl": speedup(times, name, BASELINE),
            "first step s": getattr(runs[name], "first_step", None),
            "peak MiB": None,
        }
        if options.memory:
            row["peak MiB"] = peak_memory(name, task, dtype, options)
        rows.append(row)
    return rows


def peak_memory(name: str, task: str, dtype: str, options: argparse.Namespace) -> int:
    """Resident memory of a process that builds this contender and runs three steps."""
    command = [sys.executable, __file__, "--alone", json.dumps([name, task, dtype])]
    command += ["--quick"] if options.quick else []
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(out.split()[-1])


def alone(name: str, task: str, dtype: str, size: Size) -> None:
    with tempfile.TemporaryDirectory() as work:
        # The checkpoint is written by another process, so that torch is loaded by TRL alone.
        model = Path(work) / "model"
        code = (
            "import sys, pathlib, task; task.write_checkpoint(pathlib.Path(sys.argv[1]), task.%s)"
        )
        which = "FULL" if size == FULL else "QUICK"
        subprocess.run([sys.executable, "-c", code % which, str(model)], check=True,
                       cwd=Path(__file__).parent)  # fmt: skip
        threads = peers.use_threads(None) if CONTENDERS[name][0] == "peers" else 0
        run = build(name, task, dtype, size, model, Path(work) / "out", threads)
        for _ in range(2):
            run()
        getattr(run, "close", lambda: None)()
    print(peak_resident())


def peak_resident() -> int:
    """The most MiB that this program has had in memory."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak is also that of the process that started this one.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) // 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], contenders=CONTENDERS)
    parser.add_argument("--task", nargs="+", default=["sft", "dpo"], choices=["sft", "dpo"])
    parser.add_argument("--memory", action="store_true", help="also peak memory (slow)")
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    options.rounds = options.rounds or (3 if options.quick else 7)
    peers.quiet()
    if options.alone:
        alone(*options.alone, size)
        return
    threads = peers.use_threads(options.torch_threads)
    results = []
    with tempfile.TemporaryDirectory() as directory:
        model = write_checkpoint(Path(directory), size)
        for task in options.task:
            for dtype in options.dtype:
                rows = compare(task, dtype, size, model, options, threads)
                report(f"{task}, {dtype} compute, {size.rows} x {size.length} tokens", rows)
                results += rows
    write("step", options, results, size=vars(size), torch_threads=threads)


if __name__ == "__main__":
    main()
