"""`jrlhf sft`."""

from __future__ import annotations

from jrlhf.commands import training
from jrlhf.commands.adapters import peft_config


def main(argv: list[str]) -> int:
    from jrlhf.trainers.sft import SFTConfig, SFTTrainer

    script, config = training.arguments(argv, SFTConfig, verb="sft")
    training.start()
    train, evaluation = training.datasets(script, config)
    trainer = SFTTrainer(
        model=script.model_name_or_path,
        args=config,
        train_dataset=train,
        peft_config=peft_config(script),
        eval_dataset=evaluation,
    )
    return training.run(trainer)
