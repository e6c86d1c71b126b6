"""jrlhf: post-training for language models in JAX.

The public names are loaded on first use, so that `import jrlhf` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AutoModelForCausalLM": "jrlhf.auto",
    "AutoModelForCausalLMWithValueHead": "jrlhf.auto",
    "AutoModelForSequenceClassification": "jrlhf.auto",
    "AutoModelForTokenClassification": "jrlhf.auto",
    "LoraConfig": "jrlhf.peft",
    "PeftModel": "jrlhf.peft",
    "get_peft_model": "jrlhf.peft",
    "SFTConfig": "jrlhf.trainers.sft",
    "SFTTrainer": "jrlhf.trainers.sft",
    "RewardConfig": "jrlhf.trainers.reward",
    "RewardTrainer": "jrlhf.trainers.reward",
    "DPOConfig": "jrlhf.trainers.dpo",
    "DPOTrainer": "jrlhf.trainers.dpo",
    "PPOConfig": "jrlhf.trainers.ppo_config",
    "PPOTrainer": "jrlhf.trainers.ppo",
    "GRPOConfig": "jrlhf.trainers.grpo_config",
    "GRPOTrainer": "jrlhf.trainers.grpo",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from jrlhf.errors import suggest

        raise AttributeError(f"jrlhf has no {name!r}.{suggest(name, _HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
