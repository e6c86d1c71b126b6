"""Where log entries go: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jrlhf.errors import ConfigError, suggest
from jrlhf.train.metrics import Numbers, jsonable


class Writer(Protocol):
    """Where log entries go."""

    def log(self, step: int, values: Numbers) -> None: ...
    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object per logged step, with the key "step"; every line is on disk at once.

    Entries of the same step (training and evaluation) are merged into one line. What is not finite
    is written as null.

    Args:
        path: the file; made with its directories.
        resume_step: lines of later steps are dropped, as is a half-written last line.
    """

    def __init__(self, path: str | Path, *, resume_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _read_lines(self.path) if line["step"] <= resume_step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for line in kept[:-1]:
                file.write(_dump(line))
            self._start = file.tell()
            self._last = kept[-1] if kept else {"step": -1}
            file.write(_dump(self._last) if kept else "")
        temporary.replace(self.path)
        self._file = self.path.open("r+", encoding="utf-8")
        self._file.seek(0, os.SEEK_END)

    def log(self, step: int, values: Numbers) -> None:
        if step == self._last["step"]:
            self._file.seek(self._start)
            self._last |= jsonable(values)
        else:
            self._start = self._file.tell()
            self._last = {"step": step, **jsonable(values)}
        self._file.write(_dump(self._last))
        self._file.truncate()
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _dump(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class TensorBoardWriter:
    """Scalars under train/ and eval/, through TensorBoard's own event writer (no torch, no TF)."""

    def __init__(self, directory: str | Path, *, resume_step: int = 0) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory))
        if resume_step:
            # TensorBoard drops what earlier files hold from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(
                self._event(wall_time=time.time(), step=resume_step + 1, session_log=start)
            )

    def log(self, step: int, values: Numbers) -> None:
        scalars = [
            self._summary.Value(tag=_tag(name), simple_value=float(value))
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        summary = self._summary(value=scalars)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases; the project is WANDB_PROJECT or "jrlhf"."""

    def __init__(self, directory: str | Path, *, name: str | None, config: Mapping[str, Any]):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "jrlhf")
        self._run = wandb.init(project=project, name=name, dir=str(directory), config=dict(config))

    def log(self, step: int, values: Numbers) -> None:
        self._run.log({_tag(k): v for k, v in values.items()} | {"train/global_step": step})

    def close(self) -> None:
        self._run.finish()


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


REPORTERS = ("tensorboard", "wandb")


def reporters(report_to: str | list[str] | None) -> list[str]:
    """The writers that `report_to` asks for besides metrics.jsonl, checked to be installed.

    Raises:
        ConfigError: an unknown name, or a package that is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if names == ["all"]:
        return [name for name in REPORTERS if importlib.util.find_spec(name)]
    names = [name for name in names if name != "none"]
    for name in names:
        if name not in REPORTERS:
            raise ConfigError(
                f"report_to={name!r} is not known; known: {', '.join(REPORTERS)}, all, none."
                + suggest(name, [*REPORTERS, "all", "none"])
            )
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"report_to={name!r} needs a package that is not installed: "
                f'pip install "jrlhf[{name}]"'
            )
    return names


def make_writers(
    output_dir: str | Path,
    *,
    report_to: str | list[str] | None = None,
    logging_dir: str | Path | None = None,
    run_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    resume_step: int = 0,
) -> list[Writer]:
    """metrics.jsonl in `output_dir`, and what `report_to` names."""
    names = reporters(report_to)
    out = Path(output_dir)
    writers: list[Writer] = [JsonlWriter(out / "metrics.jsonl", resume_step=resume_step)]
    if "tensorboard" in names:
        writers.append(TensorBoardWriter(logging_dir or out / "runs", resume_step=resume_step))
    if "wandb" in names:
        writers.append(WandbWriter(out, name=run_name, config=config or {}))
    return writers
