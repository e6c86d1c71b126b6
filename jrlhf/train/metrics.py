"""Metrics of many steps as one log entry, collected without waiting for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Numbers = Mapping[str, float]
_COMPILED = "/jax/core/compile/backend_compile_duration"
_count = 0
_listening = False


def compiles() -> int:
    """Programs that XLA has compiled (or fetched from its cache) in this process so far.

    Counting starts at the first call. One step that compiles again is the usual sign of a shape or
    a sharding that changes.
    """
    global _listening
    if not _listening:
        jax.monitoring.register_event_duration_secs_listener(_on_event)
        _listening = True
    return _count


def _on_event(event: str, duration_secs: float, **_: Any) -> None:
    global _count
    _count += event == _COMPILED


class Meter:
    """Collects the metrics of the steps between two logs without waiting for the device.

    A log entry holds means over the interval, as transformers logs the loss; of `grad_norm`,
    `learning_rate` and `skipped_steps` the last value; of `num_tokens` the total so far.
    Values that are not finite are left out of a mean: a skipped step must not hide the others.
    """

    LAST = ("grad_norm", "learning_rate", "skipped_steps")

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self.tokens, self.steps, self.loss_sum = 0, 0, 0.0
        self._compiles = compiles()
        self._since = time.perf_counter()

    def add(self, device: Mapping[str, jax.Array], host: Numbers) -> None:
        """Takes one step's metrics; the device's are read later."""
        self._rows.append({**host, **device})

    def pause(self, seconds: float) -> None:
        """Leaves time out of the speed: evaluation, checkpoints."""
        self._since += seconds

    def take(self) -> dict[str, float]:
        """Waits for the device, returns the interval's entry and starts the next interval."""
        rows = self._fetch()
        seconds = time.perf_counter() - self._since
        names = {name: None for row in rows for name in row}
        out = {name: self._reduce(name, rows) for name in names if name != "num_tokens"}
        tokens = sum(row.get("num_tokens", 0.0) for row in rows)
        self.tokens += int(tokens)
        if "num_tokens" in names:
            out["num_tokens"] = self.tokens
            out["tokens_per_second"] = tokens / max(seconds, 1e-9)
        losses = [row["loss"] for row in rows if math.isfinite(row.get("loss", math.nan))]
        self.loss_sum, self.steps = self.loss_sum + sum(losses), self.steps + len(losses)
        now = compiles()
        out |= {"step_time": seconds / max(len(rows), 1), "compiles": now - self._compiles}
        self._rows, self._compiles, self._since = [], now, time.perf_counter()
        return out

    def __len__(self) -> int:
        return len(self._rows)

    def mean_loss(self) -> float:
        """Mean loss of all logged steps of the run; 0 before the first."""
        return self.loss_sum / self.steps if self.steps else 0.0

    def state_dict(self) -> dict[str, Any]:
        """JSON from which a resumed run logs what an uninterrupted one would."""
        return {
            "rows": self._fetch(),
            "tokens": self.tokens,
            "steps": self.steps,
            "loss_sum": self.loss_sum,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._rows = [
            {k: math.nan if v is None else v for k, v in r.items()} for r in saved["rows"]
        ]
        self.tokens, self.steps = saved["tokens"], saved["steps"]
        self.loss_sum = saved["loss_sum"]

    def _fetch(self) -> list[dict[str, float]]:
        self._rows = [
            {name: float(value) for name, value in row.items()}
            for row in jax.device_get(self._rows)
        ]
        return self._rows

    def _reduce(self, name: str, rows: list[dict[str, float]]) -> float:
        values = [row[name] for row in rows if name in row]
        if name in self.LAST:
            return values[-1]
        finite = [value for value in values if math.isfinite(value)]
        return float(np.mean(finite)) if finite else math.nan


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values: numpy and jax scalars as numbers, what is not finite as None."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, (np.generic, np.ndarray, jax.Array)):
            value = value.item()
        out[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return out
