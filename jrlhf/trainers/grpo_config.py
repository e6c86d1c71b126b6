"""Fields of GRPO, and the sizes of a rollout that they ask for."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jrlhf.algos.grpo import GRPO
from jrlhf.config import TrainingConfig, config
from jrlhf.errors import ConfigError, UnsupportedFieldError
from jrlhf.foreign import GRPO_REFUSED
from jrlhf.rollout.collect import Plan
from jrlhf.trainers import online_config


@config
class GRPOConfig(GRPO, TrainingConfig):
    """Fields of GRPO, by TRL's names.

    Attributes:
        num_iterations: passes over each rollout.
        steps_per_generation: micro-batches per rollout; None: gradient_accumulation_steps.
        generation_batch_size: completions per rollout; None: per_device_train_batch_size × data
            shards × steps_per_generation.
        temperature: of sampling, and of every log-prob.
        top_k: 0 or None is off. Log-probs are always those of the whole distribution.
        top_p: 1 is off.
        min_p: None is off.
        repetition_penalty: 1 is off.
        max_prompt_length: longer prompts lose their beginning; None: what the context leaves.
        overlong_prompts: "truncate" (keep the end), "error" or "drop".
        reward_weights: one per reward function; None: all 1.
        shuffle_dataset: another order of the prompts each epoch.
        disable_dropout: train without the dropout of adapters.
        router_aux_loss_coef: weight of the load-balancing loss of a model with experts; None: as
            the model's config says; 0 turns it off.
        log_completions: print samples and write completions.jsonl at each log.
        num_completions_to_print: so many; None: all.
        use_vllm: chooses the in-process engine, as False does; said once.
        vllm_mode: only "colocate": sampler and learner share the devices by design.
        vllm_tensor_parallel_size: changes nothing, and that is said once: the mesh decides.
        vllm_gpu_memory_utilization: the same: the cache is sized to the rollout.
    """

    learning_rate: float = 1e-6
    num_iterations: int = 1
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    temperature: float = 1.0
    top_k: int | None = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_prompt_length: int | None = None
    overlong_prompts: Literal["error", "drop", "truncate"] = "truncate"
    reward_weights: list[float] | None = None
    shuffle_dataset: bool = True
    disable_dropout: bool = False
    router_aux_loss_coef: float | None = None
    log_completions: bool = False
    num_completions_to_print: int | None = 4
    use_vllm: bool = False
    vllm_mode: Literal["colocate", "server"] = "colocate"
    vllm_tensor_parallel_size: int = 1
    vllm_gpu_memory_utilization: float = 0.3

    REFUSED = GRPO_REFUSED

    def __post_init__(self) -> None:
        online_config.check(self, "num_iterations", "steps_per_generation", "generation_batch_size")
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

    @property
    def of_vllm(self) -> list[str]:
        """The fields that ask for vLLM and do not have their defaults."""
        fields = (f for f in dataclasses.fields(self) if "vllm" in f.name)
        return [f.name for f in fields if getattr(self, f.name) != f.default]

    def total_steps(self, plan: Plan, *, rollouts_per_epoch: int | None) -> int:
        """Optimizer steps of the run."""
        if self.max_steps > 0:
            return self.max_steps
        return online_config.steps_of_epochs(self, plan, rollouts_per_epoch)
