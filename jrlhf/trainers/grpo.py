"""GRPO: the policy against reward functions, with groups of completions as the baseline."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

from jrlhf.algos.grpo import GRPO
from jrlhf.config import TrainingConfig, config
from jrlhf.errors import ConfigError, UnsupportedFieldError
from jrlhf.rollout.collect import Plan, Rollouts
from jrlhf.rollout.score import Actor
from jrlhf.sharding.mesh import data_shards
from jrlhf.trainers import online, setup
from jrlhf.trainers.base import Trainer

log = logging.getLogger(__name__)


@config
class GRPOConfig(GRPO, TrainingConfig):
    """Fields of GRPO, by TRL's names.

    Attributes:
        num_iterations: passes over each rollout.
        steps_per_generation: micro-batches per rollout; None: gradient_accumulation_steps.
        generation_batch_size: completions per rollout; None: per_device_train_batch_size × data
            shards × steps_per_generation.
        temperature: of sampling, and of every log-prob.
        top_k: 0 is off. Log-probs are always those of the whole distribution.
        top_p: 1 is off.
        min_p: None is off.
        repetition_penalty: 1 is off.
        max_prompt_length: longer prompts lose their beginning; None: what the context leaves.
        overlong_prompts: "truncate" (keep the end), "error" or "drop".
        reward_weights: one per reward function; None: all 1.
        shuffle_dataset: another order of the prompts each epoch.
        log_completions: print samples and write completions.jsonl at each log.
        num_completions_to_print: so many.
        use_vllm: chooses the in-process engine, as False does; said once.
        vllm_mode: only "colocate": sampler and learner share the devices by design.
        vllm_tensor_parallel_size: the mesh's tensor axis decides; said once.
        vllm_gpu_memory_utilization: the cache is sized to the rollout; said once.
    """

    learning_rate: float = 1e-6
    num_iterations: int = 1
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_prompt_length: int | None = None
    overlong_prompts: Literal["error", "drop", "truncate"] = "truncate"
    reward_weights: list[float] | None = None
    shuffle_dataset: bool = True
    log_completions: bool = False
    num_completions_to_print: int = 4
    use_vllm: bool = False
    vllm_mode: Literal["colocate", "server"] = "colocate"
    vllm_tensor_parallel_size: int | None = None
    vllm_gpu_memory_utilization: float | None = None

    def __post_init__(self) -> None:
        if self.vllm_mode == "server":
            raise UnsupportedFieldError(
                "GRPOConfig.vllm_mode='server' is not supported: jrlhf samples in the training "
                "process, on the same devices. Leave it out, or write vllm_mode='colocate'."
            )
        if self.steps_per_generation is not None and self.generation_batch_size is not None:
            raise ConfigError(
                "GRPOConfig: give one of steps_per_generation and generation_batch_size."
            )

    def plan(self, shards: int, *, prompt_length: int) -> Plan:
        """The sizes of a rollout; one step of the loop is one optimizer step."""
        micro = self.per_device_train_batch_size * shards
        batch = micro * self.gradient_accumulation_steps
        rows = micro * (self.steps_per_generation or self.gradient_accumulation_steps)
        rows = self.generation_batch_size or rows
        if rows % self.num_generations or rows % batch:
            raise ConfigError(
                f"A rollout of {rows} completions must be a multiple of num_generations="
                f"{self.num_generations} and of the batch of {batch} = per_device_train_batch_size "
                "× data shards × gradient_accumulation_steps."
            )
        return Plan(
            rows=rows,
            group=self.num_generations,
            batch_rows=batch,
            micro_rows=micro,
            epochs=self.num_iterations,
            prompt_length=prompt_length,
            seed=self.seed,
        )


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
        **old: Any,
    ) -> None:
        given = {"model": model, "args": args, "train_dataset": train_dataset,
                 "reward_funcs": reward_funcs, "processing_class": processing_class}  # fmt: skip
        given = setup.modernise("GRPOTrainer", GRPOConfig, given, old)
        model = setup.need(given["model"], "GRPOTrainer", "a model")
        rewards = setup.need(given["reward_funcs"], "GRPOTrainer", "reward_funcs")
        self.args = args = setup.named_output(given["args"], model, "GRPO")
        if args.use_vllm:
            setup.say_once("use_vllm=True: jrlhf samples with its own engine in the training "
                           "process; vllm_* fields change nothing.")  # fmt: skip
        setup.use_compile_cache()
        tokenizer = setup.tokenizer_for(given["processing_class"], model, "GRPOTrainer")
        self.processing_class = tokenizer
        mesh = setup.mesh_for(args, model)
        plan = args.plan(data_shards(mesh), prompt_length=1)
        prompts = online.Prompts(
            given["train_dataset"],
            tokenizer,
            count=plan.rows // plan.group,
            context=setup.context_length(model),
            max_new_tokens=args.max_completion_length,
            max_prompt_length=args.max_prompt_length,
            overlong=args.overlong_prompts,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.shuffle_dataset,
        )
        plan = dataclasses.replace(plan, prompt_length=prompts.length)
        self.model = setup.open_model(model, args, mesh, face="GRPOTrainer")
        actor = Actor(self.model.net, args.temperature)
        reference = None
        if args.beta != 0:
            reference = setup.reference_of(self.model, ref_model, args, "GRPOTrainer")
        engine = online.make_engine(
            self.model, tokenizer, max_new_tokens=prompts.room, rows=min(plan.rows, 64),
            eos_token_ids=online.eos_ids(self.model, tokenizer), temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, min_p=args.min_p or 0.0,
            repetition_penalty=args.repetition_penalty,
        )  # fmt: skip
        suite = online.reward_suite(
            rewards, tokenizer, mesh=mesh, rows=plan.micro_rows, weights=args.reward_weights,
            tokenizers=reward_processing_classes, dtype=setup.compute_dtype(args),
        )  # fmt: skip
        source = Rollouts(
            actor, args, engine, suite, prompts, plan, frozen=None, reference=reference, mesh=mesh
        )
        self._source = source
        per_epoch = prompts.per_epoch * plan.steps
        total = args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * per_epoch)
        show = [online.ShowSamples(lambda: source.samples, args.num_completions_to_print)]
        self._prepare(
            actor=actor,
            source=source,
            total_steps=total,
            steps_per_epoch=per_epoch,
            callbacks=[*(callbacks or ()), *(show if args.log_completions else ())],
            keep_start=reference is not None,
            entropy=True,
        )
        source.frozen = self._frozen
        source.trainer_state = self.state
