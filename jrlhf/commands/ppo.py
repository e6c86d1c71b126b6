"""`jrlhf ppo`."""

from __future__ import annotations

from jrlhf.commands import training
from jrlhf.commands.adapters import peft_config
from jrlhf.config import config


@config
class PPOArguments:
    """What PPO needs besides.

    Attributes:
        ref_model_name_or_path: the reference; None: the policy as it is now.
        value_model_name_or_path: a separate value model; None: a value head on the policy.
        reward_funcs: reward functions as module.attribute, in place of reward_model_path.
    """

    ref_model_name_or_path: str | None = None
    value_model_name_or_path: str | None = None
    reward_funcs: list[str] | None = None


def main(argv: list[str]) -> int:
    from jrlhf.trainers.ppo import PPOConfig, PPOTrainer

    script, config, own = training.arguments(argv, PPOConfig, PPOArguments, verb="ppo")
    training.start()
    train, _ = training.datasets(script, config)
    rewards = [training.function(name) for name in own.reward_funcs or ()]
    trainer = PPOTrainer(
        args=config,
        model=script.model_name_or_path,
        ref_model=own.ref_model_name_or_path,
        value_model=own.value_model_name_or_path,
        reward_model=rewards or None,
        train_dataset=train,
        peft_config=peft_config(script),
    )
    return training.run(trainer)
