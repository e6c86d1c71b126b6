"""Checkpoints: a resumed run is the run that never stopped, bit by bit, or a named error."""

from __future__ import annotations

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.config import TrainingConfig
from jrlhf.errors import CheckpointError
from jrlhf.train.checkpoint import Checkpoints
from jrlhf.train.state import TrainState, abstract


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def config(directory, **values):
    return TrainingConfig(
        **{
            "output_dir": str(directory),
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "logging_steps": 2,
            "save_steps": 100,
            "gradient_accumulation_steps": 2,
            **values,
        }
    )


TIMING = {
    "tokens_per_second", "step_time", "compiles", "train_runtime", "train_steps_per_second",
    "train_samples_per_second",
}  # fmt: skip


def numbers(entries):
    return [{k: v for k, v in entry.items() if k not in TIMING} for entry in entries]


def read(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=4"])
def test_resuming_is_never_having_stopped(toy, tmp_path, mesh, stop):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    through = toy.setup(config(whole), mesh=mesh, steps=7, steps_per_epoch=4)
    wanted, output = through.loop.run(through.state, {})

    class Stop:
        def on_step_end(self, args, state, control, **kw):
            control.should_training_stop = control.should_save = state.global_step == stop

    first = toy.setup(config(cut), mesh=mesh, steps=7, steps_per_epoch=4, callbacks=[Stop()])
    first.loop.run(first.state, {})
    again = toy.setup(
        config(cut, resume_from_checkpoint=True), mesh=mesh, steps=7, steps_per_epoch=4
    )
    got, resumed = again.loop.run(again.state, {})

    assert bits(got) == bits(wanted)
    assert first.source.seen + again.source.seen == through.source.seen == list(range(7))
    ours, theirs = again.loop.trainer_state, through.loop.trainer_state
    trained = [entry for entry in ours.log_history if "loss" in entry]
    assert numbers(trained) == numbers([e for e in theirs.log_history if "loss" in e])
    assert resumed.training_loss == output.training_loss
    kept = [line for line in read(cut) if "loss" in line]
    assert [line["step"] for line in kept] == [2, 4, 6]
    assert [line["loss"] for line in kept] == [
        line["loss"] for line in read(whole) if "loss" in line
    ]


def test_another_mesh_continues_within_rounding(toy, tmp_path):
    one = toy.setup(config(tmp_path, save_steps=3), steps=7)
    one.loop.run(one.state, {})
    eight = toy.setup(config(tmp_path / "new"), mesh="data=2,fsdp=4", steps=7)
    other, _ = eight.loop.run(
        eight.state, {}, resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert eight.source.seen == [3, 4, 5, 6]
    for leaf, start in zip(jax.tree.leaves(other), jax.tree.leaves(eight.state), strict=True):
        assert leaf.sharding == start.sharding
    a = [e["loss"] for e in one.loop.trainer_state.log_history if "loss" in e]
    b = [e["loss"] for e in eight.loop.trainer_state.log_history if "loss" in e]
    np.testing.assert_allclose(a, b, rtol=1e-5)


def state(**leaves):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero + 5, zero, {k: jnp.asarray(v) for k, v in leaves.items()}, ())


def test_what_goes_in_comes_out(tmp_path):
    checkpoints = Checkpoints(tmp_path, config={"a": 1})
    first = state(w=np.arange(6.0, dtype=np.float32).reshape(2, 3))
    source = {
        "start": np.int64(3),
        "none": None,
        "buffer": {"ids": np.arange(4, dtype=np.int32), "rewards": np.array([0.5, np.nan])},
        "rows": [np.ones(2, bool), "text", {"deep": jnp.ones(1)}],
    }
    path = checkpoints.save(first, source=source, trainer={"x": [1.5]})
    assert path == tmp_path / "checkpoint-5"
    found = checkpoints.restore(path, abstract(first))
    assert bits(found.state) == bits(first)
    assert found.trainer == {"x": [1.5]}
    assert found.changed == []
    assert (found.source["start"], found.source["none"]) == (3, None)
    for name, value in source["buffer"].items():
        np.testing.assert_array_equal(found.source["buffer"][name], value)
        assert found.source["buffer"][name].dtype == value.dtype
    np.testing.assert_array_equal(found.source["rows"][0], [True, True])
    assert found.source["rows"][1] == "text"
    np.testing.assert_array_equal(found.source["rows"][2]["deep"], [1.0])


def test_every_difference_is_listed_before_anything_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(state(a=np.ones(2), b=np.ones(3), c=np.ones(4)), source={}, trainer={})
    for file in (path / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")  # reading would fail otherwise
    like = state(a=np.ones(2), b=np.ones((3, 1)), d=np.ones(4), c=np.ones(4, np.int32))
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(path, like)
    text = str(error.value)
    assert "missing in the checkpoint: params.d" in text
    assert "unexpected" not in text
    assert "params.b is float32[3], not float32[3,1]" in text
    assert "params.c is float32[4], not int32[4]" in text
    assert "params.a" not in text
    with pytest.raises(CheckpointError, match=r"unexpected in the checkpoint: params\.c"):
        checkpoints.restore(path, state(a=np.ones(2), b=np.ones(3)))


def test_damage_is_a_named_error(tmp_path):
    checkpoints, first = Checkpoints(tmp_path), state(w=np.ones(1000, np.float32))
    path = checkpoints.save(first, source={}, trainer={})
    for file in (path / "state").rglob("*"):
        if file.is_file() and "d" in file.parent.name:
            file.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.restore(path, first)
    (path / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError):
        checkpoints.find(path)


def test_damaged_arrays_of_the_source_are_a_named_error(tmp_path):
    checkpoints, like = Checkpoints(tmp_path), state(w=np.ones(3, np.float32))
    source = {"rows": {"ids": np.arange(2000), "name": "x"}, "epoch": 1}
    path = checkpoints.save(like, source=source, trainer={})
    file = path / "source-0.npz"
    whole = file.read_bytes()
    assert (checkpoints.restore(path, like).source["rows"]["ids"] == np.arange(2000)).all()
    rng = np.random.default_rng(0)
    broken = [b"", whole[:-40], whole[: len(whole) // 2]]
    for at in rng.integers(0, len(whole), 20):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        broken.append(bytes(flipped))
    said = []
    for content in broken:
        file.write_bytes(content)
        try:
            checkpoints.restore(path, like)
        except CheckpointError as error:
            said.append(str(error))
    assert len(said) > 17  # a zip has a few bytes that mean nothing
    assert all("source-0" in text for text in said)
    np.savez(file, other=np.ones(2))
    with pytest.raises(CheckpointError, match=r"names array 'a0', which source-0.npz lacks"):
        checkpoints.restore(path, like)


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, total_limit=2)
    first = state(w=np.ones(2))
    for step in (2, 4, 10, 12):
        checkpoints.save(first._replace(step=jnp.int32(step)), source={}, trainer={})
    assert checkpoints.steps() == [10, 12]
    # One that was left behind by a longer run goes before the one just written.
    checkpoints.save(first._replace(step=jnp.int32(6)), source={}, trainer={})
    assert checkpoints.steps() == [6, 12]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(w=np.ones(2)), source={}, trainer={})
    path = checkpoints.save(state(w=np.zeros(2)), source={}, trainer={})
    np.testing.assert_array_equal(
        checkpoints.restore(path, state(w=np.ones(2))).state.params["w"], [0, 0]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    assert not (path / "replaced").exists()


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    checkpoints, first = Checkpoints(tmp_path), state(w=np.ones(2))
    checkpoints.save(first, source={}, trainer={})
    (tmp_path / ".checkpoint-9.partial").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints.steps() == [5]
    checkpoints.save(first, source={}, trainer={})
    assert not (tmp_path / ".checkpoint-9.partial").exists()


def test_resume_takes_true_a_path_a_name_or_another_run(tmp_path):
    checkpoints, first = Checkpoints(tmp_path / "run"), state(w=np.ones(2))
    for step in (3, 20):
        checkpoints.save(first._replace(step=jnp.int32(step)), source={}, trainer={})
    newest, older = tmp_path / "run" / "checkpoint-20", tmp_path / "run" / "checkpoint-3"
    assert checkpoints.find(True) == newest
    assert checkpoints.find(older) == older
    assert checkpoints.find(str(older)) == older
    assert checkpoints.find("checkpoint-3") == older
    assert Checkpoints(tmp_path / "other").find(str(tmp_path / "run")) == newest


@pytest.mark.parametrize(
    ("resume", "where"),
    [(True, "{run}."), ("checkpoint-4", "checkpoint-4 or {run}/checkpoint-4."),
     ("/nowhere/checkpoint-1", "/nowhere/checkpoint-1.")],
)  # fmt: skip
def test_nothing_to_resume_from_is_an_error_that_says_where(tmp_path, resume, where):
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path).find(resume)
    assert str(error.value).endswith(f"no checkpoint-<step> in {where.format(run=tmp_path)}")


def test_fields_that_matter_and_changed_are_said(toy, tmp_path, caplog):
    first = toy.setup(config(tmp_path), steps=7)
    first.loop.run(first.state, {})
    again = toy.setup(config(tmp_path, learning_rate=1e-2, seed=1, logging_steps=1), steps=7)
    with caplog.at_level(logging.WARNING):
        again.loop.run(again.state, {}, resume_from_checkpoint=True)
    assert any("other values of seed;" in r.getMessage() for r in caplog.records)


def test_a_finished_run_resumes_to_nothing_more(toy, tmp_path):
    first = toy.setup(config(tmp_path), steps=7)
    done, output = first.loop.run(first.state, {})
    again = toy.setup(config(tmp_path), steps=7)
    same, resumed = again.loop.run(again.state, {}, resume_from_checkpoint=True)
    assert bits(same) == bits(done)
    assert again.source.seen == []
    assert (resumed.global_step, resumed.training_loss) == (7, output.training_loss)


def test_the_config_is_kept_with_its_digest(toy, tmp_path):
    run = toy.setup(config(tmp_path), steps=7)
    run.loop.run(run.state, {})
    about = json.loads((tmp_path / "checkpoint-7" / "config.json").read_text())
    assert about["config"] == json.loads(json.dumps(dataclasses.asdict(config(tmp_path))))
    assert len(about["digest"]) == 64
    assert set(about["versions"]) == {"jax", "optax", "orbax-checkpoint"}
