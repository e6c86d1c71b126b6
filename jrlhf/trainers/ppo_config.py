"""Fields of PPO, and the sizes of a rollout that they ask for."""

from __future__ import annotations

from typing import Literal

from jrlhf.algos.ppo import PPO
from jrlhf.config import TrainingConfig, config
from jrlhf.errors import ConfigError
from jrlhf.rollout.collect import Plan
from jrlhf.trainers import online_config


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
        top_k: 0 or None is off. Log-probs are always those of the whole distribution.
        top_p: 1 is off.
        stop_token: "eos" ends a completion at EOS; None always samples `response_length` tokens.
        stop_token_id: ends a completion too.
        max_prompt_length: longest prompt, tokens; None: what the context leaves.
        overlong_prompts: "error", "drop" or "truncate" (keep the end).
        sft_model_path: the model, if none is passed to the trainer.
        reward_model_path: the reward model, if none is passed to the trainer.
        log_completions: print samples and write completions.jsonl at each log.
        num_completions_to_print: so many; None: all.
    """

    learning_rate: float = 3e-6
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    batch_size: int | None = None
    mini_batch_size: int | None = None
    total_episodes: int | None = None
    response_length: int = 53
    temperature: float = 0.7
    top_k: int | None = 0
    top_p: float = 1.0
    stop_token: Literal["eos"] | None = "eos"
    stop_token_id: int | None = None
    max_prompt_length: int | None = None
    overlong_prompts: Literal["error", "drop", "truncate"] = "error"
    sft_model_path: str | None = None
    reward_model_path: str | None = None
    log_completions: bool = False
    num_completions_to_print: int | None = 4

    ALIASES = {"ppo_epochs": "num_ppo_epochs", "init_kl_coef": "kl_coef",
               "max_new_tokens": "response_length"}  # fmt: skip
    REFUSED = {
        "local_rollout_forward_batch_size": "scoring uses the micro-batch of training, so that the "
        "first ratio is exactly 1",
        "num_sample_generations": "use log_completions=True",
    }

    def __post_init__(self) -> None:
        online_config.check(
            self, "num_ppo_epochs", "num_mini_batches", "batch_size", "mini_batch_size",
            "total_episodes", "response_length",
        )  # fmt: skip
        if self.batch_size is not None and self.mini_batch_size is not None:
            if self.batch_size % self.mini_batch_size:
                raise ConfigError(
                    f"PPOConfig.batch_size={self.batch_size} is not a multiple of "
                    f"mini_batch_size={self.mini_batch_size}."
                )
            count = self.batch_size // self.mini_batch_size
            if self.num_mini_batches not in (1, count):
                raise ConfigError(
                    f"PPOConfig: batch_size={self.batch_size} and mini_batch_size="
                    f"{self.mini_batch_size} make {count} mini-batches, num_mini_batches="
                    f"{self.num_mini_batches} says otherwise; leave one of them out."
                )
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

    def total_steps(self, plan: Plan, *, rollouts_per_epoch: int | None) -> int:
        """Optimizer steps of the run: max_steps, else total_episodes, else the epochs."""
        if self.max_steps > 0:
            return self.max_steps
        if self.total_episodes is not None:
            return -(-self.total_episodes // plan.rows) * plan.steps
        return online_config.steps_of_epochs(self, plan, rollouts_per_epoch)
