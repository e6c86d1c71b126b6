"""The host loop: batches in, steps, logs, evaluations and checkpoints out.

It is the same for offline and online trainers; what differs is the source of the batches.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from jrlhf.config import steps_of, to_dict
from jrlhf.errors import ConfigError
from jrlhf.sharding.distributed import is_main
from jrlhf.train.callbacks import CallbackList, TrainerControl, TrainerState
from jrlhf.train.checkpoint import Checkpoints
from jrlhf.train.interrupt import Interrupts, TrainingInterrupted
from jrlhf.train.metrics import Meter, jsonable
from jrlhf.train.progress import Progress
from jrlhf.train.state import TrainState, abstract
from jrlhf.train.step import Step, count_rows
from jrlhf.train.writers import Writer, make_writers
from jrlhf.types import Batch, PyTree

logger = logging.getLogger(__name__)
# Steps that may be under way on the device before the host waits: enough to hide the host, and few
# enough that a signal or a progress bar means something.
_IN_FLIGHT = 2


class Source(Protocol):
    """Where batches come from: a data loader, or a policy that writes its own."""

    def batch(self, step: int, state: TrainState) -> Batch:
        """The device batch of this step (from 0); the same for the same step, always."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Host numbers to log that came up since the last call."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Numpy arrays and JSON values from which `load_state_dict` goes on."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None: ...

    def watch(self, tell: Callable[[int, int], None]) -> None:
        """Takes what is to be told (completions done, in all) while a batch takes its time."""
        ...


