"""The fields of `jrlhf evaluate`: each run changes fields whose effects can be told apart."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf import AutoModelForCausalLM
from jrlhf.commands import evaluate
from jrlhf.commands.evaluate import EvaluateConfig
from jrlhf.errors import ConfigError, MissingFileError
from jrlhf.sharding.mesh import make_mesh
from tests.fields.bench import CONFIG, PROMPTS, TEXTS, Bench, declared, words
from tests.fields.test_command_fields import write

GOOD, BAD = (words(*range(i, i + 6)) for i in (0, 30))
JUDGE = [{"text": f"{text} {words(n)}", "label": label}
         for n in range(8) for text, label in ((GOOD, 1), (BAD, 0))]  # fmt: skip
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(bench: Bench) -> Any:
    """A function of fields that gives what the verb wrote; equal fields are run once."""
    mesh = make_mesh("data=1", devices=jax.devices()[:1])
    other = AutoModelForCausalLM.from_config(CONFIG, mesh=mesh, tokenizer=bench.tokenizer, seed=7)
    path = f"{bench.path}-other"
    other.save_pretrained(path, tokenizer=bench.tokenizer)

    @functools.cache
    def made(**fields: Any) -> dict[str, Any]:
        files = {
            "prompts": write(f"{path}/prompts.jsonl", PROMPTS),
            "texts": write(f"{path}/texts.jsonl", TEXTS),
            "judge_rows": write(f"{path}/judge.jsonl", JUDGE),
        }
        models = {"before": bench.path, "after": path, "reward_model_path": bench.path}
        plain = {"max_new_tokens": 6, "output": f"{path}/out.json"}
        given = {**models, **files, **plain, **fields}
        argv = [f"--{name}={value}" for name, value in given.items() if value is not None]
        assert evaluate.main(argv) == 0
        return json.loads(Path(given["output"]).read_text())

    made.other = path  # type: ignore[attr-defined]
    return made


def column(found: dict[str, Any], *keys: str) -> list[Any]:
    rows = found["samples"]
    for key in keys:
        rows = [row[key] for row in rows]
    return rows


def completions(found: dict[str, Any], arm: str = "after") -> list[str]:
    return column(found, arm, "text")


def test_policies_change_places(run: Any, bench: Bench) -> None:
    """before, after"""
    base, turned = run(), run(before=run.other, after=bench.path)
    assert completions(turned, "before") == completions(base, "after")
    assert completions(turned, "after") == completions(base, "before")
    assert completions(base, "after") != completions(base, "before")


def test_seed_title_and_output(run: Any, tmp_path: Path) -> None:
    found = run(seed=1, title="Another", output=str(tmp_path / "there.json"))
    assert found["title"] == "Another"
    assert completions(found) != completions(run())
    assert (found["settings"]["seed"], run()["settings"]["seed"]) == (1, 0)


def test_lengths_and_prompts(run: Any, tmp_path: Path) -> None:
    """max_new_tokens, max_length, prompts"""
    few = write(str(tmp_path / "few.jsonl"), PROMPTS[:3])
    found = run(max_new_tokens=3, max_length=5, prompts=few)
    assert column(found, "prompt") == [row["prompt"] for row in PROMPTS[:3]]
    assert max(column(found, "after", "tokens")) == 3 < max(column(run(), "after", "tokens"))
    assert max(text["tokens"] for text in found["texts"]) == 4
    assert max(text["tokens"] for text in run()["texts"]) > 4


def test_what_judges(run: Any, tmp_path: Path) -> None:
    """reward_model_path, judge_rows, texts"""
    turned = write(str(tmp_path / "j.jsonl"), [row | {"label": 1 - row["label"]} for row in JUDGE])
    found = run(reward_model_path=run.other, judge_rows=turned, texts=None)
    assert completions(found) == completions(run())
    assert column(found, "after", "reward") != column(run(), "after", "reward")
    assert not found["texts"]
    assert len(run()["texts"]) == len(TEXTS)
    ours, theirs = (column(one, "after", "judges", "naive_bayes") for one in (found, run()))
    np.testing.assert_allclose(ours, 1 - np.array(theirs), atol=1e-6)


def test_temperature(run: Any) -> None:
    found = run(temperature=0.2)
    assert completions(found) != completions(run())
    kl = [np.mean(column(one, "after", "kl")) for one in (found, run())]
    assert kl[0] > kl[1]  # sharper policies are farther apart


def test_rows_and_judge_words(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base = run()
    capsys.readouterr()
    found = run(rows=8, judge_words=3)
    assert f"sampled 8 of {len(PROMPTS)}" in capsys.readouterr().out  # one batch after the other
    assert completions(found) == completions(base)
    rewards = [column(one, "after", "reward") for one in (found, base)]
    np.testing.assert_allclose(*rewards, rtol=1e-4, atol=1e-6)
    words_count = [column(one, "after", "judges", "naive_bayes") for one in (found, base)]
    assert words_count[0] != words_count[1]


def test_mesh_and_precision(run: Any) -> None:
    """mesh, bf16"""
    found = run(mesh="data=2,fsdp=4")
    assert completions(found) == completions(run())
    with pytest.raises(ConfigError, match="data=3"):
        run(mesh="data=3")
    rounded = run(bf16=True)
    rewards = [np.array(column(one, "before", "reward")) for one in (rounded, run())]
    same = [a == b for a, b in zip(completions(rounded, "before"), completions(run(), "before"))]
    assert sum(same) > len(same) / 2
    assert (rewards[0] != rewards[1]).any()
    np.testing.assert_allclose(*(x[same] for x in rewards), atol=0.05)


@pytest.mark.parametrize("name", ["prompts", "texts", "judge_rows"])
def test_a_missing_file_is_named_first(run: Any, name: str) -> None:
    with pytest.raises((ConfigError, MissingFileError), match=f"{name}='nowhere.jsonl'"):
        run(**{name: "nowhere.jsonl"})


def test_every_field_is_flipped() -> None:
    names = {
        "before", "after", "seed", "title", "output", "max_new_tokens", "max_length", "prompts",
        "reward_model_path", "judge_rows", "texts", "temperature", "rows", "judge_words", "mesh",
        "bf16",
    }  # fmt: skip
    assert names == set(declared(EvaluateConfig))
