"""The host loop: what it logs, when it evaluates and saves, what callbacks see, how it stops."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jrlhf.config import TrainingConfig
from jrlhf.errors import ConfigError
from jrlhf.train.callbacks import EVENTS, Callback
from jrlhf.train.interrupt import TrainingInterrupted


def config(directory, **values):
    return TrainingConfig(
        **{"output_dir": str(directory), "logging_steps": 2, "save_strategy": "no", **values}
    )


def lines(directory):
    return [json.loads(x) for x in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def by_hand(toy, run, steps):
    """Losses of the run, step by step, without the loop."""
    state, losses = jax.tree.map(lambda x: x.copy(), run.state), []
    source = toy.Buffered(run.mesh)
    for i in range(steps):
        state, metrics = run.step(state, {}, source.batch(i, state))
        losses.append(float(metrics["loss"]))
    return losses


def test_logs_are_means_over_the_interval(toy, tmp_path):
    run = toy.setup(config(tmp_path), steps=6, steps_per_epoch=4)
    losses = by_hand(toy, run, 6)
    _, output = run.loop.run(run.state, {})
    history = [entry for entry in run.loop.trainer_state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6]
    for i, entry in enumerate(history):
        np.testing.assert_allclose(entry["loss"], np.mean(losses[2 * i : 2 * i + 2]), rtol=1e-7)
        assert entry["epoch"] == (2 * i + 2) / 4
        assert entry["tokens_per_second"] > 0
        assert entry["position"] == 2 * i + 0.5
    tokens = [int(toy.batch(i, seed=i // 3)["lengths"].sum()) for i in range(6)]
    assert [entry["num_tokens"] for entry in history] == list(np.cumsum(tokens)[1::2])
    np.testing.assert_allclose(output.training_loss, np.mean(losses), rtol=1e-7)
    assert output.global_step == 6
    assert output.metrics["train_loss"] == output.training_loss
    assert output.metrics["epoch"] == 1.5
    speed = output.metrics["train_samples_per_second"] / output.metrics["train_steps_per_second"]
    np.testing.assert_allclose(speed, 16)


def test_the_learning_rate_logged_is_that_of_the_update(toy, tmp_path):
    run = toy.setup(config(tmp_path, logging_steps=1), steps=6)
    run.loop.run(run.state, {})
    got = [e["learning_rate"] for e in run.loop.trainer_state.log_history if "loss" in e]
    np.testing.assert_allclose(got, [5e-5 * (6 - i) / 6 for i in range(6)], rtol=1e-6)


def test_metrics_jsonl_holds_one_object_per_logged_step(toy, tmp_path):
    values = config(tmp_path, eval_strategy="steps", eval_steps=3)
    run = toy.setup(values, steps=6, evaluate=lambda state: {"eval_loss": 1.5})
    run.loop.run(run.state, {})
    got = lines(tmp_path)
    assert [line["step"] for line in got] == [2, 3, 4, 6]
    assert [line.get("eval_loss") for line in got] == [None, 1.5, None, 1.5]
    assert "loss" in got[-1]
    assert got[-1]["train_loss"] == run.loop.trainer_state.log_history[-1]["train_loss"]


def test_nothing_compiles_after_the_second_step(toy, tmp_path):
    run = toy.setup(config(tmp_path, logging_steps=1), steps=6)
    run.loop.run(run.state, {})
    assert [line["compiles"] for line in lines(tmp_path)][2:] == [0, 0, 0, 0]


def test_a_new_shape_shows_up_as_a_compile(toy, tmp_path):
    class Growing(toy.Buffered):
        def batch(self, step, state):
            self.seen.append(step)
            return toy.put_batch(self.mesh, toy.batch(step, rows=16 if step < 4 else 24))

    run = toy.setup(config(tmp_path, logging_steps=1), steps=6, source=Growing)
    run.loop.run(run.state, {})
    counts = [line["compiles"] for line in lines(tmp_path)]
    assert counts[4] > 0
    assert (counts[3], counts[5]) == (0, 0)


def test_evaluation_sees_the_state_of_its_step(toy, tmp_path):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"eval_loss": float(state.step)}

    values = config(tmp_path, eval_strategy="steps", eval_steps=4)
    run = toy.setup(values, steps=6, evaluate=evaluate)
    run.loop.run(run.state, {})
    assert seen == [4, 6]  # the last step is always evaluated, as in transformers


def test_epochs_drive_evaluation_and_checkpoints(toy, tmp_path):
    values = config(tmp_path, eval_strategy="epoch", save_strategy="epoch")
    seen = []
    run = toy.setup(
        values, steps=6, steps_per_epoch=3, evaluate=lambda s: seen.append(int(s.step)) or {}
    )
    run.loop.run(run.state, {})
    assert seen == [3, 6]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name in EVENTS:
            return lambda args, state, control, **kw: self.events.append(
                (name, state.global_step, sorted(kw))
            )
        return super().__getattribute__(name)


def test_callbacks_hear_transformers_events_in_its_order(toy, tmp_path):
    recorder = Recorder()
    values = config(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps",
                    save_steps=2)  # fmt: skip
    run = toy.setup(
        values,
        steps=2,
        steps_per_epoch=2,
        evaluate=lambda s: {"eval_loss": 1.0},
        callbacks=[recorder],
        context={"model": "m"},
    )
    run.loop.run(run.state, {})
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    assert [name for name, _, _ in recorder.events] == [
        "on_train_begin",
        "on_epoch_begin",
        *step,
        *step,
        "on_log",
        "on_log",
        "on_evaluate",
        "on_save",
        "on_epoch_end",
        "on_log",
        "on_train_end",
    ]
    assert all("model" in words for _, _, words in recorder.events)
    assert ("on_evaluate", 2, ["metrics", "model"]) in recorder.events
    assert ("on_log", 2, ["logs", "model"]) in recorder.events


def test_a_callback_can_stop_save_log_and_evaluate(toy, tmp_path):
    class Controller:  # no base class, only the events that it wants
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 3:
                control.should_log = control.should_save = control.should_evaluate = True
                control.should_training_stop = True
            return control

    run = toy.setup(config(tmp_path, logging_steps=100), steps=6, callbacks=[Controller],
                    evaluate=lambda s: {"eval_loss": 0.0})  # fmt: skip
    _, output = run.loop.run(run.state, {})
    assert output.global_step == 3
    assert [line["step"] for line in lines(tmp_path)] == [3]
    assert {"loss", "eval_loss", "train_loss"} <= set(lines(tmp_path)[0])
    assert (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.parity
def test_transformers_early_stopping_works_as_it_is(toy, tmp_path):
    transformers = pytest.importorskip("transformers")
    callback = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    values = config(tmp_path, eval_strategy="steps", eval_steps=1)

    class Args:
        metric_for_best_model, greater_is_better = "loss", False
        load_best_model_at_end = True

        def __getattr__(self, name):
            return getattr(values, name)

    run = toy.setup(values, steps=6, callbacks=[callback],
                    evaluate=lambda s: {"eval_loss": 1.0 + int(s.step)})  # fmt: skip
    run.loop.args = Args()
    for name in ("output_dir", "max_steps"):
        assert getattr(run.loop.args, name) == getattr(values, name)
    run.loop.trainer_state.best_metric = 0.0
    _, output = run.loop.run(run.state, {})
    assert output.global_step == 2


def test_skipped_updates_are_counted_and_said(toy, tmp_path, caplog):
    run = toy.setup(
        config(tmp_path), steps=6, source=lambda mesh: toy.Buffered(mesh, spoil={2: np.nan})
    )
    _, output = run.loop.run(run.state, {})
    got = lines(tmp_path)
    assert [line["skipped_steps"] for line in got] == [0, 1, 1]
    assert all(line["loss"] is not None for line in got)  # the mean of the finite steps
    assert math.isfinite(output.training_loss)
    warned = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(warned) == 1
    assert "1 of the 2 updates up to step 4" in warned[0]


def test_an_interval_of_nothing_finite_is_null_on_disk(toy, tmp_path):
    spoil = dict.fromkeys(range(2), np.nan)
    run = toy.setup(config(tmp_path), source=lambda mesh: toy.Buffered(mesh, spoil=spoil))
    run.loop.run(run.state, {})
    assert lines(tmp_path)[0]["loss"] is None
    assert lines(tmp_path)[1]["loss"] is not None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"output_dir": None}, "output_dir"),
        ({"eval_strategy": "steps"}, "needs an eval_dataset"),
        ({"save_strategy": "epoch"}, "save_strategy='epoch'"),
        ({"report_to": "tensorbord"}, 'Did you mean "tensorboard"'),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(toy, tmp_path, values, says):
    run = toy.setup(config(**{"directory": tmp_path, **values}))
    with pytest.raises(ConfigError, match=says):
        run.loop.run(run.state, {})
    assert run.source.seen == []


def test_no_step_to_do_is_an_error(toy, tmp_path):
    run = toy.setup(config(tmp_path), steps=6)
    run.loop.total_steps = 0
    with pytest.raises(ConfigError, match="0 steps"):
        run.loop.run(run.state, {})


def test_stopping_an_epoch_early_is_refused_by_name(toy, tmp_path):
    class Impatient:
        def on_step_end(self, args, state, control, **kw):
            control.should_epoch_stop = True

    run = toy.setup(config(tmp_path), callbacks=[Impatient()])
    with pytest.raises(ConfigError, match="should_epoch_stop"):
        run.loop.run(run.state, {})


def test_a_signal_in_the_loop_saves_and_leaves_by_name(toy, tmp_path):
    import signal

    class Terminator:
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 3:
                signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    run = toy.setup(config(tmp_path), callbacks=[Terminator()])
    with pytest.raises(TrainingInterrupted) as stop:
        run.loop.run(run.state, {})
    assert stop.value.code == 128 + signal.SIGTERM
    assert stop.value.step == 3
    assert Path(stop.value.checkpoint) == tmp_path / "checkpoint-3"
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_killed_process_goes_on_where_it_was(toy, tmp_path, name):
    import signal

    program = [sys.executable, str(Path(toy.__file__)), str(tmp_path), "2000", "data=1"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        waited = time.monotonic() + 400
        while not (tmp_path / "metrics.jsonl").is_file() or len(lines(tmp_path)) < 3:
            assert time.monotonic() < waited
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.Signals[name])
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.Signals[name], err
    assert "finished" not in out
    assert "Traceback" not in err
    saved = [int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")]
    assert len(saved) == 1
    assert f"Interrupted by {name} after step {saved[0]}, saved in" in err
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, saved[0] + 1))

    values = config(tmp_path, logging_steps=1, resume_from_checkpoint=True)
    run = toy.setup(values, steps=saved[0] + 2)
    _, output = run.loop.run(run.state, {})
    assert output.global_step == saved[0] + 2
    assert run.source.seen == [saved[0], saved[0] + 1]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, saved[0] + 3))
