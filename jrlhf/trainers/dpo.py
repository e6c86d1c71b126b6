"""DPO: the policy directly from preference pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from jrlhf.algos.dpo import DPO
from jrlhf.config import TrainingConfig, config
from jrlhf.data.collate import pair_batch
from jrlhf.data.tokenize import preference_rows
from jrlhf.rollout.collect import score
from jrlhf.rollout.score import Actor
from jrlhf.trainers import adapters, setup
from jrlhf.trainers.base import Trainer
from jrlhf.trainers.offline import OfflineData
from jrlhf.types import Batch


@config
class DPOConfig(DPO, TrainingConfig):
    """Fields of DPO, by TRL's names.

    Attributes:
        max_length: prompt and answer together are cut to this; None: the model's context.
        truncation_mode: "keep_start" cuts their end, "keep_end" their beginning.
        disable_dropout: train without the dropout of adapters.
        router_aux_loss_coef: weight of the load-balancing loss of a model with experts; None: as
            the model's config says; 0 turns it off.
    """

    learning_rate: float = 1e-6
    max_length: int | None = 1024
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    disable_dropout: bool = True
    router_aux_loss_coef: float | None = None

    REFUSED = {
        "rpo_alpha": "mixtures of losses are not supported",
        "reference_free": "give a uniform reference by ref_logps of 0 in the dataset's place",
        "generate_during_eval": "use `jrlhf evaluate`",
        "max_prompt_length": "TRL removed it too; max_length cuts prompt and answer together",
        "max_completion_length": "TRL removed it too; max_length cuts prompt and answer together",
        "precompute_ref_log_probs": "the reference is scored batch by batch; leave it out",
        "precompute_ref_batch_size": "the reference is scored batch by batch; leave it out",
        "loss_weights": "mixtures of losses are not supported",
        "f_alpha_divergence_coef": "only the reverse KL is supported",
        "discopop_tau": "DiscoPOP is not supported",
        "f_divergence_type": "only the reverse KL is supported",
        "ld_alpha": "length desensitisation is not supported",
        "use_weighting": "WPO weights are not supported",
    }


class DPOTrainer(Trainer):
    """Direct preference optimisation.

    Args:
        model: a path, a hub name, or a model of `AutoModelForCausalLM`.
        ref_model: the reference; None: the model as it is now.
        args: a `DPOConfig`.
        train_dataset: rows of (prompt,) chosen and rejected; without a prompt it is their shared
            beginning.
        eval_dataset: the same, for `evaluate`.
        processing_class: the tokenizer; None: the model's.
        callbacks: objects with transformers' `TrainerCallback` methods.
        peft_config: a `jrlhf.peft.LoraConfig`: only a new adapter is trained and saved.
    """

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
        **old: Any,
    ) -> None:
        given = {"model": model, "ref_model": ref_model, "args": args,
                 "train_dataset": train_dataset, "processing_class": processing_class,
                 "peft_config": peft_config, "callbacks": callbacks}  # fmt: skip
        start = setup.start("DPOTrainer", DPOConfig, "DPO", given, old)
        self.args, self.processing_class = start.args, start.tokenizer
        longest = start.max_length
        self._data = OfflineData(
            start.args,
            start.mesh,
            functools.partial(
                preference_rows,
                tokenizer=start.tokenizer,
                max_length=longest,
                truncation_mode=start.args.truncation_mode,
            ),
            functools.partial(pair_batch, pad_id=setup.pad_id(start.tokenizer)),
            max_length=longest,
            vocab_size=start.vocab_size,
            annotate=self._with_reference,
        )
        data = self._data.training(start.given["train_dataset"])
        evaluation = self._data.evaluation_if_given(eval_dataset)
        self.model = setup.open_model(
            start.model,
            start.args,
            start.mesh,
            peft_config=start.given["peft_config"],
            face="DPOTrainer",
        )
        self.ref_model = start.given["ref_model"]
        self._reference = setup.reference_of(self.model, self.ref_model, start.args, "DPOTrainer")
        self._actor = Actor(self.model.net)
        self._scorer = Actor(adapters.reference_net(self.model, self._reference))
        self._prepare(
            dataset=start.given["train_dataset"],
            actor=self._actor,
            source=data.source,
            total_steps=data.total_steps,
            steps_per_epoch=data.steps_per_epoch,
            evaluation=evaluation,
            callbacks=start.given["callbacks"],
            dropout=not start.args.disable_dropout,
            keep_start=True,
            entropy=True,
            router_aux_loss_coef=self.args.router_aux_loss_coef,
        )

    def _with_reference(self, batch: Batch) -> Batch:
        mesh = self.model.mesh
        out = score(self._scorer, self._reference, self._frozen, batch, mesh=mesh)
        return {**batch, "ref_logps": out.logps}

    def _evaluation_of(self, dataset: Any) -> Callable[[], Any]:
        return self._data.evaluation(dataset)
