"""The table of a comparison as plain text."""

from __future__ import annotations

import re
import textwrap

from jrlhf.report.schema import Evaluation
from jrlhf.report.summary import Row, Summary, fixed, format_p, share, signed

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def plain(text: str) -> str:
    """The text without what a terminal obeys, HTML forbids or UTF-8 cannot say."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def table(evaluation: Evaluation, summary: Summary, *, width: int = 100) -> str:
    """Renders the rows of `summary` as an aligned table, its verdict below.

    Args:
        evaluation: names the two policies.
        summary: of the same evaluation.
        width: the verdict is wrapped to this width; the table needs about 90 columns.
    """
    head = (
        f"{summary.prompts} held-out prompts",
        evaluation.before,
        evaluation.after,
        "change",
        "95 % interval",
        "p",
    )
    body = [(row.label, *cells(row)) for row in summary.rows]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [evaluation.title, rule, _line(head, widths), rule]
    lines += [_line(line, widths) for line in body]
    lines += [rule, *textwrap.wrap(summary.verdict, width)]
    return plain("\n".join(lines))


def cells(row: Row) -> tuple[str, str, str, str, str]:
    """Before, after, change, interval and p of a row, as text."""
    digits = row.digits
    change = share(row) if row.key == "distinct_2" else signed(row.change, digits)
    interval = "–"
    if row.low is not None and row.high is not None:
        interval = f"{signed(row.low, digits)} … {signed(row.high, digits)}"
    p = format_p(row.p).removeprefix("= ")
    return fixed(row.before, digits), fixed(row.after, digits), change, interval, p


def _line(texts: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = texts
    padded = [first.ljust(widths[0]), *(text.rjust(w) for text, w in zip(rest, widths[1:]))]
    return "  ".join(padded).rstrip()
