"""SIGTERM and SIGINT while training: the step is finished, a checkpoint written, the run left."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax


class TrainingInterrupted(SystemExit):
    """The run was told to stop and has saved what it needs to go on.

    A SystemExit, so that a script or command ends here, without a traceback and with the code that
    a shell expects (128 + the signal's number), instead of exporting a half-trained model.

    Attributes:
        step: steps done.
        checkpoint: the directory to resume from.
    """

    def __init__(self, name: str, *, step: int, checkpoint: str) -> None:
        super().__init__(128 + int(signal.Signals[name]))
        self.signal, self.step, self.checkpoint = name, step, checkpoint

    def __str__(self) -> str:
        return (
            f"Interrupted by {self.signal} after step {self.step}, saved in {self.checkpoint}; "
            "resume_from_checkpoint goes on from there."
        )


class Interrupts:
    """Notes a signal until the loop asks; a second one is obeyed at once.

    Signals are taken only in the main thread (Python has no other way). With several processes they
    are left to jax, which makes all of them stop at the same step when one gets SIGTERM.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if main and jax.process_count() == 1:
            wanted = (signal.SIGTERM, signal.SIGINT)
            self._previous = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise KeyboardInterrupt(f"second signal {signal.Signals(number).name}")
        self._received = signal.Signals(number).name

    def received(self, step: int) -> str | None:
        """The signal to obey after this step, the same on every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            reached = multihost_utils.reached_preemption_sync_point(step)
            return "SIGTERM" if reached else None
        return self._received
