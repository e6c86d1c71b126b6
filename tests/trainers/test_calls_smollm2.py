"""The calls that users write, as they stand, on a model that people use: SmolLM2-135M-Instruct.

Each runs in a process of its own with one device: eight fake ones would hold eight copies. Texts
are short, and where a call takes a model that was loaded before, only its top layer is trained.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TEXTS = ["A fine film.", "Dull from start to end.", "I laughed.", "Never again.",
         "The best of the year.", "I left early.", "Moving and wise.", "A waste."]  # fmt: skip
# HH-RLHF shaped: the prompt is what chosen and rejected share.
TURN = "\n\nHuman: Well?\n\nAssistant: "
PAIRS = [
    {"chosen": TURN + good, "rejected": TURN + bad}
    for good, bad in zip(TEXTS, reversed(TEXTS), strict=True)
]


def sft(smollm2: str) -> Any:
    from jrlhf import SFTTrainer

    dataset = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    trainer = SFTTrainer(model=smollm2, train_dataset=dataset)
    trainer.train()
    return trainer


def reward(smollm2: str) -> Any:
    from jrlhf import RewardTrainer

    trainer = RewardTrainer(model=smollm2, train_dataset=PAIRS)
    trainer.train()
    return trainer


def dpo(smollm2: str) -> Any:
    from jrlhf import AutoModelForCausalLM, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(smollm2, num_layers_unfrozen=1)
    tokenizer, dataset = model.tokenizer, {"train": PAIRS}
    trainer = DPOTrainer(model=model, tokenizer=tokenizer, beta=0.1, train_dataset=dataset["train"])
    trainer.train()
    return trainer


def ppo(smollm2: str) -> Any:
    from jrlhf import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PPOConfig,
        PPOTrainer,
    )

    model = AutoModelForCausalLM.from_pretrained(smollm2, num_layers_unfrozen=1)
    reward_model = AutoModelForSequenceClassification.from_pretrained(smollm2, num_labels=1)
    tokenizer, dataset = model.tokenizer, PAIRS
    trainer = PPOTrainer(
        model=model,
        tokenizer=tokenizer,
        config=PPOConfig(learning_rate=1.41e-5, log_with="tensorboard", batch_size=16),
        dataset=dataset,
        reward_model=reward_model,
    )
    trainer.train()
    return trainer


def reward_len(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(message["content"])) for (message,) in completions]


def grpo(smollm2: str) -> Any:
    from jrlhf import GRPOConfig, GRPOTrainer

    # Questions that the model answers in a word or two.
    dataset = [
        {"prompt": [{"role": "user", "content": f"Answer with one word. {question}"}]}
        for question in ("What is the capital of France?", "What is 1 + 1?")
    ]
    trainer = GRPOTrainer(
        model=smollm2,
        reward_funcs=reward_len,
        args=GRPOConfig(
            output_dir="grpo",
            logging_steps=1,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_tensor_parallel_size=1,
            vllm_gpu_memory_utilization=0.3,
            max_prompt_length=512,
            max_completion_length=1024,
            max_steps=2,
            num_generations=4,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            push_to_hub=False,
            report_to=None,
        ),
        train_dataset=dataset,
    )
    trainer.train()
    return trainer


# Optimizer steps of each call; what it logs at least; old names that it uses.
CALLS: dict[str, tuple[int, set[str], list[str]]] = {
    "sft": (3, {"train_loss"}, []),
    "reward": (3, {"train_loss"}, []),
    "dpo": (3, {"train_loss"}, ["tokenizer"]),
    # Three epochs over 16 prompts (8, twice), four passes over each rollout.
    "ppo": (12, {"loss", "objective/scores", "val/ratio"}, ["log_with", "config", "dataset"]),
    "grpo": (2, {"reward", "completions/mean_length"}, []),
}


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Checkpoints of such a model are large; pytest would keep them for three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CALLS)
def test_the_call_runs_as_it_stands(
    name: str, smollm2: str, scratch: Path, repository: Path
) -> None:
    steps, logged, old = CALLS[name]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, __file__, name, smollm2],
        cwd=scratch, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["steps"] == steps
    assert said["finite"]
    assert said["moved"]
    assert logged <= set(said["logged"])
    assert [w for w in said["warnings"] if " is now " in w or "belongs into" in w] or not old
    for word in old:
        assert any(f"{word} is now" in w for w in said["warnings"]), word


def main(name: str, smollm2: str) -> None:
    import jax
    import numpy as np

    from jrlhf import AutoModelForCausalLM

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        trainer = globals()[name](smollm2)
    params = trainer.model.params
    start = AutoModelForCausalLM.from_pretrained(smollm2).params["norm"]["scale"]
    report = {
        "steps": trainer.state.global_step,
        "finite": all(bool(np.isfinite(x).all()) for x in map(np.asarray, jax.tree.leaves(params))),
        "moved": bool((np.asarray(params["norm"]["scale"]) != np.asarray(start)).any()),
        "logged": sorted({key for row in trainer.state.log_history for key in row}),
        "warnings": [str(w.message) for w in caught],
    }
    sys.stdout.write("\n" + json.dumps(report) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
