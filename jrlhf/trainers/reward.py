"""Reward modelling: a classifier that scores the chosen answer above the rejected one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jrlhf.algos.reward import Reward
from jrlhf.config import TrainingConfig, config
from jrlhf.data.collate import pair_batch
from jrlhf.data.tokenize import reward_rows
from jrlhf.rollout.score import Actor
from jrlhf.trainers import setup
from jrlhf.trainers.base import Trainer
from jrlhf.trainers.offline import OfflineData, encoder


@config
class RewardConfig(Reward, TrainingConfig):
    """Fields of reward modelling, by TRL's names.

    Attributes:
        max_length: pairs with a longer side are left out, never cut: the score is read at the end.
        append_eos: end plain text with EOS, as TRL does. Without it the model learns to score text
            that is cut off: for policies whose completions are.
        chat_template_path: file with a Jinja chat template, or a model to take it from.
        disable_dropout: train without the dropout of adapters.
    """

    learning_rate: float = 1e-4
    max_length: int | None = 1024
    append_eos: bool = True
    disable_dropout: bool = True
    chat_template_path: str | None = None


class RewardTrainer(Trainer):
    """Trains a reward model (Bradley-Terry).

    Args:
        model: a path, a hub name, or an `AutoModelForSequenceClassification` with one label.
        args: a `RewardConfig`.
        train_dataset: rows of chosen and rejected, and perhaps prompt and margin.
        eval_dataset: the same, for `evaluate`.
        processing_class: the tokenizer; None: the model's.
        callbacks: objects with transformers' `TrainerCallback` methods.
        peft_config: a `jrlhf.peft.LoraConfig`: only a new adapter is trained and saved.
    """

    def __init__(
        self,
        model: Any = None,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
        **old: Any,
    ) -> None:
        given = {"model": model, "args": args, "train_dataset": train_dataset,
                 "processing_class": processing_class,
                 "peft_config": peft_config, "callbacks": callbacks}  # fmt: skip
        start = setup.start("RewardTrainer", RewardConfig, "Reward", given, old)
        self.args, self.processing_class = start.args, start.tokenizer
        tokenizer = encoder(start.tokenizer, start.args.chat_template_path)
        self._data = OfflineData(
            start.args,
            start.mesh,
            functools.partial(
                reward_rows,
                tokenizer=tokenizer,
                max_length=start.max_length,
                append_eos=start.args.append_eos,
            ),
            functools.partial(pair_batch, pad_id=setup.pad_id(start.tokenizer)),
            max_length=start.max_length,
            vocab_size=start.vocab_size,
        )
        data = self._data.training(start.given["train_dataset"])
        evaluation = self._data.evaluation_if_given(eval_dataset)
        self.model = setup.open_model(
            start.model,
            start.args,
            start.mesh,
            head="classifier",
            face="RewardTrainer",
            peft_config=start.given["peft_config"],
        )
        setup.one_label(self.model, "RewardTrainer")
        self._prepare(
            dataset=start.given["train_dataset"],
            actor=Actor(self.model.net),
            source=data.source,
            total_steps=data.total_steps,
            steps_per_epoch=data.steps_per_epoch,
            evaluation=evaluation,
            callbacks=start.given["callbacks"],
            dropout=not start.args.disable_dropout,
        )

    def _evaluation_of(self, dataset: Any) -> Callable[[], Any]:
        return self._data.evaluation(dataset)
