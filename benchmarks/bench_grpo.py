"""A whole GRPO step: rollout, rewards, reference and update, jrlhf against TRL.

    python benchmarks/bench_grpo.py [--quick] [--dtype float32 bfloat16]

4 prompts of 64 tokens x 4 completions of up to 128 tokens, beta 0.04, one update per rollout. TRL
samples with transformers' `generate`, its engine without vLLM, which needs a GPU. The reward is the
share of even token ids. "sampling s" is the part of the median step that goes into generation.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import ours
import peers
from measure import arguments, report, speedup, take_turns, write
from task import FULL, QUICK, Size, Texts, dataset, write_checkpoint

BASELINE = "trl"
GROUP = 4


def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


def compare(
    dtype: str, size: Size, model: Path, *, rows: int, rounds: int, clock: str, threads: int
) -> list[dict[str, Any]]:
    prompt = size.length // 4
    completion = size.length // 2
    data = dataset(Texts(size).prompt_rows(64, prompt))
    common = {"dtype": dtype, "rows": rows, "learning_rate": 1e-6}
    grpo = {"num_generations": GROUP, "max_completion_length": completion, "beta": 0.04}
    grpo["logging_steps"] = 1
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)
        runs = {}
        sampling: dict[str, list[float]] = {}
        for name, checkpointing in ((BASELINE, False), ("trl (checkpointing, its default)", True)):
            fields = peers.config_fields(out / name, checkpointing=checkpointing, **common)
            sampling[name] = []
            runs[name] = peers.grpo(
                model, data, reward, {**fields, **grpo}, threads=threads, sampling=sampling[name]
            )
        fields = ours.config_fields(out / "jrlhf", checkpointing=False, **common)
        runs["jrlhf"] = ours.grpo(model, data, reward, {**fields, **grpo})
        times = take_turns(runs, rounds=rounds, clock=clock)
        history = runs["jrlhf"].trainer.state.log_history
        sampling["jrlhf"] = [row["time/sample"] for row in history if "time/sample" in row]
        for run in runs.values():
            run.close()
    return [
        {
            "dtype": dtype,
            "contender": name,
            "completions": rows,
            "new tokens": completion,
            "steps/min": 60 / timing.median,
            "median s": timing.median,
            "best s": timing.best,
            "sampling s": statistics.median(sampling[name][-rounds:]),
            "x trl": speedup(times, name, BASELINE),
            "first step s": runs[name].first_step,
        }
        for name, timing in times.items()
    ]


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    size = QUICK if options.quick else FULL
    options.rounds = options.rounds or (3 if options.quick else 5)
    peers.quiet()
    threads = peers.use_threads(options.torch_threads)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = write_checkpoint(Path(directory), size)
        for dtype in options.dtype:
            results += compare(
                dtype, size, model, rows=4 * GROUP, rounds=options.rounds, clock=options.clock,
                threads=threads,
            )  # fmt: skip
    report("GRPO step", results)
    write("grpo", options, results, size=vars(size), torch_threads=threads)


if __name__ == "__main__":
    main()
