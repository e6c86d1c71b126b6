"""`evaluation.json` keeps every number and refuses what it cannot mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from jrlhf import report
from jrlhf.errors import DataError, MissingFileError
from jrlhf.report.schema import Evaluation, from_json


def test_an_evaluation_survives_the_file(evaluation: Evaluation, tmp_path: Path) -> None:
    path = report.save(evaluation, tmp_path / "evaluation.json")
    assert report.load(path) == evaluation


def paths(tree: object, prefix: tuple = ()) -> list[tuple]:
    if isinstance(tree, dict):
        inner = [path for key in tree for path in paths(tree[key], (*prefix, key))]
        return [*([prefix] if prefix else []), *inner]
    if isinstance(tree, list) and tree:
        return [prefix, *paths(tree[0], (*prefix, 0))]
    return [prefix]


def test_every_missing_field_is_named(evaluation: Evaluation) -> None:
    whole = json.loads(json.dumps(evaluation.to_json()))
    checked = 0
    for path in paths(whole):
        if path[0] in ("settings", "judges") or path in (("texts",),) or path[-1] == 0:
            continue
        raw = json.loads(json.dumps(whole))
        target = raw
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]
        with pytest.raises(DataError):
            from_json(raw)
        checked += 1
    assert checked > 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(version=2), "version is 2"),
        (lambda raw: raw.update(extra=1), "unknown keys: extra"),
        (lambda raw: raw.update(samples=[]), "samples is empty"),
        (lambda raw: raw.update(samples={}), "not an array"),
        (lambda raw: raw["samples"][1]["after"].update(reward=math.nan), r"samples\[1\].after.rew"),
        (lambda raw: raw["samples"][0]["after"].update(reward=True), "not a finite number"),
        (lambda raw: raw["samples"][0]["before"].update(tokens=-1), "not a count"),
        (lambda raw: raw["samples"][0]["before"].update(tokens=1.5), "not a count"),
        (lambda raw: raw["samples"][0].update(prompt=3), "not a string"),
        (lambda raw: raw["samples"][0]["after"].update(judges={}), "same judges"),
    ],
)
def test_a_damaged_field_is_named(
    evaluation: Evaluation, change: Callable[[dict], None], message: str
) -> None:
    raw = json.loads(json.dumps(evaluation.to_json()))
    change(raw)
    with pytest.raises(DataError, match=message):
        from_json(raw)


def test_files_that_are_missing_or_no_json_have_their_errors(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        report.load(tmp_path / "evaluation.json")
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        report.load(tmp_path / "evaluation.json")


def test_an_arm_of_another_length_is_refused() -> None:
    arm = report.Arm("sft", ["a"], [1], [0.0], [0.0])
    short = report.Arm("ppo", ["a"], [1], [], [0.0])
    with pytest.raises(DataError, match="ppo: 0 rewards for 1 prompts"):
        report.assemble(title="t", prompts=["p"], before=arm, after=short)
    with pytest.raises(DataError, match="0 losses for 2"):
        report.assemble(title="t", prompts=["p"], before=arm, after=arm, text_tokens=[1, 2])


def test_judges_read_prompt_and_completion_joined() -> None:
    read = []

    def score(texts: list[str]) -> list[float]:
        read.append(list(texts))
        return [0.5] * len(texts)

    arm = report.Arm("sft", [" b"], [1], [0.0], [0.0])
    judge = report.Judge("j", "", score)
    report.assemble(title="t", prompts=["a"], before=arm, after=arm, judges=[judge])
    assert read == [["a b"], ["a b"]]
