"""Rows come from any place people keep them; what cannot be read is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from jrlhf.data.sources import load_rows, require_columns
from jrlhf.errors import (
    ConfigError,
    DataError,
    EmptyDatasetError,
    MissingColumnError,
    MissingFileError,
)

ROWS = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def files(folder: Path) -> dict[str, Path]:
    made = {
        "jsonl": write(folder / "a.jsonl", jsonl(ROWS)),
        "json": write(folder / "b.json", json.dumps(ROWS)),
        "csv": write(folder / "c.csv", "text,n\na,1\nb,2\n"),
        "tsv": write(folder / "d.tsv", "text\tn\na\t1\nb\t2\n"),
        "parquet": folder / "e.parquet",
        "gz": folder / "f.jsonl.gz",
        "saved": folder / "g",
        "splits": folder / "h",
        "folder": folder / "i",
    }
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(str(made["parquet"]))
    made["gz"].write_bytes(gzip.compress(jsonl(ROWS).encode()))
    dataset.save_to_disk(str(made["saved"]))
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(str(made["splits"]))
    write(made["folder"] / "train.jsonl", jsonl(ROWS))
    write(made["folder"] / "test.jsonl", jsonl(ROWS[:1]))
    return made


def test_every_local_format_gives_the_same_rows(tmp_path: Path) -> None:
    for path in files(tmp_path).values():
        assert list(load_rows(str(path))) == ROWS, path
        assert list(load_rows(path, streaming=True)) == ROWS, path


def test_objects_give_the_same_rows() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    sources: list[Any] = [
        dataset, dataset.to_iterable_dataset(), ROWS, {"text": ["a", "b"], "n": [1, 2]},
        datasets.DatasetDict(train=dataset), {"train": dataset, "test": dataset},
    ]  # fmt: skip
    for source in sources:
        assert list(load_rows(source)) == ROWS
        assert list(load_rows(source, streaming=True)) == ROWS


def test_splits_and_slices_are_chosen_by_name(tmp_path: Path) -> None:
    made = files(tmp_path)
    assert list(load_rows(made["folder"], split="test")) == ROWS[:1]
    assert list(load_rows(made["jsonl"], split="train[:1]")) == ROWS[:1]
    for source in (made["splits"], made["folder"]):
        with pytest.raises(DataError, match="tset"):
            load_rows(source, split="tset")


def test_a_missing_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", jsonl(ROWS))
    with pytest.raises(MissingFileError, match=r"trian\.jsonl.*Did you mean.*train\.jsonl"):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(MissingFileError, match="does not exist either"):
        load_rows(str(tmp_path / "no" / "train.jsonl"))
    with pytest.raises(MissingFileError, match="nobody/nothing"):
        load_rows("nobody/nothing")
    with pytest.raises(MissingFileError, match="no dataset file"):
        load_rows(write(tmp_path / "docs" / "readme.md", "x").parent)


def test_empty_sources_are_errors(tmp_path: Path) -> None:
    empties: list[Any] = [
        [],
        {},
        {"text": []},
        write(tmp_path / "a.jsonl", ""),
        write(tmp_path / "b.csv", "text\n"),
    ]
    for source in empties:
        with pytest.raises(EmptyDatasetError):
            load_rows(source)


def test_unreadable_sources_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl"):
        load_rows(write(tmp_path / "a.jsonl", '{"text": "a"}\n{broken\n'))
    with pytest.raises(DataError, match="train dataset cannot be read"):
        load_rows(write(tmp_path / "c.jsonl", "{broken\n"), streaming=True)
    with pytest.raises(DataError, match="unknown dataset file type"):
        load_rows(write(tmp_path / "a.xls", "x"))
    with pytest.raises(DataError, match="Row 1"):
        load_rows([{"text": "a"}, "b"])
    with pytest.raises(DataError, match="schema"):
        load_rows([{"text": "a"}, {"text": ["b"]}])
    with pytest.raises(DataError, match="int"):
        load_rows(3)
    with pytest.raises(ConfigError):
        load_rows(None)


def test_missing_columns_are_named_with_the_likely_mistake() -> None:
    require_columns({"a": 1, "b": 2}, [("x",), ("a", "b")], name="train")
    with pytest.raises(MissingColumnError, match=r'\[.promt.\].*prompt \+ completion.*"promt"'):
        require_columns({"promt": ""}, [("prompt", "completion"), ("text",)], name="train")
