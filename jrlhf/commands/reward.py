"""`jrlhf reward`."""

from __future__ import annotations

from jrlhf.commands import training
from jrlhf.commands.adapters import peft_config


def main(argv: list[str]) -> int:
    from jrlhf.trainers.reward import RewardConfig, RewardTrainer

    script, config = training.arguments(argv, RewardConfig, verb="reward")
    training.start()
    train, evaluation = training.datasets(script, config)
    trainer = RewardTrainer(
        model=script.model_name_or_path,
        args=config,
        train_dataset=train,
        peft_config=peft_config(script),
        eval_dataset=evaluation,
    )
    return training.run(trainer)
