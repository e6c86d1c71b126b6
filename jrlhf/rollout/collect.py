"""Rollouts: sample, reward, score, credit; then mini-batches for as many epochs as wanted.

`Rollouts` is the online *source* of the training loop. Optimizer step `t` uses mini-batch
`t % plan.steps` of rollout `t // plan.steps`; what a rollout samples and how it is shuffled are
functions of (seed, rollout, epoch), so a resumed run needs only the buffer of a rollout that it
stands in the middle of.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.errors import CheckpointError, ConfigError, DataError
from jrlhf.models.build import Net
from jrlhf.models.build_encoder import AnyNet
from jrlhf.ops.layout import jit
from jrlhf.rollout import devices, summary
from jrlhf.rollout.engine import Completion, Engine
from jrlhf.rollout.rewards import Completions, Rewards, RewardSuite
from jrlhf.rollout.score import Actor
from jrlhf.types import Batch, Metric, Outputs, PyTree

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a rollout and how it is used up.

    Attributes:
        rows: completions per rollout.
        group: completions per prompt.
        batch_rows: completions per optimizer step.
        micro_rows: completions per forward pass when scoring: those of a micro-batch.
        epochs: passes over the rollout.
        prompt_length: prompts are padded to this.
        seed: of the run.
    """

    rows: int
    group: int = 1
    batch_rows: int
    micro_rows: int
    epochs: int = 1
    prompt_length: int
    seed: int = 0

    def __post_init__(self) -> None:
        divisible = (("rows", "group"), ("rows", "batch_rows"), ("batch_rows", "micro_rows"))
        for whole, part in divisible:
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"{whole}={getattr(self, whole)} of a rollout is not a multiple of "
                    f"{part}={getattr(self, part)}."
                )

    @property
    def batches(self) -> int:
        """Optimizer steps per epoch."""
        return self.rows // self.batch_rows

    @property
    def steps(self) -> int:
        """Optimizer steps per rollout."""
        return self.batches * self.epochs

    def order(self, rollout: int, epoch: int) -> np.ndarray:
        """The order of the rows in an epoch: a function of (seed, rollout, epoch)."""
        return np.random.default_rng([self.seed % 2**32, rollout, epoch]).permutation(self.rows)


