"""What PPO and GRPO share: prompts, the sampling engine, rewards, and samples to look at."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jrlhf.auto import AutoModelForSequenceClassification, Model
from jrlhf.data.loader import Order
from jrlhf.data.rows import RowStream
from jrlhf.data.sources import load_rows
from jrlhf.data.tokenize import prompt_rows
from jrlhf.errors import ConfigError, PromptTooLongError
from jrlhf.models.tokenizer import load_tokenizer
from jrlhf.rollout.engine import Engine, bucket
from jrlhf.rollout.reward_model import RewardModel
from jrlhf.rollout.rewards import RewardSuite
from jrlhf.rollout.sampling import SamplingParams
from jrlhf.sharding.distributed import is_main
from jrlhf.trainers.setup import pad_id

log = logging.getLogger(__name__)


class Prompts:
    """The prompts of every rollout, as a function of its number.

    Attributes:
        length: tokens that prompts are padded to.
        room: tokens that are left for completions.
        per_epoch: rollouts that one pass over the prompts takes.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        *,
        count: int,
        context: int,
        max_new_tokens: int,
        max_prompt_length: int | None,
        overlong: str,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Loads and tokenizes.

        Args:
            dataset: rows of prompt, of chosen and rejected, or of input_ids.
            tokenizer: the policy's.
            count: prompts per rollout.
            context: positions of the model.
            max_new_tokens: longest completion that is asked for.
            max_prompt_length: longer prompts are treated as `overlong` says; None: the context's
                room.
            overlong: "error", "drop" or "truncate" (keeps the end).
            seed: of the order.
            shuffle: another order each epoch.

        Raises:
            PromptTooLongError: a prompt that fills the context, or is overlong with "error".
        """
        limit = context - 1 if max_prompt_length is None else min(max_prompt_length, context - 1)
        rows = prompt_rows(
            load_rows(dataset),
            tokenizer,
            max_prompt_length=limit,
            overlong=overlong,  # type: ignore[arg-type]
        )
        if isinstance(rows, RowStream):
            raise ConfigError("Prompts cannot be streamed yet: pass a map-style dataset.")
        self._rows = rows
        longest = rows.longest
        self.room = context - longest
        if self.room < max_new_tokens:
            log.warning(
                "Completions are limited to %d tokens, not %d: the context of %d holds prompts of "
                "up to %d.", self.room, max_new_tokens, context, longest,
            )  # fmt: skip
        self.room = min(self.room, max_new_tokens)
        self.length = min(bucket(longest), context - self.room)
        if self.length < longest:
            raise PromptTooLongError(f"A prompt has {longest} tokens, the context {context}.")
        self._order = Order(len(rows), batch_size=count, seed=seed, shuffle=shuffle, wrap=True)
        self.per_epoch = self._order.steps_per_epoch

    def __call__(self, rollout: int) -> Sequence[Mapping[str, Any]]:
        rows = [self._rows[i] for i in self._order.indices(rollout).tolist()]
        return [{**row, "ids": row["ids"].tolist()} for row in rows]


def make_engine(
    model: Model,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    rows: int,
    **sampling: Any,
) -> Engine:
    """The engine that samples rollouts from `model`."""
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        eos_token_ids=tuple(eos_token_ids),
        pad_token_id=pad_id(tokenizer),
        **sampling,
    )
    return Engine(model.net, tokenizer, params, mesh=model.mesh, rows=rows)


def eos_ids(model: Model, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the model's and the tokenizer's."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return list(dict.fromkeys([*model.eos_token_ids, *own]))


def reward_suite(
    rewards: Any,
    tokenizer: Any,
    *,
    mesh: jax.sharding.Mesh,
    rows: int,
    tokenizers: Any = None,
    weights: Sequence[float] | None = None,
    dtype: str = "float32",
) -> RewardSuite:
    """Reward functions and models, as users give them.

    Args:
        rewards: a callable, a classifier, its path or hub name, or a list of these.
        tokenizer: the policy's.
        mesh: where reward models that are loaded here go.
        rows: completions that a reward model reads at a time.
        tokenizers: one per reward (or one alone), for models that are not their own's; None: theirs.
        weights: one per reward.
        dtype: compute type of reward models loaded here.
    """
    several = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    given = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers]
    given += [None] * (len(several) - len(given))
    functions: list[Any] = []
    for reward, own in zip(several, given, strict=True):
        name = "reward_model"
        if isinstance(reward, (str, Path)):
            name = Path(reward).name if Path(reward).name != "model" else Path(reward).parent.name
            own = own or load_tokenizer(reward)
            reward = AutoModelForSequenceClassification.from_pretrained(
                reward, num_labels=1, mesh=mesh, dtype=dtype
            )
        if isinstance(reward, Model):
            reward = RewardModel(
                reward.net,
                reward.params,
                own or reward.tokenizer,
                policy_tokenizer=tokenizer,
                rows=rows,
                mesh=reward.mesh,
                name=name,
            )
        functions.append(reward)
    return RewardSuite(functions, weights)


class ShowSamples:
    """Callback: prints samples of the last rollout at each log, and keeps them in a file.

    `completions.jsonl` in the output directory gets one line per sample: step, prompt, completion,
    reward.
    """

    def __init__(self, samples: Callable[[], list[dict[str, Any]]], count: int) -> None:
        self._samples, self._count = samples, count

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not is_main():
            return
        rows = self._samples()[: self._count]
        with (Path(args.output_dir) / "completions.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(
                    json.dumps({"step": state.global_step, **row}, ensure_ascii=False) + "\n"
                )
        for row in rows:
            prompt, answer = row["prompt"][-60:], row["completion"][:120]
            print(f"  {row['reward']:+8.3f}  …{prompt!r} → {answer!r}")
