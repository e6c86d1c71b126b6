"""SFT: supervised fine-tuning on texts, dialogues and prompt-completion pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from jrlhf.algos.sft import SFT
from jrlhf.config import TrainingConfig, config
from jrlhf.data.collate import lm_batch
from jrlhf.data.tokenize import sft_rows
from jrlhf.rollout.score import Actor
from jrlhf.trainers import setup
from jrlhf.trainers.base import Trainer
from jrlhf.trainers.offline import OfflineData, encoder


@config
class SFTConfig(SFT, TrainingConfig):
    """Fields of SFT, by TRL's names.

    Attributes:
        max_length: longer rows are cut at their end; None: the model's context.
        packing: fill rows of `max_length` with several documents, which do not see each other.
        packing_strategy: "bfd" (best fit, long documents cut), "bfd_split" or "wrapped".
        completion_only_loss: train on completions alone; None: where the data has prompts.
        assistant_only_loss: train on the assistant's turns alone.
        dataset_text_field: column of plain texts.
        chat_template_path: file with a Jinja chat template, or a model to take it from.
        shuffle_dataset: read rows in another order each epoch.
        router_aux_loss_coef: weight of the load-balancing loss of a model with experts; None: as
            the model's config says; 0 turns it off.
    """

    learning_rate: float = 2e-5
    max_length: int | None = 1024
    packing: bool = False
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    dataset_text_field: str = "text"
    chat_template_path: str | None = None
    shuffle_dataset: bool = True
    router_aux_loss_coef: float | None = None

    ALIASES = {"max_seq_length": "max_length"}
    REFUSED = {
        "truncation_mode": "rows are cut at their end",
        "eval_packing": "evaluation rows are packed as training rows are",
    }


class SFTTrainer(Trainer):
    """Supervised fine-tuning.

    Args:
        model: a path, a hub name, or a model of `AutoModelForCausalLM`.
        args: an `SFTConfig`.
        train_dataset: rows of text, messages, prompt + completion, or input_ids; see `jrlhf.data`.
        eval_dataset: the same, for `evaluate`.
        processing_class: the tokenizer; None: the model's.
        formatting_func: row -> text.
        callbacks: objects with transformers' `TrainerCallback` methods.
        peft_config: a `jrlhf.peft.LoraConfig`: only a new adapter is trained and saved.
    """

    def __init__(
        self,
        model: Any = None,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
        **old: Any,
    ) -> None:
        given = {"model": model, "args": args, "train_dataset": train_dataset,
                 "processing_class": processing_class,
                 "peft_config": peft_config, "callbacks": callbacks}  # fmt: skip
        start = setup.start("SFTTrainer", SFTConfig, "SFT", given, old)
        self.args, self.processing_class = start.args, start.tokenizer
        self._data = _data(start, formatting_func)
        data = self._data.training(start.given["train_dataset"])
        evaluation = self._data.evaluation_if_given(eval_dataset)
        self.model = setup.open_model(
            start.model,
            start.args,
            start.mesh,
            peft_config=start.given["peft_config"],
            face="SFTTrainer",
        )
        self._prepare(
            dataset=start.given["train_dataset"],
            actor=Actor(self.model.net),
            source=data.source,
            total_steps=data.total_steps,
            steps_per_epoch=data.steps_per_epoch,
            evaluation=evaluation,
            callbacks=start.given["callbacks"],
            entropy=True,
            router_aux_loss_coef=self.args.router_aux_loss_coef,
        )

    def _evaluation_of(self, dataset: Any) -> Callable[[], Any]:
        return self._data.evaluation(dataset)


def _data(start: setup.Start, formatting_func: Callable[[dict[str, Any]], str] | None) -> Any:
    args = start.args
    rows_of = functools.partial(
        sft_rows,
        tokenizer=encoder(start.tokenizer, args.chat_template_path),
        max_length=start.max_length,
        packing=args.packing,
        packing_strategy=args.packing_strategy,
        completion_only_loss=args.completion_only_loss,
        assistant_only_loss=args.assistant_only_loss,
        dataset_text_field=args.dataset_text_field,
        formatting_func=formatting_func,
    )
    return OfflineData(
        args,
        start.mesh,
        rows_of,
        functools.partial(lm_batch, pad_id=setup.pad_id(start.tokenizer)),
        max_length=start.max_length,
        vocab_size=start.vocab_size,
        always_longest=args.packing,
        shuffle=args.shuffle_dataset,
    )
