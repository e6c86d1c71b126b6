"""What is logged about a rollout, by TRL's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jrlhf.rollout.rewards import Completions, Rewards

Arrays = Mapping[str, np.ndarray]


def lengths(batch: Arrays) -> dict[str, float]:
    """Completion lengths in tokens, of all and of those that ended by themselves."""
    tokens = batch["slots"].astype(bool).sum(axis=1)  # not of the mask: it may leave rows out
    ended = tokens[batch["terminated"] > 0]
    out = {"completions/clipped_ratio": 1.0 - len(ended) / len(tokens)}
    for name, group in (("", tokens), ("terminated_", ended)):
        for kind, of in (("mean", np.mean), ("min", np.min), ("max", np.max)):
            out[f"completions/{kind}_{name}length"] = float(of(group)) if len(group) else 0.0
    return out


def rewards(names: Sequence[str], given: Rewards) -> dict[str, float]:
    """Mean and standard deviation (ddof 1) of every reward function over the rows it scored."""
    out = {}
    for name, column in zip(names, given.table.T, strict=True):
        scored = column[~np.isnan(column)]
        out[f"rewards/{name}/mean"] = float(scored.mean()) if len(scored) else float("nan")
        out[f"rewards/{name}/std"] = float(scored.std(ddof=1)) if len(scored) > 1 else 0.0
    out["rewards/unscored_ratio"] = float(np.isnan(given.total).mean())
    return out | {name: float(value) for name, value in given.logged.items()}


def agreement(batch: Arrays) -> dict[str, float]:
    """How far the sampler's log-probs are from the scorer's: rounding, or a bug."""
    real = batch["mask"] > 0
    if "old_logps" not in batch or not real.any():
        return {}
    apart = np.abs(batch["old_logps"] - batch["sampler_logps"])[real]
    return {
        "sampling/sampling_logp_difference/mean": float(apart.mean()),
        "sampling/sampling_logp_difference/max": float(apart.max()),
    }


def table(done: Completions, given: Rewards) -> list[dict[str, Any]]:
    """One row per completion: prompt, completion, reward and what `log_extra` added."""
    return [
        {
            "prompt": text(prompt),
            "completion": text(completion),
            "reward": float(given.total[i]),
            **{name: column[i] for name, column in given.extra.items()},
        }
        for i, (prompt, completion) in enumerate(zip(done.prompts, done.completions, strict=True))
    ]


def text(message: Any) -> str:
    """A text, or the contents of a conversation one per line."""
    if isinstance(message, str):
        return message
    return "\n".join(str(part["content"]) for part in message)
