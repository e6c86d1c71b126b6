"""Writes the tables of docs/models.md: every parity case, measured.

    python -m tests.models.table [decoders] [encoders]

The tests bound the same numbers; greedy tokens they count for the cases marked " *" only, and this
program for all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def decoder_rows() -> Iterator[tuple[str, ...]]:
    from tests.models import test_families_parity as cases

    for family, flags in cases.NAMED:
        found = cases.measure(family, flags)
        numbers = [f"{found[key]:.0e}" for key in ("logits", "loss", "gradients")]
        tokens = f"{cases.greedy_agreement(family, flags)} of {cases.NEW}"
        yield family, plain(flags), *numbers, tokens, "bitwise" if found["reload"] else "DIFFERS"


def encoder_rows() -> Iterator[tuple[str, ...]]:
    from tests.models import encoder_cases as cases

    for name in cases.CASES:
        row = cases.measure(name)
        numbers = [f"{x:.0e}" for x in (row.logits, row.loss, row.gradients)]
        yield row.family, row.flags, *numbers, "bitwise" if row.reloads else "DIFFERS"


TABLES: dict[str, tuple[tuple[str, ...], Callable[[], Iterator[tuple[str, ...]]]]] = {
    "decoders": (
        ("model_type", "flags", "logits", "loss", "gradients", "greedy tokens", "export"),
        decoder_rows,
    ),
    "encoders": (("family", "flags", "scores", "loss", "gradients", "export"), encoder_rows),
}


def plain(flags: str) -> str:
    """The name of a set of flags, without the mark of those whose tokens the tests count."""
    return flags.removesuffix(" *")


def markdown(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def write(name: str) -> None:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    made = markdown(TABLES[name][0], (say(row) for row in TABLES[name][1]()))
    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(text.split(begin)[0] + begin + made + end + text.split(end)[1], "utf-8")


def say(row: tuple[str, ...]) -> tuple[str, ...]:
    sys.stderr.write("  ".join(row) + "\n")
    return row


if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        write(name)
