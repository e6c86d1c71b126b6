"""Callbacks by transformers' event names, and the two objects that they are called with.

Nothing here imports transformers: anything with methods of these names works, a
`transformers.TrainerCallback` included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jrlhf.errors import ConfigError

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_evaluate",
    "on_save",
    "on_log",
)


@dataclasses.dataclass
class TrainerState:
    """Where the run stands, by transformers' names.

    Attributes:
        epoch: passes over the data, fractional; None where the notion means nothing.
        global_step: optimizer steps done.
        max_steps: optimizer steps of the whole run.
        num_input_tokens_seen: tokens in all batches up to the last log.
        log_history: every logged dict, each with its "step".
    """

    epoch: float | None = 0.0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 0
    eval_steps: int = 0
    save_steps: int = 0
    train_batch_size: int | None = None
    num_train_epochs: float = 0
    num_input_tokens_seen: int = 0
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False


@dataclasses.dataclass
class TrainerControl:
    """What the loop does next; a callback may change it, or return another one."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def new_step(self) -> None:
        """Forgets the requests of the last step; a stop stays."""
        self.should_save = self.should_evaluate = self.should_log = False


class Callback:
    """A base with every event empty; deriving from it is a convenience, not a need."""

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any):
        """At the end of the trainer's construction."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any):
        """Before the first step, after a checkpoint was restored."""

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any):
        """After the last step and its log."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any):
        """Before the first step of a pass over the data."""

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any):
        """After the last step of a pass over the data."""

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any):
        """Before a batch is fetched."""

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any
    ):
        """Before the compiled step is started; gradients exist only inside it."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any):
        """After the compiled step was started; the device may still be working."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any):
        """After `global_step` was raised; requests made here are met at once."""

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kw: Any,
    ):
        """After an evaluation."""

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any):
        """After a checkpoint was written."""

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kw: Any,
    ):
        """After a log entry was appended to `state.log_history`."""


def check_callbacks(callbacks: Any, owner: str) -> list[Any]:
    """The callbacks as a list.

    Raises:
        ConfigError: not a list, or one of them has no method of an event.
    """
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        raise ConfigError(f"{owner}: callbacks must be a list, got {type(callbacks).__name__}.")
    for callback in callbacks or ():
        if not any(callable(getattr(callback, event, None)) for event in EVENTS):
            raise ConfigError(
                f"{owner}: callback {callback!r} has none of the methods {', '.join(EVENTS)}."
            )
    return list(callbacks or ())


class CallbackList:
    """Calls callbacks in the order in which they were given.

    Args:
        callbacks: instances, or classes that are instantiated without arguments.
        context: keyword arguments of every call, such as `model` and `processing_class`.
    """

    def __init__(self, callbacks: Iterable[Any] = (), context: Mapping[str, Any] | None = None):
        self.callbacks = [c() if isinstance(c, type) else c for c in callbacks]
        self.context = dict(context or {})

    def call(
        self, event: str, args: Any, state: TrainerState, control: TrainerControl, **more: Any
    ) -> TrainerControl:
        """Fires one event; returns the control that the last callback left."""
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                control = method(args, state, control, **self.context, **more) or control
        return control
