"""What the configs of PPO and GRPO check alike."""

from __future__ import annotations

from typing import Any

from jrlhf.config import check_counts, refuse_changed
from jrlhf.errors import ConfigError
from jrlhf.rollout.collect import Plan
from jrlhf.rollout.sampling import SamplingParams

# Fields of every training config that a trainer of its own samples cannot follow.
_NO_EVALUATION = "the rollouts are the evaluation; compare policies with `jrlhf evaluate`"
_REFUSED = dict.fromkeys(("eval_strategy", "eval_steps", "per_device_eval_batch_size"),
                         _NO_EVALUATION)  # fmt: skip


def check(cfg: Any, *counts: str) -> None:
    """Raises an error that names the field that cannot be followed.

    Args:
        cfg: a config of a trainer that samples.
        counts: fields that must be None or at least 1.

    Raises:
        UnsupportedFieldError: an evaluation is asked for.
        ConfigError: a count is not positive, or nothing can be sampled so.
    """
    refuse_changed(cfg, _REFUSED)
    check_counts(cfg, "max_prompt_length", *counts)
    # PPO's config has fewer of them; None is off.
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: getattr(cfg, name, None) for name in names}
    try:
        SamplingParams(**{name: value for name, value in given.items() if value is not None})
    except ConfigError as error:
        raise ConfigError(f"{type(cfg).__name__}.{error}") from None


def steps_of_epochs(cfg: Any, plan: Plan, rollouts_per_epoch: int | None) -> int:
    """Optimizer steps of `num_train_epochs` passes over the prompts.

    Raises:
        ConfigError: the prompts are a stream, which has no known length.
    """
    if rollouts_per_epoch is None:
        raise ConfigError("A stream of prompts has no known length: set max_steps.")
    return max(1, round(cfg.num_train_epochs * rollouts_per_epoch)) * plan.steps
