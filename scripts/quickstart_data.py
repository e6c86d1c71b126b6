"""Splits IMDB into the disjoint files that the quick start trains and judges on.

No review serves two purposes: what the policy, the reward model and the judge read, and what the
policies are compared on, come from different rows of a list without duplicates.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PROMPT_WORDS = 6  # of a review's start; the policy writes on from there
# No text comes to its end, as completions of a fixed length do not: so length rewards nothing, and
# nothing is spent on padding. These words make more tokens than the default recipes' `max_length`.
TEXT_WORDS = 60
# A reward model reads its texts whole or not at all: few of these words have more tokens than that.
PAIR_WORDS = 30


class Review(NamedTuple):
    text: str  # its first TEXT_WORDS words
    label: int  # 1 positive, 0 negative
    whole: str = ""


class Sizes(NamedTuple):
    """Rows per file; each file takes as many positive as negative reviews."""

    sft: int = 2000
    pairs: int = 2200  # two rows each
    prompts: int = 1200
    heldout_prompts: int = 192
    heldout_reviews: int = 128
    judge: int = 12000

    def rows(self) -> int:
        return sum(self) + self.pairs


def read_reviews(path: Path) -> Iterator[Review]:
    """IMDB's rows of a CSV (columns text, label, source) or of the hub's parquet file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for row in pyarrow.parquet.read_table(path, columns=["text", "label"]).to_pylist():
            yield Review(row["text"], int(row["label"]))
        return
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if "imdb" in row.get("source", "imdb").lower():
                yield Review(row["text"], int(row["label"]))


def clean(text: str) -> str:
    """One line without IMDB's line-break tags."""
    return " ".join(text.replace("<br />", " ").split())


def first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def pools(reviews: Iterable[Review], *, seed: int) -> tuple[list[Review], list[Review]]:
    """Negative and positive reviews that are long enough, each once, shuffled by the seed."""
    seen: set[str] = set()
    sides: tuple[list[Review], list[Review]] = ([], [])
    for review in reviews:
        whole = clean(review.text)
        text = first_words(whole, TEXT_WORDS)
        if len(text.split()) < TEXT_WORDS:
            continue
        same = " ".join(text.lower().split())
        if same in seen:
            continue
        seen.add(same)
        sides[review.label].append(Review(text, review.label, whole))
    for label, side in enumerate(sides):
        side.sort()  # the split depends on the reviews and the seed, not on the file's order
        random.Random(f"{seed}/{label}").shuffle(side)
    return sides


def split(reviews: Iterable[Review], *, seed: int, sizes: Sizes) -> dict[str, list[dict]]:
    """The rows of every file, by file name without suffix.

    Raises:
        ValueError: there are fewer distinct reviews than the sizes ask for.
    """
    negative, positive = pools(reviews, seed=seed)
    # Prompts with equal words cost a few reviews more than their number.
    needed = sizes.rows() + sizes.heldout_prompts // 4
    if 2 * min(len(negative), len(positive)) < needed:
        raise ValueError(
            f"the split needs {needed:,} reviews, half of them positive; there are "
            f"{len(positive):,} positive and {len(negative):,} negative ones without duplicates."
        )
    sides = (iter(negative), iter(positive))
    rng = random.Random(seed)

    def take(count: int) -> list[Review]:
        rows = [next(sides[i % 2]) for i in range(count)]
        rng.shuffle(rows)
        return rows

    files: dict[str, list[dict]] = {}
    # The held-out prompts come first and keep other prompts from being the same few words.
    held: dict[str, Review] = {}
    while len(held) < sizes.heldout_prompts:
        for row in take(2):
            held.setdefault(first_words(row.text, PROMPT_WORDS), row)
    chosen = list(held.items())[: sizes.heldout_prompts]
    rng.shuffle(chosen)
    files["heldout_prompts"] = [{"prompt": prompt, "label": row.label} for prompt, row in chosen]
    prompts = [first_words(row.text, PROMPT_WORDS) for row in take(sizes.prompts)]
    files["prompts"] = [{"prompt": prompt} for prompt in prompts if prompt not in held]
    files["heldout_reviews"] = [{"text": row.text} for row in take(sizes.heldout_reviews)]
    files["sft"] = [{"text": row.text} for row in take(sizes.sft)]
    files["pairs"] = [
        {
            name: first_words(next(sides[label]).text, PAIR_WORDS)
            for name, label in (("chosen", 1), ("rejected", 0))
        }
        for _ in range(sizes.pairs)
    ]
    # The judge reads whole reviews: it only gets better by it.
    files["judge"] = [{"text": row.whole, "label": row.label} for row in take(sizes.judge)]
    return files


def write(
    source: Path, directory: Path, *, seed: int, sizes: Sizes | None = None
) -> dict[str, int]:
    """Writes one JSONL per file of the split and returns the rows of each."""
    directory.mkdir(parents=True, exist_ok=True)
    files = split(read_reviews(source), seed=seed, sizes=sizes or Sizes())
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial = directory / f".{name}.jsonl"
        partial.write_text(lines, encoding="utf-8")
        partial.replace(directory / f"{name}.jsonl")
    return {name: len(rows) for name, rows in files.items()}