@functools.partial(jit, static_argnames=("actor", "mesh"))
def score(
    actor: Actor,
    trainable: PyTree,
    frozen: PyTree,
    batch: Batch,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Outputs:
    """Log-probs and values of finished sequences; the same maths as in the loss, no gradient."""
    with devices.active(mesh):
        out = actor.outputs(trainable, frozen, batch)
    return Outputs(logps=out.logps, values=out.values)


@functools.partial(jit, static_argnames=("net", "mesh"))
def below(
    net: Net, params: PyTree, batch: Batch, *, mesh: jax.sharding.Mesh | None = None
) -> jax.Array:
    """`net.trunk` of finished sequences."""
    with devices.active(mesh):
        return net.trunk(params, batch["ids"], lengths=batch["lengths"])


# What a rollout may keep of its trunk states, over all processes. Beyond it they are computed anew
# in every pass: host memory and transfers would cost more than frozen layers do.
TRUNK_BYTES = 2**28


class Rollouts:
    """The source of PPO's and GRPO's batches.

    Attributes:
        samples: the last rollout as rows of a table: prompt, completion, reward.
        trainer_state: handed to reward functions.
    """

    def __init__(
        self,
        actor: Actor,
        algorithm: Any,
        engine: Engine,
        rewards: RewardSuite,
        prompts: Callable[[int], Sequence[Mapping[str, Any]]],
        plan: Plan,
        *,
        frozen: PyTree,
        reference: PyTree = None,
        reference_net: AnyNet | None = None,
        kl_coef: float | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        """Prepares a source; nothing is sampled yet.

        Args:
            actor: the policy (and value model).
            algorithm: its `credit` and `rollout_metrics` see the whole rollout.
            engine: samples from the policy.
            rewards: scores completions.
            prompts: rollout number -> its `rows / group` prompts, as `data.prompt_rows` makes them:
                `ids`, `prompt` (text, messages or None) and `columns`.
            plan: sizes.
            frozen: the frozen half of the actor's parameters.
            reference: the trainable half of the reference policy; None: no `ref_logps`.
            reference_net: the reference's net; None: the actor's own. Adapters need no copy: the
                reference is the same base with them off, and its half is {}.
            kl_coef: start of an adaptive KL coefficient; None: the algorithm has none.
            mesh: rows are cut over its data and fsdp axes.
        """
        self.actor, self.algorithm, self.engine, self.rewards = actor, algorithm, engine, rewards
        self.plan, self.frozen, self.reference, self.mesh = plan, frozen, reference, mesh
        self.reference_net = reference_net or actor.net
        self.kl_coef = kl_coef
        self.samples: list[dict[str, Any]] = []
        self.trainer_state: Any = None
        self._prompts = prompts
        self._tell: Callable[[int, int], None] | None = None
        self._buffer: Arrays = {}
        self._rollout = -1
        self._pending: list[dict[str, float]] = []

        def credited(batch: Batch, kl_coef: jax.Array | None) -> tuple[Batch, dict[str, Metric]]:
            if kl_coef is None:
                return algorithm.credit(batch), algorithm.rollout_metrics(batch)
            metrics = algorithm.rollout_metrics(batch, kl_coef=kl_coef)
            return algorithm.credit(batch, kl_coef=kl_coef), metrics

        self._credited = jax.jit(credited)

    # -------------------------------------------------------------- the source protocol

    def batch(self, step: int, state: Any) -> Batch:
        """The batch of an optimizer step; collects a rollout when one begins.

        Args:
            step: number of the optimizer step, from 0.
            state: the training state; `params` is the trainable half of the actor's parameters.
        """
        rollout, place = divmod(step, self.plan.steps)
        if rollout != self._rollout:
            if place:
                raise CheckpointError(
                    f"Step {step} lies inside rollout {rollout}, whose samples are not in the "
                    "checkpoint."
                )
            self._buffer = self.collect(rollout, state.params)
            self._rollout = rollout
        if "trunk" not in self._buffer:  # after a resume
            self._buffer |= self._below(state.params, self._buffer)
        epoch, number = divmod(place, self.plan.batches)
        start = number * self.plan.batch_rows
        rows = self.plan.order(rollout, epoch)[start : start + self.plan.batch_rows]
        rows = rows[devices.own_rows(len(rows))]
        batch = {name: x[rows] for name, x in self._buffer.items()}
        batch["fresh"] = np.asarray(place == 0, np.float32)
        return devices.put(self.mesh, batch)

    def metrics(self) -> dict[str, float]:
        """Means over the rollouts collected since the last call; {} if there was none."""
        pending, self._pending = self._pending, []
        names = dict.fromkeys(name for metrics in pending for name in metrics)
        return {n: float(np.mean([m[n] for m in pending if n in m])) for n in names}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs: numbers, and `buffer`, a flat dict of numpy arrays."""
        # Trunk states are large, and computed again to the same bits.
        buffer = {name: x for name, x in self._buffer.items() if name != "trunk"}
        return {"rollout": self._rollout, "kl_coef": self.kl_coef, "buffer": buffer}

    def watch(self, tell: Callable[[int, int], None]) -> None:
        """From now on `tell` hears (completions sampled, in all) of every rollout."""
        self._tell = tell

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self._rollout = int(state["rollout"])
        self.kl_coef = None if state["kl_coef"] is None else float(state["kl_coef"])
        self._buffer = {name: np.asarray(x) for name, x in state["buffer"].items()}

    # -------------------------------------------------------------- one rollout

    def collect(self, rollout: int, trainable: PyTree) -> Arrays:
        """Samples, rewards, scores and credits one rollout; keeps its metrics and samples."""
        begun = time.perf_counter()
        done = self._sample(rollout, trainable)
        sampled = time.perf_counter()
        seen = self._seen(done)
        rewards = self.rewards(seen, trainer_state=self.trainer_state)
        rewarded = time.perf_counter()
        self.samples = summary.table(seen, rewards)
        whole = devices.gather_rows
        rewards = rewards._replace(table=whole(rewards.table), total=whole(rewards.total))
        batch = {name: whole(x) for name, x in self._arrays(done).items()}
        batch["rewards"] = rewards.total
        trunk = self._below(trainable, batch)
        batch |= self._scored(trainable, batch | trunk)
        credited, values = self._credit(batch)
        values = values | {
            "time/sample": sampled - begun,
            "time/reward": rewarded - sampled,
            "time/score": time.perf_counter() - rewarded,
        }
        self._log(credited, rewards, values)
        return credited | trunk

    def _sample(
        self, rollout: int, trainable: PyTree
    ) -> list[tuple[Mapping[str, Any], Completion]]:
        """This process's rows: prompt and completion, rows of a group side by side."""
        prompts = self._prompts(rollout)
        if len(prompts) * self.plan.group != self.plan.rows:
            raise DataError(
                f"Rollout {rollout} got {len(prompts)} prompts; {self.plan.rows} rows in groups of "
                f"{self.plan.group} need {self.plan.rows // self.plan.group}."
            )
        own = devices.own_rows(len(prompts))
        prompts = list(prompts)[own]
        done = self.engine.generate(
            self.actor.policy(trainable, self.frozen),
            [row["ids"] for row in prompts],
            seed=self.plan.seed,
            step=rollout,
            row_ids=range(self.plan.rows)[devices.own_rows(self.plan.rows)],
            group=self.plan.group,
            prompt_length=self.plan.prompt_length,
            progress=self._tell,
        )
        rows = [prompt for prompt in prompts for _ in range(self.plan.group)]
        return list(zip(rows, done, strict=True))

    def _seen(self, done: Sequence[tuple[Mapping[str, Any], Completion]]) -> Completions:
        """The rollout as reward functions see it."""
        prompts, completions = [], []
        for row, completion in done:
            prompt = row["prompt"]
            if prompt is None:
                prompt = self._decode(row["ids"])
            prompts.append(prompt)
            chat = isinstance(prompt, list)
            message = [{"role": "assistant", "content": completion.text}]
            completions.append(message if chat else completion.text)
        names = dict.fromkeys(name for row, _ in done for name in row["columns"])
        return Completions(
            prompts=prompts,
            completions=completions,
            prompt_ids=[np.asarray(row["ids"]).tolist() for row, _ in done],
            completion_ids=[completion.ids for _, completion in done],
            finished=[completion.finished for _, completion in done],
            columns={name: [row["columns"].get(name) for row, _ in done] for name in names},
        )

    def _decode(self, ids: Sequence[int]) -> str:
        tokenizer = self.engine.tokenizer
        return "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)

    def _arrays(self, done: Sequence[tuple[Mapping[str, Any], Completion]]) -> Arrays:
        """Rows of fixed width: prompt, completion at once after it, padding."""
        n = self.engine.sampling.max_new_tokens
        width = self.plan.prompt_length + n
        rows = len(done)
        batch: Arrays = {
            "ids": np.full((rows, width), self.engine.sampling.pad_token_id, np.int32),
            "lengths": np.zeros(rows, np.int32),
            "slots": np.zeros((rows, n), np.int32),
            "mask": np.zeros((rows, n), np.float32),
            "sampler_logps": np.zeros((rows, n), np.float32),
            "terminated": np.zeros(rows, np.float32),
        }
        for i, (row, completion) in enumerate(done):
            start, count = len(row["ids"]), len(completion.ids)
            batch["ids"][i, :start] = row["ids"]
            batch["ids"][i, start : start + count] = completion.ids
            batch["lengths"][i] = start + count
            batch["slots"][i, :count] = np.arange(start, start + count)
            batch["mask"][i, :count] = 1.0
            batch["sampler_logps"][i, :count] = completion.logps
            batch["terminated"][i] = completion.finished
        return batch

    def _below(self, trainable: PyTree, batch: Arrays) -> Arrays:
        """The policy's trunk states, one pass for all epochs; nothing where that does not pay."""
        net = self.actor.net
        size = batch["ids"].size * net.spec.hidden_size * 4
        frozen = net.spec.trunk_layers and not net.adapters
        if not frozen or self.actor.value_net is not None or size > TRUNK_BYTES:
            return {}
        params = self.actor.policy(trainable, self.frozen)
        parts = []
        for start in range(0, self.plan.rows, self.plan.micro_rows):
            chunk = slice(start, start + self.plan.micro_rows)
            own = devices.own_rows(self.plan.micro_rows)
            rows = {name: batch[name][chunk][own] for name in ("ids", "lengths")}
            placed = devices.put(self.mesh, rows)
            states = devices.to_host(below(net, params, placed, mesh=self.mesh))
            parts.append(devices.gather_rows(states))
        return {"trunk": np.concatenate(parts)}

    def _scored(self, trainable: PyTree, batch: Arrays) -> Arrays:
        """old_logps, ref_logps and values, computed in the shape of a training micro-batch."""
        # One update per rollout: the policy is its own old policy (see `Actor.loss`), so nothing
        # but a value estimate can make a forward pass worth its time.
        wants_old = self.plan.steps > 1 or self.actor.has_values
        if not wants_old and self.reference is None:
            return {}
        policy = Actor(self.reference_net, self.actor.temperature)
        frozen = self.frozen if self.actor.value_net is None else self.frozen["policy"]
        parts: list[Arrays] = []
        for start in range(0, self.plan.rows, self.plan.micro_rows):
            chunk = slice(start, start + self.plan.micro_rows)
            names = ("ids", "lengths", "slots", "trunk")
            rows = {name: batch[name][chunk] for name in names if name in batch}
            own = devices.own_rows(self.plan.micro_rows)
            placed = devices.put(self.mesh, {name: x[own] for name, x in rows.items()})
            part: dict[str, jax.Array | None] = {}
            if wants_old:
                out = score(self.actor, trainable, self.frozen, placed, mesh=self.mesh)
                part |= {"old_logps": out.logps, "values": out.values}
            if self.reference is not None:
                out = score(policy, self.reference, frozen, placed, mesh=self.mesh)
                part |= {"ref_logps": out.logps}
            parts.append({k: devices.to_host(x) for k, x in part.items() if x is not None})
        return {
            name: np.concatenate([devices.gather_rows(part[name]) for part in parts])
            for name in parts[0]
        }

    def _credit(self, batch: Arrays) -> tuple[Arrays, dict[str, float]]:
        """The algorithm's advantages and metrics, on the whole rollout at once."""
        coefficient = None if self.kl_coef is None else jnp.float32(self.kl_coef)
        credited, metrics = self._credited(dict(batch), coefficient)
        values = {name: float(metric.value()) for name, metric in metrics.items()}
        return {name: np.asarray(x) for name, x in credited.items()}, values

    def _log(self, batch: Arrays, rewards: Rewards, values: dict[str, float]) -> None:
        """Keeps the rollout's metrics and moves the adaptive KL coefficient."""
        speed = batch["mask"].sum() / max(values["time/sample"], 1e-9)
        values["rollout/tokens_per_second"] = float(speed)
        values |= summary.lengths(batch) | summary.rewards(self.rewards.names, rewards)
        values |= summary.agreement(batch)
        if self.kl_coef is not None:
            values["objective/kl_coef"] = self.kl_coef
        if self.kl_coef is not None and "objective/kl" in values:
            self.kl_coef = float(
                self.algorithm.next_kl_coef(
                    self.kl_coef, values["objective/kl"], episodes=float(self.plan.rows)
                )
            )
        self._pending.append(values)
