"""GRPO: the policy against reward functions, with groups of completions as the baseline."""

from __future__ import annotations

import dataclasses
from typing import Any

from jrlhf.rollout.collect import Rollouts
from jrlhf.rollout.engine import Engine
from jrlhf.rollout.score import Actor
from jrlhf.sharding.mesh import data_shards
from jrlhf.trainers import adapters, online, setup
from jrlhf.trainers.base import Trainer
from jrlhf.trainers.grpo_config import GRPOConfig


class GRPOTrainer(Trainer):
    """Group relative policy optimisation.

    Args:
        model: a path, a hub name, or a model of `AutoModelForCausalLM`.
        reward_funcs: a function `f(prompts, completions, completion_ids, **columns) -> list of
            float or None`, a classifier or its path, or a list of these.
        args: a `GRPOConfig`.
        train_dataset: rows of prompt (text or messages); other columns go to the functions.
        processing_class: the tokenizer; None: the model's.
        reward_processing_classes: tokenizers of reward models that have not their own.
        callbacks: objects with transformers' `TrainerCallback` methods.
        peft_config: a `jrlhf.peft.LoraConfig`: only a new adapter is trained and saved.
        ref_model: the reference where beta is not 0; None: the policy as it is now.
    """

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        ref_model: Any = None,
        peft_config: Any = None,
        **old: Any,
    ) -> None:
        given = {"model": model, "args": args, "train_dataset": train_dataset,
                 "reward_funcs": reward_funcs, "processing_class": processing_class,
                 "peft_config": peft_config, "callbacks": callbacks}  # fmt: skip
        start = setup.start("GRPOTrainer", GRPOConfig, "GRPO", given, old)
        self.args, self.processing_class = start.args, start.tokenizer
        args, mesh = start.args, start.mesh
        rewards = setup.need(start.given["reward_funcs"], "GRPOTrainer", "reward_funcs")
        if args.of_vllm:
            adapters.say_once(
                f"{', '.join(args.of_vllm)}: jrlhf samples with its own engine in the training "
                "process; vllm_* fields change nothing."
            )
        plan = args.plan(data_shards(mesh), prompt_length=1)
        prompts = online.Prompts(
            start,
            count=plan.rows // plan.group,
            max_new_tokens=args.max_completion_length,
            shuffle=args.shuffle_dataset,
        )
        plan = dataclasses.replace(plan, prompt_length=prompts.length)
        suite = online.reward_suite(
            rewards, start, rows=plan.micro_rows, weights=args.reward_weights,
            tokenizers=reward_processing_classes,
        )  # fmt: skip
        self.model = setup.open_model(
            start.model, args, mesh, peft_config=start.given["peft_config"], face="GRPOTrainer"
        )
        reference = None
        if args.beta != 0:
            reference = setup.reference_of(self.model, ref_model, args, "GRPOTrainer")
        actor = Actor(self.model.net, args.temperature)
        source = Rollouts(
            actor, args, self._engine(prompts.room, plan.rows), suite, prompts, plan,
            frozen=None, reference=reference, mesh=mesh,
            reference_net=adapters.reference_net(self.model, reference),
        )  # fmt: skip
        self._prepare(
            dataset=start.given["train_dataset"], actor=actor,
            source=source,
            total_steps=args.total_steps(plan, rollouts_per_epoch=prompts.per_epoch),
            steps_per_epoch=prompts.steps_per_epoch(plan),
            callbacks=[*start.given["callbacks"], *online.samples_of(source, args)],
            keep_start=reference is not None,
            entropy=True, dropout=not args.disable_dropout,
            router_aux_loss_coef=args.router_aux_loss_coef,
        )  # fmt: skip
        source.frozen, source.trainer_state = self._frozen, self.state

    def _engine(self, room: int, rows: int) -> Engine:
        args, tokenizer = self.args, self.processing_class
        return online.make_engine(
            self.model, tokenizer, max_new_tokens=room, rows=min(rows, 64),
            eos_token_ids=online.eos_ids(self.model, tokenizer), temperature=args.temperature,
            top_k=args.top_k or 0, top_p=args.top_p, min_p=args.min_p or 0.0,
            repetition_penalty=args.repetition_penalty,
        )  # fmt: skip
