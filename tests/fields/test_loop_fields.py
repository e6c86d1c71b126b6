"""The fields that the loop reads: when it logs, evaluates and saves, where to, and what it clips.

One loop serves all trainers and gets their config as it is (test_every_face.py), so a toy will do.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jrlhf.config import TrainingConfig
from tests.fields.bench import Bench
from tests.train import toy

STEPS = 6
Check = Callable[[pytest.MonkeyPatch], None]


def run(out: str = "run", **fields: Any) -> Any:
    """Six steps of the toy, two to an epoch."""
    plain: dict[str, Any] = {"output_dir": out, "save_strategy": "no", "disable_tqdm": True}
    config = TrainingConfig(**{**plain, **fields})
    evaluate = lambda state: {"eval_loss": 1.0}  # noqa: E731
    made = toy.setup(config, steps=STEPS, steps_per_epoch=2, evaluate=evaluate)
    made.loop.run(made.state, {})
    return made


def entries(made: Any, name: str) -> list[int]:
    return [row["step"] for row in made.loop.trainer_state.log_history if name in row]


def saved(out: str = "run") -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in Path(out).glob("checkpoint-*"))


def logging_steps(_: pytest.MonkeyPatch) -> None:
    assert entries(run(logging_steps=1), "loss") == [1, 2, 3, 4, 5, 6]
    assert entries(run(logging_steps=4), "loss") == [4]
    assert entries(run(logging_steps=0.3), "loss") == [2, 4, 6]  # of six steps, rounded up


def eval_strategy(_: pytest.MonkeyPatch) -> None:
    assert entries(run(), "eval_loss") == []
    assert entries(run(eval_strategy="epoch"), "eval_loss") == [2, 4, 6]
    assert entries(run(eval_strategy="steps", logging_steps=5), "eval_loss") == [5, 6]


def eval_steps(_: pytest.MonkeyPatch) -> None:
    assert entries(run(eval_strategy="steps", eval_steps=3), "eval_loss") == [3, 6]
    assert entries(run(eval_strategy="steps", eval_steps=4), "eval_loss") == [4, 6]
    assert entries(run(eval_strategy="steps", eval_steps=0.5), "eval_loss") == [3, 6]


def save_strategy(_: pytest.MonkeyPatch) -> None:
    run(save_strategy="epoch")
    assert saved() == [2, 4, 6]
    run("none", save_strategy="no", save_steps=1)
    assert saved("none") == []


def save_steps(_: pytest.MonkeyPatch) -> None:
    run(save_strategy="steps", save_steps=4)
    assert saved() == [4, 6]
    run("share", save_strategy="steps", save_steps=0.5)
    assert saved("share") == [3, 6]


def save_total_limit(_: pytest.MonkeyPatch) -> None:
    run(save_strategy="epoch", save_total_limit=2)
    assert saved() == [4, 6]


def resume_from_checkpoint(_: pytest.MonkeyPatch) -> None:
    first = run(save_strategy="steps", save_steps=4)
    assert first.source.seen == [0, 1, 2, 3, 4, 5]
    assert run(resume_from_checkpoint="run/checkpoint-4").source.seen == [4, 5]
    assert run(resume_from_checkpoint=True).source.seen == []


def events(directory: str) -> list[Path]:
    return list(Path(directory).glob("events.out.tfevents.*"))


def report_to(_: pytest.MonkeyPatch) -> None:
    run("alone", report_to=None)
    assert [path.name for path in Path("alone").iterdir()] == ["metrics.jsonl"]
    run("board", report_to="tensorboard")
    assert events("board/runs")


def logging_dir(_: pytest.MonkeyPatch) -> None:
    run(report_to="tensorboard", logging_dir="elsewhere")
    assert events("elsewhere")
    assert not Path("run/runs").exists()


# What W&B's own package would be told, for it needs an account.
WANDB = """
import json, pathlib
class Run:
    def log(self, values): pass
    def finish(self): pass
def init(**options):
    pathlib.Path("wandb.json").write_text(json.dumps(options))
    return Run()
"""


def run_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("service").mkdir()
    Path("service/wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend("service")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    run(report_to="wandb", run_name="the third try")
    monkeypatch.delitem(sys.modules, "wandb")
    assert json.loads(Path("wandb.json").read_text())["name"] == "the third try"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def disable_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for value in (None, True):
        screen = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", screen)
            run(disable_tqdm=value, logging_steps=1)
        shown[value] = screen.getvalue()
    assert "6/6 [" in shown[None]  # tqdm's bar
    assert "6/6 [" not in shown[True]
    assert "step 5/6  loss" in shown[True]


TABLE: dict[str, Check] = {
    "logging_steps": logging_steps,
    "eval_strategy": eval_strategy,
    "eval_steps": eval_steps,
    "save_strategy": save_strategy,
    "save_steps": save_steps,
    "save_total_limit": save_total_limit,
    "resume_from_checkpoint": resume_from_checkpoint,
    "report_to": report_to,
    "logging_dir": logging_dir,
    "run_name": run_name,
    "disable_tqdm": disable_tqdm,
}


@pytest.mark.parametrize("field", TABLE)
def test_the_field_acts_on_the_loop(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    TABLE[field](monkeypatch)


# ------------------------------------------------------------------ a real run


def test_max_grad_norm_bounds_what_plain_descent_moves(bench: Bench) -> None:
    rate, limit = 0.5, 0.125
    trainer = bench.trainer(
        "sft", optim="sgd", learning_rate=rate, lr_scheduler_type="constant", max_steps=1,
        logging_steps=1, save_strategy="no", max_grad_norm=limit, disable_tqdm=True,
    )  # fmt: skip
    start = jax.tree.map(np.asarray, trainer.model.params)
    trainer.train()
    moved = optax.tree.norm(jax.tree.map(np.subtract, trainer.model.params, start))
    assert trainer.state.log_history[0]["grad_norm"] > 2 * limit  # the default would not bind so
    np.testing.assert_allclose(float(moved), rate * limit, rtol=1e-4)


RUNS = {"max_grad_norm": test_max_grad_norm_bounds_what_plain_descent_moves}
