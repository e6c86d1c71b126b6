"""What the configs of PPO and GRPO check alike."""

from __future__ import annotations

from typing import Any

from jrlhf.config import refuse_changed
from jrlhf.errors import ConfigError

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
        ConfigError: a count is not positive.
    """
    refuse_changed(cfg, _REFUSED)
    for name in ("max_prompt_length", *counts):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ConfigError(f"{type(cfg).__name__}.{name} must be at least 1, got {value!r}.")