class TrainOutput(NamedTuple):
    """What `train` returns, as in transformers."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclasses.dataclass
class Loop:
    """One training run.

    Attributes:
        args: the training config; `output_dir` must be set.
        step: the compiled step of `make_step`.
        source: gives the batches.
        total_steps: where the run ends.
        steps_per_epoch: for `epoch` and its events; None where there are no epochs.
        evaluate: of the state; returns metrics whose names start with "eval_".
        callbacks: with transformers' event names.
        about: what else decides the run, beside `args`, for the config in its checkpoints.
        context: keyword arguments for the callbacks: `model`, `processing_class`, …
        trainer_state: what callbacks and `trainer.state` see; its `log_history` grows.
        state: the newest training state, while running and after.
    """

    args: Any
    step: Step
    source: Source
    total_steps: int
    steps_per_epoch: int | None = None
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None
    callbacks: Sequence[Any] = ()
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trainer_state: TrainerState = dataclasses.field(default_factory=TrainerState)
    state: TrainState | None = None

    def run(
        self,
        state: TrainState,
        frozen: PyTree,
        *,
        resume_from_checkpoint: bool | str | Path | None = None,
    ) -> tuple[TrainState, TrainOutput]:
        """Trains to the end.

        Args:
            state: the first state, which is donated. When resuming, only its structure and
                shardings matter.
            frozen: parameters without gradients.
            resume_from_checkpoint: as `Checkpoints.find`; None takes the config's.

        Raises:
            TrainingInterrupted: SIGTERM or SIGINT came; a checkpoint of the last step is on disk.
            ConfigError: `output_dir` is None, there is no step to do, or nothing to evaluate with.
        """
        self._check()
        self.state = state
        self._prepare(resume_from_checkpoint)
        begun, first = time.perf_counter(), self.trainer_state.global_step
        try:
            with Interrupts() as self._interrupts:
                self._call("on_train_begin")
                while self._unfinished():
                    self._one_step(frozen)
                output = self._finish(begun, first)
            self._call("on_train_end")
        except TrainingInterrupted as stop:
            self._progress.say(str(stop))
            raise
        finally:
            self._progress.close()
            for writer in self._writers:
                writer.close()
        return self.state, output

    # -------------------------------------------------------------- before

    def _check(self) -> None:
        if self.args.output_dir is None:
            raise ConfigError("output_dir must be set before training.")
        if self.total_steps < 1:
            raise ConfigError(
                f"Nothing to do: {self.total_steps} steps (max_steps={self.args.max_steps}, "
                f"num_train_epochs={self.args.num_train_epochs})."
            )
        if self.args.eval_strategy != "no" and self.evaluate is None:
            raise ConfigError(f"eval_strategy={self.args.eval_strategy!r} needs an eval_dataset.")
        for name in ("eval_strategy", "save_strategy"):
            if getattr(self.args, name) == "epoch" and not self.steps_per_epoch:
                raise ConfigError(f"{name}='epoch': this run has no epochs; use 'steps'.")

    def _prepare(self, resume: bool | str | Path | None) -> None:
        args, now = self.args, self.trainer_state
        now.max_steps, now.num_train_epochs = self.total_steps, args.num_train_epochs
        counted = (args.logging_steps, args.save_steps, args.eval_steps or args.logging_steps)
        now.logging_steps, now.save_steps, now.eval_steps = (
            steps_of(value, self.total_steps) for value in counted
        )
        now.train_batch_size = args.per_device_train_batch_size
        now.is_local_process_zero = now.is_world_process_zero = is_main()
        now.global_step, now.epoch, now.log_history = 0, 0.0, []
        now.num_input_tokens_seen = 0
        self._control = TrainerControl()
        self._listeners = CallbackList(self.callbacks, self.context)
        self._meter = Meter()
        fields = {**to_dict(args), **self.about}
        config = {k: v for k, v in fields.items() if not callable(v)}
        self._checkpoints = Checkpoints(
            args.output_dir, total_limit=args.save_total_limit, config=config
        )
        self._saved: Path | None = None
        self._rows = 0
        resume = args.resume_from_checkpoint if resume is None else resume
        if resume:
            self._restore(self._checkpoints.find(resume))
        self._writers: list[Writer] = []
        if is_main():
            self._writers = make_writers(
                args.output_dir,
                report_to=args.report_to,
                logging_dir=args.logging_dir,
                run_name=args.run_name,
                config=self._checkpoints.config,
                resume_step=now.global_step,
            )
        self._progress = Progress(
            self.total_steps,
            initial=now.global_step,
            plain=bool(args.disable_tqdm),
            silent=not is_main(),
        )
        self.source.watch(self._progress.sampling)
        self._in_flight: collections.deque[jax.Array] = collections.deque()

    def _restore(self, path: Path) -> None:
        assert self.state is not None
        like = abstract(self.state)
        self._checkpoints.check(path, like)
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()  # donated; there may be no room for two states
        found = self._checkpoints.restore(path, like)
        if found.changed:
            logger.warning(
                "%s was written with other values of %s; the run goes on with the new ones.",
                path,
                ", ".join(found.changed),
            )
        self.state = found.state
        self.source.load_state_dict(found.source)
        self._meter.load_state_dict(found.trainer["meter"])
        self._saved = path
        for name, value in found.trainer["state"].items():
            setattr(self.trainer_state, name, value)

    # -------------------------------------------------------------- one step

    def _unfinished(self) -> bool:
        step = self.trainer_state.global_step
        return step < self.total_steps and not self._control.should_training_stop

    def _one_step(self, frozen: PyTree) -> None:
        assert self.state is not None
        now = self.trainer_state
        self._control.new_step()
        if self._epoch_boundary():
            self._call("on_epoch_begin")
        self._call("on_step_begin")
        batch = self.source.batch(now.global_step, self.state)
        self._call("on_pre_optimizer_step")
        self.state, metrics = self.step(self.state, frozen, batch)
        self._call("on_optimizer_step")
        self._rows += count_rows(batch)
        self._meter.add(metrics, self.source.metrics())
        self._wait_a_little(metrics["loss"])
        now.global_step += 1
        if self.steps_per_epoch:
            now.epoch = now.global_step / self.steps_per_epoch
        self._progress.step()
        self._plan_step()
        self._call("on_step_end")
        self._act()
        if self._epoch_boundary():
            self._control.should_evaluate |= self.args.eval_strategy == "epoch"
            self._control.should_save |= self.args.save_strategy == "epoch"
            self._call("on_epoch_end")
            self._act()
        if name := self._interrupts.received(now.global_step):
            raise TrainingInterrupted(name, step=now.global_step, checkpoint=str(self._save_once()))

    def _epoch_boundary(self) -> bool:
        step = self.trainer_state.global_step
        return self.steps_per_epoch is not None and step % self.steps_per_epoch == 0

    def _wait_a_little(self, result: jax.Array) -> None:
        self._in_flight.append(result)
        if len(self._in_flight) > _IN_FLIGHT:
            self._in_flight.popleft().block_until_ready()

    def _plan_step(self) -> None:
        """What the config asks for after this step, as transformers' default flow."""
        now, args, control = self.trainer_state, self.args, self._control
        last = now.global_step >= self.total_steps
        control.should_log |= now.global_step % now.logging_steps == 0
        if args.eval_strategy == "steps":
            control.should_evaluate |= last or now.global_step % now.eval_steps == 0
        if args.save_strategy == "steps":
            control.should_save |= last or now.global_step % now.save_steps == 0

    def _act(self) -> None:
        """Does what the control asks for, and clears it."""
        if self._control.should_epoch_stop:
            raise ConfigError(
                "A callback set should_epoch_stop, which is not supported: an epoch's order is "
                "fixed. Set should_training_stop."
            )
        if self._control.should_log:
            self._control.should_log = False
            self._log_interval()
        if not (self._control.should_evaluate or self._control.should_save):
            return
        # Waiting first keeps the device's work out of the time that is left out of the speed.
        jax.block_until_ready(self.state)
        begun = time.perf_counter()
        if self._control.should_evaluate and self.evaluate is not None:
            metrics = dict(self.evaluate(self.state))  # type: ignore[arg-type]
            self._log(metrics)
            self._call("on_evaluate", metrics=metrics)
        self._control.should_evaluate = False
        if self._control.should_save:
            self._control.should_save = False
            self._save_once()
        self._meter.pause(time.perf_counter() - begun)

    def _call(self, event: str, **more: Any) -> None:
        self._control = self._listeners.call(
            event, self.args, self.trainer_state, self._control, **more
        )

    # -------------------------------------------------------------- log and save

    def _log_interval(self) -> None:
        now = self.trainer_state
        steps, skipped = len(self._meter), self._skipped()
        values = self._meter.take()
        now.num_input_tokens_seen = self._meter.tokens
        self._log(values)
        if (new := int(values.get("skipped_steps", 0)) - skipped) > 0:
            logger.warning(
                "%d of the %d updates up to step %d were left out: the loss or gradient was not "
                "finite, or no token was trained on.",
                new,
                steps,
                now.global_step,
            )

    def _skipped(self) -> int:
        entries = (e["skipped_steps"] for e in reversed(self.trainer_state.log_history)
                   if "skipped_steps" in e)  # fmt: skip
        return int(next(entries, 0))

    def _log(self, values: Mapping[str, float]) -> None:
        now = self.trainer_state
        entry: dict[str, Any] = dict(values)
        if self.steps_per_epoch:
            entry["epoch"] = now.epoch
        now.log_history.append({**entry, "step": now.global_step})
        for writer in self._writers:
            writer.log(now.global_step, entry)
        self._progress.log(now.global_step, entry)
        self._call("on_log", logs=entry)

    def _save_once(self) -> Path:
        """A checkpoint of this step, unless there is one already."""
        now = self.trainer_state
        if self._saved == self._checkpoints.path(now.global_step):
            return self._saved
        assert self.state is not None
        kept = ("global_step", "epoch", "num_input_tokens_seen", "best_metric",
                "best_global_step", "best_model_checkpoint")  # fmt: skip
        trainer = {name: getattr(now, name) for name in kept}
        trainer["log_history"] = [jsonable(entry) for entry in now.log_history]
        meter = self._meter.state_dict()
        meter["rows"] = [jsonable(row) for row in meter["rows"]]
        self._saved = self._checkpoints.save(
            self.state,
            source=self.source.state_dict(),
            trainer={"state": trainer, "meter": meter},
        )
        self._call("on_save")
        return self._saved

    # -------------------------------------------------------------- after

    def _finish(self, begun: float, first: int) -> TrainOutput:
        jax.block_until_ready(self.state)
        if len(self._meter):
            self._meter.take()
        now = self.trainer_state
        seconds = time.perf_counter() - begun
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": self._rows / max(seconds, 1e-9),
            "train_steps_per_second": (now.global_step - first) / max(seconds, 1e-9),
            "train_loss": self._meter.mean_loss(),
        }
        self._log(metrics)
        if self.steps_per_epoch and now.epoch is not None:
            metrics["epoch"] = now.epoch
        return TrainOutput(now.global_step, metrics["train_loss"], metrics)
