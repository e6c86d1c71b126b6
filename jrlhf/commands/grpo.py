"""`jrlhf grpo`."""

from __future__ import annotations

from jrlhf.commands import training
from jrlhf.commands.adapters import peft_config
from jrlhf.config import config
from jrlhf.errors import ConfigError


@config
class GRPOArguments:
    """What GRPO needs besides.

    Attributes:
        reward_funcs: reward functions as module.attribute.
        reward_model_name_or_path: a classifier as (further) reward.
        ref_model_name_or_path: the reference where beta is not 0; None: the policy as it is now.
    """

    reward_funcs: list[str] | None = None
    reward_model_name_or_path: str | None = None
    ref_model_name_or_path: str | None = None

    SYNONYMS = {"reward_model_path": "reward_model_name_or_path"}


def main(argv: list[str]) -> int:
    from jrlhf.trainers.grpo import GRPOConfig, GRPOTrainer

    script, config, own = training.arguments(argv, GRPOConfig, GRPOArguments, verb="grpo")
    rewards = [training.function(name) for name in own.reward_funcs or ()]
    if own.reward_model_name_or_path is not None:
        rewards.append(own.reward_model_name_or_path)
    if not rewards:
        raise ConfigError("jrlhf grpo needs --reward_funcs or --reward_model_name_or_path.")
    training.start()
    train, _ = training.datasets(script, config)
    trainer = GRPOTrainer(
        model=script.model_name_or_path,
        reward_funcs=rewards,
        args=config,
        train_dataset=train,
        peft_config=peft_config(script),
        ref_model=own.ref_model_name_or_path,
    )
    return training.run(trainer)
