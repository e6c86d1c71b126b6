"""The quick start as it ships, on the tiny real model: every verb, every config, one report."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import assets
import pytest
import quickstart
import quickstart_data

# About a minute on an idle machine; six programs start and compile, so a busy one needs patience.
pytestmark = [
    pytest.mark.assets, pytest.mark.slow, pytest.mark.newest, pytest.mark.timeout(1800)
]  # fmt: skip

GOOD = ["wonderful", "moving", "superb", "lovely", "great"]
BAD = ["awful", "boring", "dull", "terrible", "poor"]
# What a config asks for is cut down to seconds; everything else stays as it ships.
TRAINING = {"per_device_train_batch_size": "8", "num_layers_unfrozen": "2", "logging_steps": "1"}
SHORTER = {
    "sft": {**TRAINING, "max_steps": "2"},
    # The tiny model's tokenizer has more tokens per word than the recipe's.
    "reward": {**TRAINING, "max_steps": "2", "max_length": "160"},
    "ppo": {**TRAINING, "total_episodes": "16", "response_length": "8"},
    "grpo": {**TRAINING, "max_steps": "2", "max_completion_length": "8", "num_generations": "4"},
    "label": {"max_prompts": "8", "num_generations": "2", "max_new_tokens": "8"},
    "dpo": {**TRAINING, "max_steps": "1"},
    "evaluate": {"max_new_tokens": "8"},
    "report": {},
}


def write_reviews(path: Path, count: int = 220) -> None:
    rng = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(count):
            words = [rng.choice(GOOD if i % 2 else BAD) for _ in range(3)]
            first = f"The {rng.choice(['cat', 'king', 'queen'])} number {i} was {words[0]}"
            text = f"{first} and the story was {words[1]}. I thought that it was {words[2]} too."
            text += f" It was {words[0]}." * (quickstart_data.TEXT_WORDS // 3)
            writer.writerow([text, i % 2])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quickstart")
    write_reviews(root / "reviews.csv")
    sizes = quickstart_data.Sizes(24, 12, 24, 8, 4, 60)
    quickstart_data.write(root / "reviews.csv", root / "data", seed=0, sizes=sizes)
    return root


def execute(command: tuple[str, ...]) -> str:
    extra = [word for name, value in SHORTER[command[1]].items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "jrlhf.cli", *command[1:], *extra],
        cwd=quickstart.ROOT,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(quickstart.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stages(run: Path, policy: str) -> list[quickstart.Stage]:
    model = str(assets.fetch("glassllm"))
    return quickstart.plan(run, model=model, seed=0, full=False, policy=policy)


def test_two_commands_lead_from_a_base_model_to_a_report(run: Path) -> None:
    for stage in stages(run, "ppo"):
        assert all(path.exists() for path in stage.needs), stage.name
        for command in stage.commands:
            printed = execute(command)
        assert stage.makes.exists(), stage.name
    assert "8 held-out prompts" in printed
    page = (run / "report.html").read_text(encoding="utf-8")
    for stage in ("sft", "reward", "ppo"):
        assert f"<h3>{stage}" in page
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines]
    numbers = json.loads((run / "report.json").read_text())
    keys = {row["key"] for row in numbers["rows"]}
    assert keys >= {"judge/naive_bayes", "reward", "kl", "perplexity", "distinct_2"}
    kl = next(row for row in numbers["rows"] if row["key"] == "kl")
    assert kl["before"] == 0.0


@pytest.mark.parametrize("policy", ["grpo", "dpo"])
def test_the_third_stage_may_be_another_algorithm(run: Path, policy: str) -> None:
    if not (run / "reward" / "model").exists():
        pytest.skip("needs the stages of the first test")
    third = stages(run, policy)[2]
    for command in third.commands:
        execute(command)
    assert third.makes.exists()
