"""The defaults of every config are TRL's where it has the field. (What fields do: tests/fields.)"""

from __future__ import annotations

import dataclasses

import pytest

from jrlhf.trainers.dpo import DPOConfig
from jrlhf.trainers.grpo_config import GRPOConfig
from jrlhf.trainers.ppo_config import PPOConfig
from jrlhf.trainers.reward import RewardConfig
from jrlhf.trainers.sft import SFTConfig

CONFIGS = (SFTConfig, RewardConfig, DPOConfig, PPOConfig, GRPOConfig)

# Where a default differs from TRL 1.16 on purpose, with the reason.
DIFFERENT = {
    "bf16": "None: on for accelerators, off on CPUs, where it is not always faster",
    "gradient_checkpointing": "memory is the user's to trade",
    "loss_type": "one loss, not a list of one",
    "optim": "adamw is what adamw_torch_fused means",
    "report_to": "None, TRL's 'none'",
    "logging_dir": "TRL's comes from transformers",
    "lr_scheduler_kwargs": "None for an empty dict",
    "shuffle_dataset": "rows are read in another order each epoch, as transformers' sampler does",
    "eval_strategy": "an enum there",
    "save_strategy": "an enum there",
    "lr_scheduler_type": "an enum there",
    "pad_to_multiple_of": "static shapes want a number; TRL's 'auto' is none",
    "num_completions_to_print": "a few; None prints all there",
    "disable_tqdm": "None decides by the terminal",
    "warmup_ratio": "None there, which means 0",
}


@pytest.mark.parity
@pytest.mark.parametrize("name", ["SFT", "Reward", "DPO", "GRPO"])
def test_defaults_are_those_of_trl(name: str) -> None:
    trl = pytest.importorskip("trl")
    ours = {c.__name__: c for c in CONFIGS}[f"{name}Config"]
    theirs = {f.name: f.default for f in dataclasses.fields(getattr(trl, f"{name}Config"))}
    apart = {
        field.name: (field.default, theirs[field.name])
        for field in dataclasses.fields(ours)
        if field.name in theirs
        and field.name not in DIFFERENT
        and theirs[field.name] is not dataclasses.MISSING
        and field.default != theirs[field.name]
    }
    assert not apart
