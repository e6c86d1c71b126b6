"""`jrlhf report`: curves, table and samples of a run as one HTML page."""

from __future__ import annotations

from jrlhf.commands.arguments import parse
from jrlhf.config import config


@config
class ReportConfig:
    """What to draw.

    Attributes:
        run_dir: directory of the run: a directory per stage with its metrics.jsonl, and perhaps an
            evaluation.json of `jrlhf evaluate`.
        output: the page; None: report.html in `run_dir`.
    """

    run_dir: str
    output: str | None = None


def main(argv: list[str]) -> int:
    (cfg,) = parse(argv, ReportConfig, verb="report")
    from jrlhf import report

    page = report.build(cfg.run_dir, output=cfg.output)
    if page.table:
        print(page.table)
    print(f"Wrote {page.path}.")
    return 0
