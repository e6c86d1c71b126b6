"""jrlhf's side: its public trainers with the same fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import TrainerSteps


def trainer_steps(make: Callable[[Any], Any]) -> TrainerSteps:
    """A jrlhf trainer that advances step by step."""
    import jax

    # The loop starts steps ahead of the device: a turn ends when the parameters are there.
    return TrainerSteps(make, finish=lambda trainer: jax.block_until_ready(trainer.model.params))


def config_fields(
    output: Path, *, dtype: str, rows: int, checkpointing: bool, learning_rate: float
) -> dict[str, Any]:
    """The same job as `peers.config_fields`."""
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": rows,
        "learning_rate": learning_rate,
        "max_steps": 100_000,
        "bf16": dtype == "bfloat16",
        "gradient_checkpointing": checkpointing,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
    }


def sft(model: Path, data: Any, fields: dict[str, Any]) -> TrainerSteps:
    from jrlhf import SFTConfig, SFTTrainer

    return trainer_steps(
        lambda callback: SFTTrainer(
            model=str(model), args=SFTConfig(**fields), train_dataset=data, callbacks=[callback]
        )
    )


def dpo(model: Path, data: Any, fields: dict[str, Any]) -> TrainerSteps:
    from jrlhf import DPOConfig, DPOTrainer

    return trainer_steps(
        lambda callback: DPOTrainer(
            model=str(model), args=DPOConfig(**fields), train_dataset=data, callbacks=[callback]
        )
    )


def grpo(
    model: Path, data: Any, reward: Callable[..., Any], fields: dict[str, Any]
) -> TrainerSteps:
    from jrlhf import GRPOConfig, GRPOTrainer

    return trainer_steps(
        lambda callback: GRPOTrainer(
            model=str(model), reward_funcs=reward, args=GRPOConfig(**fields), train_dataset=data,
            callbacks=[callback],
        )
    )  # fmt: skip
