"""PPO: the policy against a reward model, with a learned value function."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jrlhf.algos.ppo import PPO
from jrlhf.config import TrainingConfig, config
from jrlhf.errors import ConfigError
from jrlhf.rollout.collect import Plan, Rollouts
from jrlhf.rollout.score import Actor
from jrlhf.sharding.mesh import check_batch, data_shards
from jrlhf.trainers import online, setup
from jrlhf.trainers.base import Trainer


@config
class PPOConfig(PPO, TrainingConfig):
    """Fields of PPO, by the names of TRL 0.12 to 1.10; those of older versions are translated.

    Attributes:
        num_ppo_epochs: passes over each rollout.
        num_mini_batches: optimizer steps per pass.
        batch_size: completions per rollout; None: per_device_train_batch_size × data shards ×
            gradient_accumulation_steps × num_mini_batches.
        mini_batch_size: completions per optimizer step; sets `num_mini_batches`.
        total_episodes: completions of the whole run; None: num_train_epochs over the prompts.
        response_length: longest completion, tokens.
        temperature: of sampling, and of every log-prob.
        top_k: 0 is off. Log-probs are always those of the whole distribution.
        top_p: 1 is off.
        stop_token: "eos" ends a completion at EOS; None always samples `response_length` tokens.
        stop_token_id: ends a completion too.
        max_prompt_length: longest prompt, tokens; None: what the context leaves.
        overlong_prompts: "error", "drop" or "truncate" (keep the end).
        sft_model_path: the model, if none is passed to the trainer.
        reward_model_path: the reward model, if none is passed to the trainer.
        log_completions: print samples and write completions.jsonl at each log.
        num_completions_to_print: so many.
    """

    learning_rate: float = 3e-6
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    batch_size: int | None = None
    mini_batch_size: int | None = None
    total_episodes: int | None = None
    response_length: int = 53
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    stop_token: Literal["eos"] | None = "eos"
    stop_token_id: int | None = None
    max_prompt_length: int | None = None
    overlong_prompts: Literal["error", "drop", "truncate"] = "error"
    sft_model_path: str | None = None
    reward_model_path: str | None = None
    log_completions: bool = False
    num_completions_to_print: int = 4

    ALIASES = {"ppo_epochs": "num_ppo_epochs", "init_kl_coef": "kl_coef",
               "max_new_tokens": "response_length"}  # fmt: skip
    REFUSED = {
        "local_rollout_forward_batch_size": "scoring uses the micro-batch of training, so that the "
        "first ratio is exactly 1",
        "num_sample_generations": "use log_completions=True",
    }

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.mini_batch_size is not None:
            if self.batch_size % self.mini_batch_size:
                raise ConfigError(
                    f"PPOConfig.batch_size={self.batch_size} is not a multiple of "
                    f"mini_batch_size={self.mini_batch_size}."
                )
            count = self.batch_size // self.mini_batch_size
            object.__setattr__(self, "num_mini_batches", count)
        elif self.mini_batch_size is not None:
            raise ConfigError("PPOConfig.mini_batch_size needs batch_size.")

    def plan(self, shards: int, *, prompt_length: int) -> Plan:
        """The sizes of a rollout; one step of the loop is one optimizer step."""
        micro = self.per_device_train_batch_size * shards
        rows = micro * self.gradient_accumulation_steps * self.num_mini_batches
        if self.batch_size is not None:
            rows = self.batch_size
            parts = self.num_mini_batches * self.gradient_accumulation_steps
            if rows % parts:
                raise ConfigError(
                    f"PPOConfig.batch_size={rows} does not divide into num_mini_batches × "
                    f"gradient_accumulation_steps = {parts}."
                )
            micro = rows // parts
        return Plan(
            rows=rows,
            batch_rows=rows // self.num_mini_batches,
            micro_rows=micro,
            epochs=self.num_ppo_epochs,
            prompt_length=prompt_length,
            seed=self.seed,
        )


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
        **old: Any,
    ) -> None:
        given = {"args": args, "processing_class": processing_class, "model": model,
                 "ref_model": ref_model, "reward_model": reward_model,
                 "train_dataset": train_dataset}  # fmt: skip
        given = setup.modernise("PPOTrainer", PPOConfig, given, old)
        args = given["args"]
        model = setup.need(given["model"] or args.sft_model_path, "PPOTrainer", "a model")
        rewards = given["reward_model"] or args.reward_model_path
        rewards = setup.need(rewards, "PPOTrainer", "a reward_model")
        self.args = args = setup.named_output(args, model, "PPO")
        setup.use_compile_cache()
        tokenizer = setup.tokenizer_for(given["processing_class"], model, "PPOTrainer")
        self.processing_class = tokenizer
        mesh = setup.mesh_for(args, model)
        plan = args.plan(data_shards(mesh), prompt_length=1)
        check_batch(plan.batch_rows, mesh, accumulate=args.gradient_accumulation_steps)
        prompts = online.Prompts(
            given["train_dataset"],
            tokenizer,
            count=plan.rows,
            context=setup.context_length(model),
            max_new_tokens=args.response_length,
            max_prompt_length=args.max_prompt_length,
            overlong=args.overlong_prompts,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        plan = dataclasses.replace(plan, prompt_length=prompts.length)
        self._export_value = getattr(getattr(model, "net", None), "spec", None) is not None and (
            model.net.spec.value_head
        )
        self.model = setup.open_model(
            model, args, mesh, value_head=value_model is None, face="PPOTrainer"
        )
        value = None
        if value_model is not None:
            value = setup.open_value_model(value_model, args, mesh, face="PPOTrainer")
        actor = Actor(self.model.net, args.temperature, None if value is None else value.net)
        reference = setup.reference_of(self.model, given["ref_model"], args, "PPOTrainer")
        self._source = source = Rollouts(
            actor,
            args,
            self._engine(prompts.room, plan.rows),
            online.reward_suite(
                rewards, tokenizer, mesh=mesh, rows=plan.micro_rows,
                tokenizers=reward_processing_class, dtype=setup.compute_dtype(args),
            ),
            prompts,
            plan,
            frozen=None,
            reference=reference,
            kl_coef=args.kl_coef if args.adap_kl_ctrl else None,
            mesh=mesh,
        )  # fmt: skip
        per_epoch = prompts.per_epoch * plan.steps
        total = args.max_steps
        if total <= 0:
            total = round(args.num_train_epochs * prompts.per_epoch) * plan.steps
            if args.total_episodes is not None:
                total = -(-args.total_episodes // plan.rows) * plan.steps
        show = [online.ShowSamples(lambda: source.samples, args.num_completions_to_print)]
        self._prepare(
            actor=actor,
            source=source,
            total_steps=total,
            steps_per_epoch=per_epoch,
            callbacks=[*(callbacks or ()), *(show if args.log_completions else ())],
            keep_start=True,
            value_model=value,
        )
        source.frozen = self._frozen
        source.trainer_state = self.state

    def _engine(self, room: int, rows: int) -> Any:
        args, tokenizer = self.args, self.processing_class
        ends = online.eos_ids(self.model, tokenizer) if args.stop_token == "eos" else []
        if args.stop_token_id is not None:
            ends.append(args.stop_token_id)
        return online.make_engine(
            self.model, tokenizer, max_new_tokens=room, eos_token_ids=ends, rows=min(rows, 64),
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        )  # fmt: skip

    def _exported(self) -> Any:
        """The policy alone: its value head is of no use without the trainer, unless it came so."""
        return self.model if self._export_value else self.model.respec(value_head=False)
