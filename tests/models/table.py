"""Writes the tables of docs/models.md: every parity case, and every combination of flags, measured.

    python -m tests.models.table [--kept FILE] [--only PRODUCT] [decoders] [encoders]
        [decoder-flags] [encoder-flags]

The tests bound the same numbers for all cases and some combinations; greedy tokens they count for
the cases marked " *" only, and this program for all. Combinations take some four hours on two
cores: what was measured of each is appended to FILE, and a program that goes on does not measure it
again. --only measures one product, and leaves the rows of the others as they stand.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

BOUNDS = {"logits": 1e-5, "loss": 2e-6, "gradients": 1e-5}
# One JSON line per combination: family, changes, what was measured.
KEPT = Path(os.devnull)
# The one product to measure; None: all.
ONLY: str | None = None
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
    from tests.models import flag_products as flags
    from tests.models.decoder_measure import NEW

    for family, own, found in combinations(flags.DECODERS, measured_decoder):
        tokens = f"{int(min(row['tokens'] for row in found))} of {NEW}"
        yield family, flags.say(own), *worst(found, tokens)


def encoder_flag_rows() -> Iterator[tuple[str, ...]]:
    from tests.models import flag_products as flags

    for family, own, found in combinations(flags.ENCODERS, measured_encoder):
        yield family, flags.say(own), *worst(found)


def measured_decoder(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    from tests.models.decoder_measure import greedy_agreement, measure

    tokens = {"tokens": greedy_agreement(family, changes)}
    return with_care(lambda *jit: measure(family, changes, *jit)) | tokens


def measured_encoder(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    from tests.models.encoder_cases import measure
    from tests.models.flag_products import prefix

    return with_care(lambda *jit: measure(prefix(family), changes, *jit)._asdict())


def with_care(measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Measured on a program that is compiled quickly, or, where its rounding passes a bound, as
    users compile it: without fusions more is rounded."""
    import jax

    found = measure()
    if all(found[key] <= bound for key, bound in BOUNDS.items()):
        return found
    return measure(jax.jit) | {"compiled": "as users do"}


def combinations(
    families: Mapping[str, Any], measured: Callable[[str, dict[str, Any]], dict[str, Any]]
) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """(family, its flags, what was measured of each combination), on all cores."""
    from tests.models.flag_products import products

    kept = {}
    if KEPT.exists():
        lines = map(json.loads, KEPT.read_text().splitlines())
        kept = {(family, changes): row for family, changes, row in lines}
    # Processes that begin anew now and then: compiled programs pile up in them.
    with (
        multiprocessing.get_context("spawn").Pool(maxtasksperchild=50) as pool,
        KEPT.open("a") as file,
    ):
        for family, own in families.items():
            if ONLY not in (None, family):
                continue
            every = [(family, changes) for changes in products(own)]
            new = [one for one in every if (family, str(one[1])) not in kept]
            for (_, changes), row in zip(
                new, pool.imap(functools.partial(starred, measured), new), strict=True
            ):
                kept[family, str(changes)] = row
                file.write(json.dumps((family, str(changes), row)) + "\n")
                file.flush()
                say((family, str(changes), str(row)))
            yield family, own, [kept[family, str(changes)] for _, changes in every]


def starred(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What was measured, in plain numbers."""
    return {name: getattr(x, "item", lambda x=x: x)() for name, x in function(*arguments).items()}


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


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def committed(name: str) -> list[tuple[str, ...]]:
    """The rows of a table as they stand."""
    begin, end = _marks(name)
    lines = DOCS.read_text(encoding="utf-8").split(begin)[1].split(end)[0].splitlines()
    return [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in lines[2:]]


def write(name: str) -> None:
    begin, end = _marks(name)
    rows = [say(row) for row in TABLES[name][1]()]
    if ONLY is not None:
        rows = [*({row[0]: row for row in (*committed(name), *rows)}.values())]
    text = DOCS.read_text(encoding="utf-8")
    made = markdown(TABLES[name][0], rows)
    DOCS.write_text(text.split(begin)[0] + begin + made + end + text.split(end)[1], "utf-8")


def say(row: tuple[str, ...]) -> tuple[str, ...]:
    sys.stderr.write("  ".join(row) + "\n")
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kept", type=Path, default=KEPT)
    parser.add_argument("--only", metavar="PRODUCT")
    parser.add_argument("names", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    asked = parser.parse_args()
    KEPT, ONLY = asked.kept, asked.only
    if ONLY is not None and asked.names not in (["decoder-flags"], ["encoder-flags"]):
        parser.error("--only wants decoder-flags or encoder-flags, where the product stands.")
    for name in asked.names or TABLES:
        write(name)
