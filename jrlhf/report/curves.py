"""Reads the `metrics.jsonl` that every training stage writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jrlhf.errors import DataError, MissingFileError

FILE = "metrics.jsonl"
# Drawn first, in this order, where a stage logged them. `*` stands for any text.
LEADING = (
    "objective/scores",
    "objective/rlhf_reward",
    "objective/kl",
    "reward",
    "rewards/*",
    "loss",
    "eval_loss",
    "accuracy",
    "eval_accuracy",
    "margin",
    "mean_token_accuracy",
    "kl",
    "entropy",
    "policy/entropy_avg",
    "policy/clipfrac_avg",
    "policy/approxkl_avg",
    "val/ratio",
    "loss/value_avg",
    "completions/mean_length",
    "grad_norm",
    "learning_rate",
)
# Clocks and counters say nothing as a curve.
SKIPPED = ("step", "epoch", "episode", "eps", "num_tokens", "total_flos", "time", "timestamp")


class Curve(NamedTuple):
    """One metric over the steps of a stage; values are finite."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


class Stage(NamedTuple):
    """One training stage: its name, its directory and its curves, the telling ones first."""

    name: str
    directory: Path
    curves: tuple[Curve, ...]


def find_stages(run: Path) -> dict[str, Path]:
    """The subdirectories of a run that hold metrics, oldest first; or the run itself."""
    if (run / FILE).is_file():
        return {run.name: run}
    found = [path.parent for path in run.glob(f"*/{FILE}")]
    found.sort(key=lambda path: ((path / FILE).stat().st_mtime_ns, path.name))
    return {path.name: path for path in found}


def read_stage(name: str, directory: Path) -> Stage:
    """Reads one stage's metrics.

    A step that appears twice (a resumed run) counts with its last record. Values that are not
    numbers, or not finite, are left out. A last line that was cut off by a crash is ignored.

    Raises:
        MissingFileError: the directory has no metrics.jsonl.
        DataError: a line other than the last is not JSON, or a record has no step.
    """
    path = directory / FILE
    if not path.is_file():
        raise MissingFileError(f"stage {name} has no {FILE} in {directory}.")
    series: dict[str, dict[float, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(record, Mapping) or not _is_number(record.get("step")):
            raise DataError(f"{path}:{number} has no number under the key step.")
        for key, value in record.items():
            if _is_number(value) and not _skipped(key):
                series.setdefault(key, {})[float(record["step"])] = float(value)
    curves = [
        Curve(key, tuple(sorted(points)), tuple(points[step] for step in sorted(points)))
        for key, points in series.items()
    ]
    curves.sort(key=lambda curve: _rank(curve.name))
    return Stage(name, directory, tuple(curves))


def _skipped(key: str) -> bool:
    return key in SKIPPED or key.endswith(("_runtime", "_per_second"))


def _rank(name: str) -> tuple[int, str]:
    for place, pattern in enumerate(LEADING):
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return place, name
    return len(LEADING), name


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
