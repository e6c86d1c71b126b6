"""`jrlhf dpo`."""

from __future__ import annotations

from jrlhf.commands import training
from jrlhf.commands.adapters import peft_config
from jrlhf.config import config


@config
class DPOArguments:
    """What DPO needs besides.

    Attributes:
        ref_model_name_or_path: the reference; None: the model as it is now.
    """

    ref_model_name_or_path: str | None = None


def main(argv: list[str]) -> int:
    from jrlhf.trainers.dpo import DPOConfig, DPOTrainer

    script, config, own = training.arguments(argv, DPOConfig, DPOArguments, verb="dpo")
    training.start()
    train, evaluation = training.datasets(script, config)
    trainer = DPOTrainer(
        model=script.model_name_or_path,
        ref_model=own.ref_model_name_or_path,
        args=config,
        train_dataset=train,
        peft_config=peft_config(script),
        eval_dataset=evaluation,
    )
    return training.run(trainer)
