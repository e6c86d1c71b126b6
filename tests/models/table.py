"""Writes the tables of docs/models.md: every parity case, and every combination of flags, measured.

    python -m tests.models.table [decoders] [encoders] [decoder-flags] [encoder-flags]

The tests bound the same numbers for all cases and some combinations; greedy tokens they count for
the cases marked " *" only, and this program for all. Combinations take an hour on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def decoder_rows() -> Iterator[tuple[str, ...]]:
    from tests.models.decoder_cases import CASES, NAMED
    from tests.models.decoder_measure import NEW, greedy_agreement, measure

    for family, flags in NAMED:
        changes = CASES[family][flags]
        found = measure(family, changes)
        numbers = [f"{found[key]:.0e}" for key in ("logits", "loss", "gradients")]
        tokens = f"{greedy_agreement(family, changes)} of {NEW}"
        yield family, plain(flags), *numbers, tokens, "bitwise" if found["reload"] else "DIFFERS"


def encoder_rows() -> Iterator[tuple[str, ...]]:
    from tests.models import encoder_cases as cases

    for name, case in cases.CASES.items():
        row = cases.measure(*case)
        numbers = [f"{x:.0e}" for x in (row.logits, row.loss, row.gradients)]
        family, _, flags = name.partition(": ")
        yield family, flags, *numbers, "bitwise" if row.reload else "DIFFERS"


def decoder_flag_rows() -> Iterator[tuple[str, ...]]:
    from tests.models import decoder_measure as cases
    from tests.models import flag_products as flags

    for family, own in flags.DECODERS.items():
        found = []
        for changes in flags.products(own):
            found.append(cases.measure(family, changes))
            found[-1]["tokens"] = cases.greedy_agreement(family, changes)
            say((family, str(changes), str(found[-1])))
        tokens = f"{min(row['tokens'] for row in found)} of {cases.NEW}"
        yield family, flags.say(own), *worst(found, tokens)


def encoder_flag_rows() -> Iterator[tuple[str, ...]]:
    from tests.models import encoder_cases as cases
    from tests.models import flag_products as flags

    for family, own in flags.ENCODERS.items():
        found = []
        for changes in flags.products(own):
            found.append(cases.measure(family, changes)._asdict())
            say((family, str(changes), str(found[-1])))
        yield family, flags.say(own), *worst(found)


def worst(found: list[dict[str, Any]], *more: str) -> tuple[str, ...]:
    """How many were measured, the largest of each difference, and whether all came back."""
    numbers = [f"{max(row[key] for row in found):.0e}" for key in ("logits", "loss", "gradients")]
    export = "bitwise" if all(row["reload"] for row in found) else "DIFFERS"
    return str(len(found)), *numbers, *more, export


_NUMBERS = ("logits", "loss", "gradients")
TABLES: dict[str, tuple[tuple[str, ...], Callable[[], Iterator[tuple[str, ...]]]]] = {
    "decoders": (
        ("model_type", "flags", "logits", "loss", "gradients", "greedy tokens", "export"),
        decoder_rows,
    ),
    "encoders": (("family", "flags", "scores", "loss", "gradients", "export"), encoder_rows),
    "decoder-flags": (
        ("model_type", "flags", "combinations", *_NUMBERS, "greedy tokens", "export"),
        decoder_flag_rows,
    ),
    "encoder-flags": (
        ("family", "flags", "combinations", "scores", *_NUMBERS[1:], "export"),
        encoder_flag_rows,
    ),
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
