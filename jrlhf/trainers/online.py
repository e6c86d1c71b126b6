"""What PPO and GRPO share: prompts, the sampling engine, rewards, and samples to look at."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jrlhf.auto import AutoModelForSequenceClassification
from jrlhf.data.loader import Order, StreamLoader
from jrlhf.data.rows import Rows, RowStream, limit_ids
from jrlhf.data.sources import load_rows
from jrlhf.data.tokenize import prompt_rows
from jrlhf.errors import ConfigError, PromptTooLongError
from jrlhf.model import Model
from jrlhf.models import special_tokens
from jrlhf.rollout.collect import Plan
from jrlhf.rollout.devices import round_up
from jrlhf.rollout.engine import Engine, bucket
from jrlhf.rollout.reward_model import RewardModel
from jrlhf.rollout.rewards import RewardSuite
from jrlhf.rollout.sampling import SamplingParams
from jrlhf.sharding.distributed import is_main
from jrlhf.trainers.setup import Start, compute_dtype, pad_id

log = logging.getLogger(__name__)


class Prompts:
    """The prompts of every rollout, as a function of its number.

    Attributes:
        rows: the tokenized prompts.
        length: tokens that they are padded to.
        room: tokens that are left for completions.
        per_epoch: rollouts that one pass over the prompts takes; None for a stream.
    """

    rows: Rows | RowStream
    per_epoch: int | None

    def __init__(
        self,
        start: Start,
        *,
        count: int,
        max_new_tokens: int,
        shuffle: bool = True,
    ) -> None:
        """Loads and tokenizes.

        Args:
            start: of the face; its dataset has rows of prompt, of chosen and rejected, or of
                input_ids.
            count: prompts per rollout.
            max_new_tokens: longest completion that is asked for.
            shuffle: another order each epoch.

        Raises:
            PromptTooLongError: a prompt beyond max_prompt_length (None: what the context leaves),
                with overlong_prompts="error".
        """
        args, context = start.args, start.context
        wanted = args.max_prompt_length
        limit = context - 1 if wanted is None else min(wanted, context - 1)
        rows = prompt_rows(
            load_rows(start.given["train_dataset"]),
            start.tokenizer,
            max_prompt_length=limit,
            overlong=args.overlong_prompts,
        )
        rows = limit_ids(rows, start.vocab_size, name="train")
        if isinstance(rows, RowStream) and wanted is None:
            raise ConfigError("Streamed prompts have no known length: set max_prompt_length.")
        longest = limit if isinstance(rows, RowStream) else rows.longest
        self.room = context - longest
        if self.room < max_new_tokens:
            log.warning(
                "Completions are limited to %d tokens, not %d: the context of %d holds prompts of "
                "up to %d.", self.room, max_new_tokens, context, longest,
            )  # fmt: skip
        self.room = min(self.room, max_new_tokens)
        width = round_up(bucket(longest), args.pad_to_multiple_of)
        self.length = min(width, context - self.room)
        if self.length < longest:
            raise PromptTooLongError(f"A prompt has {longest} tokens, the context {context}.")
        self.rows = rows
        self._read = self._reader(start, count, shuffle)

    def _reader(
        self, start: Start, count: int, shuffle: bool
    ) -> Callable[[int], Sequence[Mapping[str, Any]]]:
        """The rows of a rollout, as a function of its number."""
        rows = self.rows
        seed, drop = start.data_seed, start.args.dataloader_drop_last
        if isinstance(rows, RowStream):
            # What does not fill a rollout at a stream's end is left out.
            stream = StreamLoader(rows, lambda rows, _: rows, batch_size=count, seed=seed,
                                  drop_last=True, shuffle_buffer=1000 * shuffle)  # fmt: skip
            self.per_epoch = None
            return stream.batch
        # Else an epoch's last rollout begins the next epoch.
        order = Order(len(rows), batch_size=count, seed=seed, shuffle=shuffle, drop_last=drop,
                      wrap=not drop)  # fmt: skip
        self.per_epoch = order.steps_per_epoch
        return lambda rollout: [rows[i] for i in order.indices(rollout).tolist()]

    def steps_per_epoch(self, plan: Plan) -> int | None:
        """Optimizer steps of a pass over the prompts; None for a stream."""
        return None if self.per_epoch is None else self.per_epoch * plan.steps

    def __call__(self, rollout: int) -> Sequence[Mapping[str, Any]]:
        return [{**row, "ids": row["ids"].tolist()} for row in self._read(rollout)]


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
    return Engine(model.decoder, tokenizer, params, mesh=model.mesh, rows=rows)


def eos_ids(model: Model, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the model's and the tokenizer's."""
    alone = model.source is not None and model.source.kind == "config"
    return special_tokens.ends(model.eos_token_ids, tokenizer, alone=alone)


def reward_suite(
    rewards: Any,
    start: Start,
    *,
    rows: int,
    tokenizers: Any = None,
    weights: Sequence[float] | None = None,
) -> RewardSuite:
    """Reward functions and models, as users give them.

    Args:
        rewards: a callable, a classifier, its path or hub name, or a list of these.
        start: of the face.
        rows: completions that a reward model reads at a time.
        tokenizers: one per reward (or one alone), for models that have not their own.
        weights: one per reward.
    """
    several = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    given = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers]
    given = [*given, *[None] * len(several)][: len(several)]
    functions: list[Any] = []
    for reward, own in zip(several, given, strict=True):
        if isinstance(reward, (str, Path, Model)):
            reward = reward_model(reward, start.tokenizer, mesh=start.mesh, rows=rows,
                                  tokenizer=own, dtype=compute_dtype(start.args))  # fmt: skip
        functions.append(reward)
    return RewardSuite(functions, weights)


def reward_model(
    model: Any,
    policy_tokenizer: Any,
    *,
    mesh: jax.sharding.Mesh,
    rows: int,
    tokenizer: Any = None,
    dtype: str = "float32",
) -> RewardModel:
    """A classifier, or its path or hub name, as a reward."""
    name = "reward_model"
    if isinstance(model, (str, Path)):
        path = Path(model)
        name = path.parent.name if path.name == "model" and path.parent.name else path.name
        model = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, mesh=mesh, dtype=dtype
        )
    return RewardModel(
        model.net,
        model.params,
        tokenizer or model.tokenizer,
        policy_tokenizer=policy_tokenizer,
        rows=rows,
        mesh=model.mesh,
        name=name,
    )


class ShowSamples:
    """Callback: prints samples of the last rollout at each log, and keeps them in a file.

    `completions.jsonl` in the output directory gets one line per sample: step, prompt, completion,
    reward.
    """

    def __init__(self, samples: Callable[[], list[dict[str, Any]]], count: int) -> None:
        self._samples, self._count = samples, count
        self._shown = -1

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not is_main() or state.global_step == self._shown:  # the last step is logged twice
            return
        self._shown = state.global_step
        rows = self._samples()[: self._count]
        with (Path(args.output_dir) / "completions.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(
                    json.dumps({"step": state.global_step, **row}, ensure_ascii=False) + "\n"
                )
        for row in rows:
            prompt, answer = row["prompt"][-60:], row["completion"][:120]
            print(f"  {row['reward']:+8.3f}  …{prompt!r} → {answer!r}")  # noqa: T201 (asked for)


def samples_of(source: Any, args: Any) -> list[ShowSamples]:
    """The callback that `log_completions` asks for."""
    if not args.log_completions:
        return []
    return [ShowSamples(lambda: source.samples, args.num_completions_to_print)]
