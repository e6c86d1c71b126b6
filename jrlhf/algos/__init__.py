"""The algorithms. One file each: hyperparameters, credit, loss. They see numbers, never a model."""

from __future__ import annotations

from jrlhf.algos.dpo import DPO
from jrlhf.algos.grpo import GRPO
from jrlhf.algos.ppo import PPO
from jrlhf.algos.reward import Reward
from jrlhf.algos.sft import SFT

ALGORITHMS: dict[str, type] = {"sft": SFT, "reward": Reward, "dpo": DPO, "ppo": PPO, "grpo": GRPO}

__all__ = ["ALGORITHMS", "DPO", "GRPO", "PPO", "SFT", "Reward"]
