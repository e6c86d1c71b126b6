"""The report of a run: a self-contained HTML page and a terminal table.

    from jrlhf import report

    evaluation = report.assemble(title=..., prompts=..., before=report.Arm(...),
                                 after=report.Arm(...), judges=report.sentiment_judges(path))
    report.save(evaluation, run / "evaluation.json")
    page = report.build(run)          # curves of run/*/metrics.jsonl + run/evaluation.json
    print(page.table)

This room draws and counts; it runs no model. `commands/report.py` samples and scores.
"""

from __future__ import annotations

from jrlhf.report.assemble import Arm, assemble
from jrlhf.report.build import Report, build
from jrlhf.report.judge import Judge, NaiveBayes, naive_bayes, sentiment_judges, vader
from jrlhf.report.schema import Completion, Evaluation, Sample, TextLoss, load, save
from jrlhf.report.statistics import Paired, compare, distinct, sign_flip_p
from jrlhf.report.summary import Row, Summary, summarize

__all__ = [
    "Arm",
    "Completion",
    "Evaluation",
    "Judge",
    "NaiveBayes",
    "Paired",
    "Report",
    "Row",
    "Sample",
    "Summary",
    "TextLoss",
    "assemble",
    "build",
    "compare",
    "distinct",
    "load",
    "naive_bayes",
    "save",
    "sentiment_judges",
    "sign_flip_p",
    "summarize",
    "vader",
]
