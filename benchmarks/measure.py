"""How the benchmarks measure: contenders take turns, and a ratio is taken within each round.

A shared machine is fast one minute and slow the next. Contenders that run one after the other in
every round see the same machine, so the median of the rounds' ratios is steady where the times
themselves are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass
class Timing:
    """Seconds of one contender, one number per round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


def take_turns(
    contenders: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    clock: str = "wall",
    warm: bool = False,
) -> dict[str, Timing]:
    """Runs every contender once per round, after one round that does not count.

    With `warm` twice, of which the second counts, as one step follows another in training: on a
    virtual machine, memory that lies free while others have their turns goes back to the host.
    """
    now, times = CLOCKS[clock], {name: Timing([]) for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            if warm:
                run()
            begun = now()
            run()
            if turn:
                times[name].seconds.append(now() - begun)
    return times


def speedup(times: Mapping[str, Timing], name: str, against: str) -> float:
    """Median over the rounds of how many times faster `name` was than `against`."""
    pairs = zip(times[against].seconds, times[name].seconds, strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


class TrainerSteps:
    """A trainer whose own `train()` advances by one optimizer step per call.

    `train` runs in a thread and waits at the beginning of every step for its turn. So a step is
    measured with everything its trainer does around it: batches, metrics, schedule, logging.
    """

    def __init__(self, make: Callable[[Any], Any], *, finish: Callable[[Any], None]) -> None:
        """Builds the trainer and runs its first step.

        Args:
            make: callback -> trainer with `train()`; called in the thread that will train.
            finish: of the trainer, waits until the device has done a step.
        """
        self.trainer: Any = None
        self._turns: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[BaseException | None] = queue.Queue()
        self._thread = threading.Thread(target=self._train, args=(make, finish), daemon=True)
        self._thread.start()
        self._wait()  # until the trainer stands before its first step
        begun = time.perf_counter()
        self()
        self.first_step = time.perf_counter() - begun

    def __call__(self) -> None:
        self._turns.put(True)
        self._wait()

    def close(self) -> None:
        """Lets the trainer stop; waits for it."""
        self._turns.put(False)
        self._thread.join(timeout=60)

    def _wait(self) -> None:
        if (error := self._done.get()) is not None:
            raise error

    def _train(self, make: Callable[[Any], Any], finish: Callable[[Any], None]) -> None:
        steps = self

        class Turns:
            """Only what both libraries call; transformers asks for every event by name."""

            def __getattr__(self, name: str) -> Any:
                if not name.startswith("on_"):
                    raise AttributeError(name)
                return lambda *args, **kw: None

            def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> Any:
                if state.global_step:
                    finish(steps.trainer)
                steps._done.put(None)
                control.should_training_stop = not steps._turns.get()
                return control

        try:
            self.trainer = make(Turns())
            self.trainer.train()
        except BaseException as error:
            self._done.put(error)
        else:
            self._done.put(None)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers; nothing that names the machine."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
        flags = info.read_text()
        model += " (AVX-512)" if "avx512f" in flags else ""
        model += " (AMX)" if "amx_tile" in flags else ""
        model += " (AVX512-BF16)" if "avx512_bf16" in flags else ""
    versions = {}
    for package in ("jax", "jaxlib", "torch", "transformers", "trl", "optax", "flax"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": round(os.getloadavg()[0], 2),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def arguments(
    description: str, *, alone: bool = False, contenders: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """The options that benchmarks share.

    Args:
        description: of the benchmark.
        alone: it has no other side, and reads its own clock.
        contenders: names to choose among, where it lets one choose.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    parser.add_argument("--rounds", type=int, help="rounds that count")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"],
                        choices=["float32", "bfloat16"], help="compute dtypes")  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    if not alone:
        parser.add_argument("--clock", choices=list(CLOCKS), default="wall",
                            help="cpu: seconds of processor time, for a machine that others use "
                            "too; pin the process to one core with it")  # fmt: skip
        parser.add_argument("--torch-threads", type=int,
                            help="default: the faster of 1 and all cores")  # fmt: skip
    if names := list(contenders):
        parser.add_argument("--only", nargs="+", choices=names, metavar="NAME",
                            help=f"the baseline and these alone: {', '.join(names)}")  # fmt: skip
    return parser


def report(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows of equal keys as a table."""
    print(f"\n{title}")
    shown = [{k: _text(v) for k, v in row.items()} for row in rows]
    widths = {k: max(len(k), *(len(row[k]) for row in shown)) for k in shown[0]}
    print("  ".join(k.ljust(w) for k, w in widths.items()))
    for row in shown:
        print("  ".join(row[k].ljust(w) for k, w in widths.items()))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def write(
    name: str, options: argparse.Namespace, results: list[dict[str, Any]], **more: Any
) -> None:
    """Writes the JSON file of a run."""
    stem = f"{name}_quick" if options.quick else name
    path = options.output or RESULTS / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k != "output"}
    found = {"benchmark": name, "machine": machine(), "settings": settings, **more,
             "results": results}  # fmt: skip
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.name}")
