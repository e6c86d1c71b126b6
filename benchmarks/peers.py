"""TRL's side: its trainers with its own defaults, except for what the docstrings name."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import TrainerSteps, cores


def quiet() -> None:
    """Silences progress bars and advice, which would be printed between the rows of a table."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def use_threads(asked: int | None) -> int:
    """The faster of one thread and all cores for a matmul of the model's shape, or as asked."""
    import torch

    choices = [asked] if asked else sorted({1, cores()})
    x, w = torch.randn(2048, 512), torch.randn(512, 1408)
    seconds = {}
    for threads in choices:
        torch.set_num_threads(threads)
        trials = []
        for _ in range(10):
            begun = time.perf_counter()
            _ = x @ w
            trials.append(time.perf_counter() - begun)
        seconds[threads] = min(trials)
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best


def trainer_steps(make: Callable[[], Any], *, threads: int) -> TrainerSteps:
    """A TRL trainer that advances step by step."""
    import torch

    def build(callback: Any) -> Any:
        torch.set_num_threads(threads)  # torch's setting belongs to the thread
        with contextlib.redirect_stdout(None):
            trainer = make()
        from transformers import PrinterCallback, ProgressCallback

        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(callback)
        return trainer

    return TrainerSteps(build, finish=lambda trainer: None)


def config_fields(
    output: Path, *, dtype: str, rows: int, checkpointing: bool, learning_rate: float
) -> dict[str, Any]:
    """The fields that differ from TRL's defaults, or that both sides must agree on.

    TRL turns gradient_checkpointing and bf16 on by default. `checkpointing=False` is the faster
    setting on this job; the row "trl (checkpointing, its default)" leaves it on.
    """
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": rows,
        "learning_rate": learning_rate,
        "max_steps": 100_000,
        "bf16": dtype == "bfloat16",
        "gradient_checkpointing": checkpointing,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
    }


def sft(model: Path, data: Any, fields: dict[str, Any], *, threads: int) -> TrainerSteps:
    def make() -> Any:
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            model=str(model),
            args=SFTConfig(**fields, model_init_kwargs={"dtype": "float32"}),
            train_dataset=data,
        )

    return trainer_steps(make, threads=threads)


def dpo(model: Path, data: Any, fields: dict[str, Any], *, threads: int) -> TrainerSteps:
    def make() -> Any:
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(
            model=str(model),
            args=DPOConfig(**fields, model_init_kwargs={"dtype": "float32"}),
            train_dataset=data,
        )

    return trainer_steps(make, threads=threads)


def grpo(
    model: Path,
    data: Any,
    reward: Callable[..., Any],
    fields: dict[str, Any],
    *,
    threads: int,
    sampling: list[float],
) -> TrainerSteps:
    """`sampling` gets the seconds of each rollout's generation."""

    def make() -> Any:
        from trl import GRPOConfig, GRPOTrainer

        class Timed(GRPOTrainer):
            def _generate(self, prompts: list[Any]) -> Any:
                begun = time.perf_counter()
                completions = super()._generate(prompts)
                sampling.append(time.perf_counter() - begun)
                return completions

        return Timed(
            model=str(model),
            reward_funcs=reward,
            args=GRPOConfig(**fields, model_init_kwargs={"dtype": "float32"}),
            train_dataset=data,
        )

    return trainer_steps(make, threads=threads)
