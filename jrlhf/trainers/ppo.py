"""PPO: the policy against a reward model, with a learned value function."""

from __future__ import annotations

import dataclasses
from typing import Any

from jrlhf.model import Model
from jrlhf.rollout.collect import Plan, Rollouts
from jrlhf.rollout.rewards import RewardSuite
from jrlhf.rollout.score import Actor
from jrlhf.sharding.mesh import check_batch, data_shards
from jrlhf.trainers import adapters, online, setup
from jrlhf.trainers.base import Trainer
from jrlhf.trainers.ppo_config import PPOConfig


class PPOTrainer(Trainer):
    """Proximal policy optimisation. Arguments in TRL's order; old names are translated.

    Args:
        args: a `PPOConfig`.
        processing_class: the policy's tokenizer; None: the model's.
        model: the policy: a path, a hub name, or a model of `AutoModelForCausalLM[WithValueHead]`.
        ref_model: the reference; None: the policy as it is now.
        reward_model: a classifier or its path, a reward function, or a list of these.
        train_dataset: rows of prompt (or of chosen and rejected, or of input_ids).
        value_model: a separate value model (a classifier); None: a value head on the policy.
        callbacks: objects with transformers' `TrainerCallback` methods.
        peft_config: a `jrlhf.peft.LoraConfig`: only a new adapter is trained and saved.
        reward_processing_class: tokenizer of a reward model that has not its own.
    """

    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class: Any = None,
        model: Any = None,
        ref_model: Any = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: Any = None,
        callbacks: list[Any] | None = None,
        reward_processing_class: Any = None,
        peft_config: Any = None,
        **old: Any,
    ) -> None:
        given = {"args": args, "processing_class": processing_class, "model": model,
                 "ref_model": ref_model, "reward_model": reward_model,
                 "train_dataset": train_dataset,
                 "peft_config": peft_config, "callbacks": callbacks}  # fmt: skip
        start = setup.start("PPOTrainer", PPOConfig, "PPO", given, old)
        self.args, self.processing_class = start.args, start.tokenizer
        args, mesh = start.args, start.mesh
        setup.one_of("reward_model", start.given["reward_model"], args, "reward_model_path")
        rewards = start.given["reward_model"] or args.reward_model_path
        rewards = setup.need(rewards, "PPOTrainer", "a reward_model")
        plan = args.plan(data_shards(mesh), prompt_length=1)
        check_batch(plan.batch_rows, mesh, accumulate=args.gradient_accumulation_steps)
        prompts = online.Prompts(start, count=plan.rows, max_new_tokens=args.response_length)
        plan = dataclasses.replace(plan, prompt_length=prompts.length)
        own_value = isinstance(start.model, Model) and start.model.net.spec.value_head
        self._export_value = own_value
        self.model = setup.open_model(
            start.model,
            args,
            mesh,
            value_head=value_model is None,
            face="PPOTrainer",
            peft_config=start.given["peft_config"],
        )
        value = None
        if value_model is not None:
            value = setup.open_value_model(value_model, args, mesh, face="PPOTrainer")
        self.ref_model = start.given["ref_model"]
        suite = online.reward_suite(
            rewards, start, rows=plan.micro_rows, tokenizers=reward_processing_class
        )
        self._assemble(start, prompts, plan, value, suite)

    def _assemble(
        self,
        start: setup.Start,
        prompts: online.Prompts,
        plan: Plan,
        value: Model | None,
        suite: RewardSuite,
    ) -> None:
        args = start.args
        reference = setup.reference_of(self.model, self.ref_model, args, "PPOTrainer")
        actor = Actor(self.model.net, args.temperature, None if value is None else value.decoder)
        source = Rollouts(
            actor,
            args,
            self._engine(prompts.room, plan.rows),
            suite,
            prompts,
            plan,
            frozen=None,
            reference=reference,
            reference_net=adapters.reference_net(self.model, reference),
            kl_coef=args.kl_coef if args.adap_kl_ctrl else None,
            mesh=start.mesh,
        )
        self._prepare(
            dataset=start.given["train_dataset"],
            actor=actor,
            source=source,
            total_steps=args.total_steps(plan, rollouts_per_epoch=prompts.per_epoch),
            steps_per_epoch=prompts.steps_per_epoch(plan),
            callbacks=[*start.given["callbacks"], *online.samples_of(source, args)],
            keep_start=True,
            value_model=value,
            dropout=False,
        )
        source.frozen, source.trainer_state = self._frozen, self.state

    def _engine(self, room: int, rows: int) -> Any:
        args, tokenizer = self.args, self.processing_class
        ends = online.eos_ids(self.model, tokenizer) if args.stop_token == "eos" else []
        if args.stop_token_id is not None:
            ends.append(args.stop_token_id)
        return online.make_engine(
            self.model, tokenizer, max_new_tokens=room, eos_token_ids=ends, rows=min(rows, 64),
            temperature=args.temperature, top_k=args.top_k or 0, top_p=args.top_p,
        )  # fmt: skip

    def _exported(self) -> Any:
        """The policy alone: its value head is of no use without the trainer, unless it came so."""
        return self.model if self._export_value else self.model.respec(value_head=False)
