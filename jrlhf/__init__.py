"""jrlhf: post-training for language models in JAX.

The public names are loaded on first use, so that `import jrlhf` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AutoModelForCausalLM": "jrlhf.auto",
    "AutoModelForCausalLMWithValueHead": "jrlhf.auto",
    "AutoModelForSequenceClassification": "jrlhf.auto",
    "SFTConfig": "jrlhf.trainers.sft",
    "SFTTrainer": "jrlhf.trainers.sft",
    "RewardConfig": "jrlhf.trainers.reward",
    "RewardTrainer": "jrlhf.trainers.reward",
    "DPOConfig": "jrlhf.trainers.dpo",
    "DPOTrainer": "jrlhf.trainers.dpo",
    "PPOConfig": "jrlhf.trainers.ppo",
    "PPOTrainer": "jrlhf.trainers.ppo",
    "GRPOConfig": "jrlhf.trainers.grpo",
    "GRPOTrainer": "jrlhf.trainers.grpo",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from jrlhf.auto import (
        AutoModelForCausalLM,
        AutoModelForCausalLMWithValueHead,
        AutoModelForSequenceClassification,
    )
    from jrlhf.trainers.dpo import DPOConfig, DPOTrainer
    from jrlhf.trainers.grpo import GRPOConfig, GRPOTrainer
    from jrlhf.trainers.ppo import PPOConfig, PPOTrainer
    from jrlhf.trainers.reward import RewardConfig, RewardTrainer
    from jrlhf.trainers.sft import SFTConfig, SFTTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from jrlhf.errors import suggest

        raise AttributeError(f"jrlhf has no {name!r}.{suggest(name, _HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
