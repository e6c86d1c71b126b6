"""metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.errors import ConfigError
from jrlhf.train import progress
from jrlhf.train.metrics import Meter, compiles
from jrlhf.train.progress import Progress
from jrlhf.train.writers import JsonlWriter, TensorBoardWriter, reporters


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_entries_of_one_step_share_a_line(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.log(1, {"loss": 2.0})
    writer.log(1, {"eval_loss": 3.0})
    assert lines(path) == [{"step": 1, "loss": 2.0, "eval_loss": 3.0}]  # on disk before the close
    writer.log(2, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_what_is_not_finite_is_null(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.log(1, {"a": math.nan, "b": -math.inf, "c": np.float32(0.5), "d": jnp.int32(3), "e": 7})
    writer.close()
    assert lines(tmp_path / "m.jsonl") == [
        {"step": 1, "a": None, "b": None, "c": 0.5, "d": 3, "e": 7}
    ]


@pytest.mark.parametrize("resume", [0, 2, 9])
def test_resuming_drops_later_lines_and_half_written_ones(tmp_path, resume):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n{"step": 4, "x": 4}\n{"step": 5, "x')
    writer = JsonlWriter(path, resume_step=resume)
    writer.log(resume, {"y": 1})
    writer.log(resume + 1, {"y": 2})
    writer.close()
    steps = [line["step"] for line in lines(path)]
    kept = [s for s in (1, 2, 4) if s <= resume]
    assert steps == [*kept, *([] if resume in kept else [resume]), resume + 1]
    if resume == 2:
        assert lines(path)[1] == {"step": 2, "x": 2, "y": 1}


def test_a_shorter_line_leaves_no_rest_behind(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    writer.log(1, {"a": "x" * 100})
    writer.log(1, {"a": 1})
    writer.log(2, {"a": 2})
    writer.close()
    assert lines(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}]


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3):
        writer.log(step, {"loss": 1.0 / step, "eval_loss": 2.0, "note": "text"})
    writer.close()
    resumed = TensorBoardWriter(tmp_path, resume_step=2)
    resumed.log(3, {"loss": 0.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 0)]


def test_tensorboard_pulls_in_neither_torch_nor_tensorflow(tmp_path):
    pytest.importorskip("tensorboard")
    program = (
        "import sys; from jrlhf.train.writers import TensorBoardWriter\n"
        f"w = TensorBoardWriter({str(tmp_path)!r}); w.log(1, {{'loss': 1.0}}); w.close()\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_report_to_is_checked_by_name():
    assert reporters(None) == reporters("none") == reporters([]) == []
    with pytest.raises(ConfigError, match='Did you mean "wandb"'):
        reporters("wandbb")
    for name in reporters("all"):
        assert importlib.util.find_spec(name)
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ConfigError, match=r'pip install "jrlhf\[wandb\]"'):
            reporters(["wandb"])


def test_lines_are_written_where_there_is_no_terminal():
    stream = io.StringIO()
    lines = Progress(100, initial=10, stream=stream)
    lines.step()
    lines.log(20, {"loss": 1.25, "tokens_per_second": 1234.5, "hidden": 3.0})
    lines.log(100, {"loss": 1.0})
    lines.close()
    first, last = stream.getvalue().splitlines()
    assert first.startswith("step 20/100  loss 1.25  1,234 tokens/s  ETA 0:00:")
    assert "hidden" not in first
    assert last == "step 100/100  loss 1"


def test_a_long_rollout_says_how_far_it_is(monkeypatch):
    stream = io.StringIO()
    lines = Progress(100, stream=stream)
    lines.sampling(64, 512)  # something was just said
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    lines.sampling(128, 512)
    lines.sampling(512, 512)  # the step's own line follows
    Progress(100, stream=stream, silent=True).sampling(64, 512)
    assert stream.getvalue() == "  sampled 128 of 512 completions\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_loss_and_speed():
    stream = Terminal()
    bar = Progress(3, stream=stream)
    for step in (1, 2, 3):
        bar.step()
        bar.log(step, {"loss": 1.0 / step, "tokens_per_second": 10.0})
    bar.say("hello")
    bar.close()
    assert "3/3" in stream.getvalue()
    assert "10 tokens/s" in stream.getvalue()
    assert "hello\n" in stream.getvalue()


def test_plain_and_silent_are_obeyed():
    plain, silent = Terminal(), io.StringIO()
    Progress(2, plain=True, stream=plain).log(1, {"loss": 1.0})
    assert plain.getvalue().startswith("step 1/2  loss 1")
    quiet = Progress(2, silent=True, stream=silent)
    quiet.log(1, {"loss": 1.0})
    quiet.say("hello")
    assert silent.getvalue() == ""


def test_a_meter_takes_means_of_what_is_finite_and_last_values_of_rates():
    meter = Meter()
    for loss, norm in ((1.0, 1.0), (math.nan, math.nan), (3.0, 5.0)):
        device = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}
        meter.add({**device, "num_tokens": jnp.float32(10)}, {"reward": loss})
    out = meter.take()
    assert (out["loss"], out["grad_norm"], out["reward"]) == (2.0, 5.0, 2.0)
    assert (out["num_tokens"], meter.tokens, len(meter)) == (30, 30, 0)
    assert meter.mean_loss() == 2.0
    meter.add({"loss": jnp.float32(5.0), "num_tokens": jnp.float32(1)}, {})
    assert meter.take()["num_tokens"] == 31
    assert meter.mean_loss() == 3.0


def test_a_meter_goes_on_from_its_saved_interval():
    one, other = Meter(), Meter()
    for meter in (one, other):
        meter.add({"loss": jnp.float32(0.1)}, {})
    third = Meter()
    third.load_state_dict(json.loads(json.dumps(other.state_dict())))
    for meter in (one, third):
        meter.add({"loss": jnp.float32(0.7)}, {})
    assert one.take()["loss"] == third.take()["loss"]


def test_every_compile_is_counted():
    import jax

    before = compiles()
    f = jax.jit(lambda x: x * 3 + 1)
    f(np.ones(3))
    assert (first := compiles()) > before
    f(np.zeros(3))
    assert compiles() == first
