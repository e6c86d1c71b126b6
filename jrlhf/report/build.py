"""Builds the report of a run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jrlhf.errors import DataError, MissingFileError
from jrlhf.report import page, schema, terminal
from jrlhf.report.curves import find_stages, read_stage
from jrlhf.report.summary import Summary, summarize

EVALUATION = "evaluation.json"
TIMES = "stages.json"  # {"sft": {"seconds": 412.0}, ...}, written by the quick start


class Report(NamedTuple):
    """What was built.

    Attributes:
        path: of the HTML page.
        table: for the terminal; "" without an evaluation.
        summary: the numbers of the table; None without an evaluation.
    """

    path: Path
    table: str
    summary: Summary | None


def build(
    run: str | Path,
    *,
    output: str | Path | None = None,
    stages: Mapping[str, str | Path] | None = None,
    evaluation: schema.Evaluation | None = None,
) -> Report:
    """Writes `report.html` and `report.json` (the table's numbers) of a run.

    Args:
        run: the run's directory. Stages are its subdirectories that hold a metrics.jsonl.
        output: of the page; default `run/report.html`. The JSON lies beside it.
        stages: name -> directory in the order to show, instead of looking for them.
        evaluation: the comparison; default is `run/evaluation.json` where it exists.

    Raises:
        MissingFileError: the run has neither metrics nor an evaluation.
        DataError: a file of the run is damaged.
    """
    run = Path(run)
    places = {name: Path(path) for name, path in (stages or find_stages(run)).items()}
    if evaluation is None and (run / EVALUATION).is_file():
        evaluation = schema.load(run / EVALUATION)
    if evaluation is None and not places:
        raise MissingFileError(f"{run} has neither {EVALUATION} nor a stage with metrics.jsonl.")
    summary = summarize(evaluation) if evaluation is not None else None
    html = page.render(
        title=run.resolve().name,
        evaluation=evaluation,
        summary=summary,
        stages=[read_stage(name, path) for name, path in places.items()],
        seconds=_seconds(run / TIMES),
    )
    target = Path(output) if output is not None else run / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html, encoding="utf-8")
    table = ""
    if evaluation is not None and summary is not None:
        table = terminal.table(evaluation, summary)
        numbers = json.dumps(summary.to_json(), indent=1)
        target.with_suffix(".json").write_text(numbers, encoding="utf-8")
    return Report(target, table, summary)


def _seconds(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        times = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(entry["seconds"]) for name, entry in times.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{path} does not hold the seconds of stages: {error!r}") from error
