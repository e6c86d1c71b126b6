"""A small evaluation with known numbers, and a run directory around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jrlhf import report
from jrlhf.report.schema import Evaluation


def make_evaluation(
    *,
    count: int = 24,
    lift: float = 0.3,
    noise: float = 0.05,
    words: str = "varied",
    judges: bool = True,
) -> Evaluation:
    """`lift` moves every judge score; `words` is "varied" or "same" for the second policy."""
    rng = np.random.default_rng(7)
    start = rng.uniform(0.2, 0.6, size=count)
    moved = start + lift + rng.normal(0, noise, size=count)
    first = [f"one{i} two{i} three{i}" for i in range(count)]
    # Words repeat, pairs less so: distinct-1, distinct-2 and both policies' values all differ.
    second = [
        f"four{i % 9} five{i} four{i % 7}" if words == "varied" else "so so so"
        for i in range(count)
    ]
    scores = dict(zip(first + second, [*start, *moved], strict=True)) if words == "varied" else {}

    def score(texts: list[str]) -> np.ndarray:
        if not scores:
            return np.array([0.9 if text.endswith("so so so") else 0.3 for text in texts])
        return np.array([scores[text.split("|")[1]] for text in texts])

    rewards = rng.normal(size=count)
    return report.assemble(
        title="A test of the report",
        prompts=[f"prompt {i}|" for i in range(count)],
        before=report.Arm("sft", first, [3] * count, rewards, [0.0] * count, [30.0, 5.0] * 4),
        after=report.Arm("ppo", second, [4] * count, rewards + 1, [2.5] * count, [31.0, 6.0] * 4),
        judges=[report.Judge("naive_bayes", "a judge of the test", score)] if judges else [],
        text_tokens=[10, 2] * 4,
        settings={"seed": 3},
    )


@pytest.fixture
def evaluation() -> Evaluation:
    return make_evaluation()


@pytest.fixture
def evaluations() -> Callable[..., Evaluation]:
    return make_evaluation


@pytest.fixture
def run(tmp_path: Path, evaluation: Evaluation) -> Path:
    directory = tmp_path / "run"
    for stage, steps in (("sft", 60), ("ppo", 5)):
        (directory / stage).mkdir(parents=True)
        with (directory / stage / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                record = {"step": step, "epoch": 0.1, "loss": 3.0 / step, "learning_rate": 1e-5}
                file.write(json.dumps(record) + "\n")
    report.save(evaluation, directory / "evaluation.json")
    return directory
