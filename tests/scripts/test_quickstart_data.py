"""The split of the reviews: disjoint, balanced, and a function of the reviews and the seed."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pyarrow
import pytest
import quickstart_data as data
from pyarrow import parquet
from quickstart_data import Review, Sizes

SMALL = Sizes(sft=20, pairs=10, prompts=20, heldout_prompts=8, heldout_reviews=6, judge=30)


def reviews(count: int = 140, *, seed: int = 0) -> list[Review]:
    """Reviews of eight sentences; the first word of each is its own."""
    rng = random.Random(seed)

    def sentence(first: str) -> str:
        return " ".join([first, *(rng.choice("abcdefghij") for _ in range(7))]) + "."

    return [
        Review(" ".join([sentence(f"r{i}"), *(sentence("so") for _ in range(7))]), i % 2)
        for i in range(count)
    ]


def marks(rows: list[dict]) -> list[str]:
    """The first word of every text: it names the review that the text came from."""
    return [text.split()[0] for row in rows for text in row.values() if isinstance(text, str)]


def test_no_review_serves_two_purposes() -> None:
    files = data.split(reviews(), seed=0, sizes=SMALL)
    used = [mark for rows in files.values() for mark in marks(rows)]
    assert len(used) == len(set(used))


def test_every_file_has_its_size_and_both_labels_alike() -> None:
    files = data.split(reviews(), seed=0, sizes=SMALL)
    sizes = {**SMALL._asdict()}
    assert {name: len(rows) for name, rows in files.items()} == sizes
    label = {review.text.split()[0]: review.label for review in reviews()}
    for name, rows in files.items():
        found = [label[mark] for mark in marks(rows)]
        assert sum(found) * 2 == len(found), name
    for pair in files["pairs"]:
        assert (label[pair["chosen"].split()[0]], label[pair["rejected"].split()[0]]) == (1, 0)


def test_the_split_depends_on_the_reviews_and_the_seed_alone() -> None:
    rows = reviews()
    other = rows[:]
    random.Random(5).shuffle(other)
    assert data.split(rows, seed=3, sizes=SMALL) == data.split(other, seed=3, sizes=SMALL)
    assert data.split(rows, seed=3, sizes=SMALL) != data.split(rows, seed=4, sizes=SMALL)


def test_duplicates_and_stubs_are_left_out() -> None:
    rows = reviews()
    doubled = [*rows, *(Review(f"  {row.text.upper()} <br />", row.label) for row in rows)]
    stubs = [Review("too short.", i % 2) for i in range(50)]
    negative, positive = data.pools([*doubled, *stubs], seed=0)
    assert len(negative) + len(positive) == len(rows)


def test_held_out_prompts_are_no_training_prompts() -> None:
    same = "one two three four five six seven eight nine ten."
    prompt = data.first_words(same, data.PROMPT_WORDS)
    rows = [Review(f"{same} {row.text}", row.label) for row in reviews(140)]
    files = data.split([*reviews(140), *rows], seed=1, sizes=SMALL)
    assert any(row["text"].startswith(same) for row in files["sft"])  # the trap is set
    held = [row["prompt"] for row in files["heldout_prompts"]]
    assert len(set(held)) == len(held)
    assert prompt in held
    assert not set(held) & {row["prompt"] for row in files["prompts"]}


def test_training_texts_are_cut_at_one_length_and_the_judge_reads_on() -> None:
    rows = [Review(f"{r.text}<br /><br />the  end", r.label) for r in reviews()]
    files = data.split(rows, seed=0, sizes=SMALL)
    assert all(len(row["prompt"].split()) == data.PROMPT_WORDS for row in files["prompts"])
    texts = [row["text"] for row in files["sft"]]
    assert {len(text.split()) for text in texts} == {data.TEXT_WORDS}
    sides = [row[side] for row in files["pairs"] for side in ("chosen", "rejected")]
    assert {len(text.split()) for text in sides} == {data.PAIR_WORDS}
    assert all(row["text"].endswith(". the end") for row in files["judge"])


def test_too_few_reviews_are_an_error() -> None:
    with pytest.raises(ValueError, match="the split needs"):
        data.split(reviews(100), seed=0, sizes=SMALL)
    # Balanced by label: many of one kind do not help.
    with pytest.raises(ValueError, match="0 positive"):
        data.split([Review(r.text, 0) for r in reviews(400)], seed=0, sizes=SMALL)


def test_csv_and_parquet_give_the_same_reviews(tmp_path: Path) -> None:
    rows = reviews(10)
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        writer.writerows([row.text, row.label, "imdb"] for row in rows)
        writer.writerow(["a rotten tomato", 0, "rt"])
    assert list(data.read_reviews(path)) == rows
    table = pyarrow.Table.from_pylist([{"text": row.text, "label": row.label} for row in rows])
    parquet.write_table(table, tmp_path / "reviews.parquet")
    assert list(data.read_reviews(tmp_path / "reviews.parquet")) == rows
    counts = data.write(
        path, tmp_path / "data", seed=0, sizes=Sizes(2, 1, 2, 2, 0, 0)
    )  # fmt: skip
    assert sum(counts.values()) == 7
    lines = (tmp_path / "data" / "pairs.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {"chosen", "rejected"}
