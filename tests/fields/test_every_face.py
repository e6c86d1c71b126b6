"""The fields that all trainers have: what each of them does to each trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.data.loader import Order
from jrlhf.errors import ConfigError, MeshError, UnsupportedFieldError
from jrlhf.train.state import TrainState
from tests.fields.bench import DATA, FACES, OFFLINE, ONLINE, Bench, first_rows
from tests.standin_hub import StandInHub, standing_in

Check = Callable[[Bench, str], None]


# ------------------------------------------------------------------ data, sizes and steps


def output_dir(bench: Bench, face: str) -> None:
    assert bench.trainer(face, output_dir="there").args.output_dir == "there"
    kind = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}[face]
    assert bench.trainer(face, output_dir=None).args.output_dir == f"tiny-{kind}"


def sizes(trainer: Any) -> tuple[int, int]:
    """Rows of an update and rows of a micro-batch."""
    source = trainer._loop.source
    if hasattr(source, "plan"):
        return source.plan.batch_rows, source.plan.micro_rows
    rows = len(source.loader.batch(0)["lengths"])
    return rows, rows // trainer.args.gradient_accumulation_steps


def per_device_train_batch_size(bench: Bench, face: str) -> None:
    assert sizes(bench.trainer(face, per_device_train_batch_size=4)) == (4, 4)
    assert sizes(bench.trainer(face, per_device_train_batch_size=6)) == (6, 6)


def gradient_accumulation_steps(bench: Bench, face: str) -> None:
    trainer = bench.trainer(face, gradient_accumulation_steps=3)
    assert sizes(trainer) == (6, 2)
    # And the step cuts its batch in three: two rows are too few, which it says before all else.
    trainable, frozen = trainer._split()
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, count, trainable, jax.eval_shape(trainer._tx.init, trainable))  # type: ignore[arg-type]
    with pytest.raises(MeshError, match="3 micro-batches"):
        jax.eval_shape(trainer._loop.step, state, frozen, {"lengths": jnp.ones(2)})


def num_train_epochs(bench: Bench, face: str) -> None:
    once, often = (bench.trainer(face, num_train_epochs=n)._loop for n in (1, 4))
    assert often.total_steps == 4 * once.total_steps
    assert once.total_steps == once.steps_per_epoch


def max_steps(bench: Bench, face: str) -> None:
    assert bench.trainer(face, max_steps=7)._loop.total_steps == 7


def dataloader_drop_last(bench: Bench, face: str) -> None:
    # Ten rows, read four at a time: two batches are full, the third is short (or, in a rollout,
    # begins the next epoch).
    rows = 8 if face == "grpo" else 4  # pairs of completions
    kept, dropped = (
        bench.trainer(face, dataloader_drop_last=drop, per_device_train_batch_size=rows,
                      num_train_epochs=1)._loop
        for drop in (False, True)
    )  # fmt: skip
    assert kept.total_steps * 2 == dropped.total_steps * 3
    if face in ONLINE:
        third = [tuple(row["ids"]) for row in dropped.source._prompts(2)]
        rows, order = dropped.source._prompts.rows, Order(10, batch_size=4, seed=42)
        assert third == [tuple(rows[i]["ids"]) for i in order.permutation(1)[:4]]
    else:
        assert (kept.source.loader.batch(2)["lengths"] == 0).any()
        assert (dropped.source.loader.batch(2)["lengths"] > 0).all()


def seed(bench: Bench, face: str) -> None:
    one, same, other = (bench.trainer(face, seed=s) for s in (1, 1, 2))
    assert first_rows(one) == first_rows(same) != first_rows(other)
    if face in ONLINE:  # the samples', and the order's of mini-batches
        assert (one._loop.source.plan.seed, other._loop.source.plan.seed) == (1, 2)
    if face in ("reward", "ppo"):  # heads that no checkpoint has
        name = {"reward": "score", "ppo": "value"}[face]

        def head(number: int, **more: Any) -> np.ndarray:
            model = bench.trainer(face, seed=number, **more).model
            return np.asarray(model.params[name]["kernel"])

        first = head(1, by_name=True)
        np.testing.assert_array_equal(head(1, by_name=True), first)
        assert (head(2, by_name=True) != first).all()
        if face == "ppo":
            bare = {"model": bench.model("sft")}
            assert (head(1, given=bare) != head(2, given=bare)).all()


def data_seed(bench: Bench, face: str) -> None:
    plain, wanted = (first_rows(bench.trainer(face, seed=s)) for s in (1, 2))
    assert first_rows(bench.trainer(face, seed=1, data_seed=2)) == wanted != plain


def pad_to_multiple_of(bench: Bench, face: str) -> None:
    for multiple in (16, 48):
        source = bench.trainer(face, pad_to_multiple_of=multiple)._loop.source
        if face in ONLINE:
            assert source.plan.prompt_length == multiple
        else:
            assert source.loader.batch(0)["ids"].shape[-1] == multiple


def refuses(face: str, name: str, value: Any) -> None:
    with pytest.raises(UnsupportedFieldError, match=name):
        FACES[face][0](**{name: value})


def per_device_eval_batch_size(bench: Bench, face: str) -> None:
    if face in ONLINE:
        refuses(face, "per_device_eval_batch_size", 3)
        return
    trainer = bench.trainer(face, per_device_eval_batch_size=3, given={"eval_dataset": DATA[face]})
    assert len(trainer._evaluation().loader.batch(0)["lengths"]) == 3


def eval_strategy(bench: Bench, face: str) -> None:
    if face in ONLINE:
        refuses(face, "eval_strategy", "epoch")
        return
    with pytest.raises(ConfigError, match=r"eval_strategy='epoch' needs an eval_dataset"):
        bench.trainer(face, eval_strategy="epoch").train()
    trainer = bench.trainer(face, eval_strategy="epoch", given={"eval_dataset": DATA[face]})
    assert trainer._loop.evaluate == trainer._evaluate  # test_loop.py shows when it is called


def eval_steps(bench: Bench, face: str) -> None:
    if face in ONLINE:
        refuses(face, "eval_steps", 5)
    else:
        assert bench.trainer(face, eval_steps=5)._loop.args.eval_steps == 5  # likewise


# ------------------------------------------------------------------ the hub


def uploaded(bench: Bench, face: str, **fields: Any) -> StandInHub:
    """What a hub has got when the model was saved."""
    with standing_in() as hub:
        plain = {"push_to_hub": True, "hub_model_id": "org/tiny"}
        bench.trainer(face, **{**plain, **fields}).save_model()
    return hub


def push_to_hub(bench: Bench, face: str) -> None:
    assert uploaded(bench, face, push_to_hub=False).commits == []
    (commit,) = uploaded(bench, face).commits
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(commit.files)


def hub_model_id(bench: Bench, face: str) -> None:
    assert set(uploaded(bench, face, hub_model_id="org/other").repos) == {"org/other"}
    named = uploaded(bench, face, hub_model_id=None, output_dir="my-run")
    assert set(named.repos) == {"me/my-run"}


def hub_token(bench: Bench, face: str) -> None:
    assert uploaded(bench, face, hub_token="hf_secret").commits[0].token == "hf_secret"


def hub_private_repo(bench: Bench, face: str) -> None:
    for private in (True, False):
        assert uploaded(bench, face, hub_private_repo=private).repos == {"org/tiny": private}


def hub_revision(bench: Bench, face: str) -> None:
    assert uploaded(bench, face).commits[0].revision == "main"
    hub = uploaded(bench, face, hub_revision="try")
    assert (hub.branches, hub.commits[0].revision) == ([("org/tiny", "try")], "try")


def hub_strategy(bench: Bench, face: str) -> None:
    for strategy, count in (("every_save", 1), ("end", 0)):
        with standing_in() as hub:
            trainer = bench.trainer(face, push_to_hub=True, hub_strategy=strategy)
            for callback in trainer._loop.callbacks:
                if hasattr(callback, "on_save"):
                    callback.on_save(trainer.args, trainer.state, None)
        assert len(hub.commits) == count


# ------------------------------------------------------------------ models


def both(bench: Bench, face: str, **fields: Any) -> list[Any]:
    """The trainer with a model that is given, and with one that it loads."""
    return [bench.trainer(face, by_name=by_name, **fields) for by_name in (False, True)]


def bf16(bench: Bench, face: str) -> None:
    for value, dtype in ((False, "float32"), (True, "bfloat16")):
        for trainer in both(bench, face, bf16=value):
            assert trainer.model.net.spec.dtype == dtype
            assert {x.dtype.name for x in jax.tree.leaves(trainer.model.params)} == {"float32"}


def gradient_checkpointing(bench: Bench, face: str) -> None:
    for value, policy in ((False, "none"), (True, "full")):
        for trainer in both(bench, face, gradient_checkpointing=value):
            assert trainer.model.net.spec.remat == policy


def gradient_checkpointing_kwargs(bench: Bench, face: str) -> None:
    fields = {"gradient_checkpointing_kwargs": {"policy": "dots"}}
    for trainer in both(bench, face, gradient_checkpointing=True, **fields):
        assert trainer.model.net.spec.remat == "dots"
    with pytest.raises(ConfigError, match="polcy"):
        bench.trainer(face, gradient_checkpointing_kwargs={"polcy": "dots"})
    with pytest.raises(ConfigError, match=r"policy='dot' is not known.*\"dots\""):
        bench.trainer(face, gradient_checkpointing_kwargs={"policy": "dot"})


def num_layers_unfrozen(bench: Bench, face: str) -> None:
    for value, trained in ((-1, 3), (1, 1)):
        for trainer in both(bench, face, num_layers_unfrozen=value):
            trainable, frozen = trainer._split()
            assert len(jax.tree.leaves(trainable["layers"])[0]) == trained
            assert ("embed" in frozen) == (trained < 3)


def mesh(bench: Bench, face: str) -> None:
    fields = {"num_generations": 4} if face == "grpo" else {}
    trainer = bench.trainer(face, by_name=True, mesh="fsdp=4,tensor=2", **fields)
    assert trainer.model.mesh.shape["tensor"] == 2
    kernel = trainer.model.params["layers"]["mlp"]["down"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert sizes(trainer)[0] == 8  # two per shard of the data


def model_init_kwargs(bench: Bench, face: str) -> None:
    fields = {"model_init_kwargs": {"dtype": "bfloat16"}}
    assert bench.trainer(face, by_name=True, **fields).model.net.spec.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="model_init_kwargs"):
        bench.trainer(face, **fields)
    with pytest.raises(ConfigError, match="the config's mesh"):
        bench.trainer(face, by_name=True, model_init_kwargs={"mesh": "fsdp=8"})


# ------------------------------------------------------------------ optimizers and schedules

KERNEL = np.array([[0.5, -1.0], [2.0, 0.25]], np.float32)
GRADIENTS = np.array([[[0.3, -0.2], [1e-4, 0.7]], [[-0.5, 0.1], [0.2, 1e-4]]], np.float32)
RATE = 0.01
PLAIN = {"lr_scheduler_type": "constant", "learning_rate": RATE, "max_steps": 8}


def moves(bench: Bench, face: str, gradients: Any = GRADIENTS, **fields: Any) -> np.ndarray:
    """What the trainer's own optimizer does to a weight, step by step, given its gradients."""
    tx = bench.trainer(face, **{**PLAIN, **fields})._tx
    params = {"kernel": jnp.asarray(KERNEL)}
    state, out = tx.init(params), []
    for gradient in gradients:
        update, state = tx.update({"kernel": jnp.asarray(gradient)}, state, params)
        out.append(np.asarray(update["kernel"]))
    return np.asarray(out)


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, decay: float = 0.0) -> np.ndarray:
    """Loshchilov and Hutter's algorithm 2 in float64, for a weight that stays where it is."""
    m, v, out = np.zeros((2, 2)), np.zeros((2, 2)), []
    for t, g in enumerate(GRADIENTS.astype(np.float64), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        out.append(-RATE * (step + decay * KERNEL))
    return np.asarray(out)


def follows_adam(bench: Bench, face: str, **change: Any) -> None:
    names = {"adam_beta1": "b1", "adam_beta2": "b2", "adam_epsilon": "eps", "weight_decay": "decay"}
    wanted = adam(**{names[name]: value for name, value in change.items()})
    np.testing.assert_allclose(moves(bench, face, **change), wanted, rtol=1e-4, atol=1e-8)
    assert np.abs(wanted - adam()).max() > 1e-4


def rates(bench: Bench, face: str, **fields: Any) -> np.ndarray:
    """The learning rate of each step, read off plain gradient descent."""
    ones = np.ones((8, 2, 2), np.float32)
    return -moves(bench, face, ones, optim="sgd", **fields)[:, 0, 0]


def learning_rate(bench: Bench, face: str) -> None:
    np.testing.assert_allclose(rates(bench, face, learning_rate=0.03), 0.03, rtol=1e-6)


def optim(bench: Bench, face: str) -> None:
    np.testing.assert_allclose(moves(bench, face, optim="sgd"), -RATE * GRADIENTS, rtol=1e-6)
    first = moves(bench, face, optim="lion")[0]
    np.testing.assert_allclose(first, -RATE * np.sign(GRADIENTS[0]), rtol=1e-6)
    np.testing.assert_allclose(moves(bench, face), adam(), rtol=1e-4, atol=1e-8)


def lr_scheduler_type(bench: Bench, face: str) -> None:
    falling = RATE * (1 - np.arange(8) / 8)
    np.testing.assert_allclose(rates(bench, face, lr_scheduler_type="linear"), falling, rtol=1e-5)
    cosine = RATE * 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8))
    np.testing.assert_allclose(rates(bench, face, lr_scheduler_type="cosine"), cosine, rtol=1e-5)


def lr_scheduler_kwargs(bench: Bench, face: str) -> None:
    options = {
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0},
    }
    wanted = RATE * (1 - np.arange(8) / 8) ** 2
    np.testing.assert_allclose(rates(bench, face, **options), wanted, rtol=1e-5)


def warmup_steps(bench: Bench, face: str) -> None:
    got = rates(bench, face, lr_scheduler_type="constant_with_warmup", warmup_steps=4)
    np.testing.assert_allclose(got, RATE * np.minimum(1, np.arange(8) / 4), rtol=1e-5)


def warmup_ratio(bench: Bench, face: str) -> None:
    got = rates(bench, face, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.25)
    np.testing.assert_allclose(got, RATE * np.minimum(1, np.arange(8) / 2), rtol=1e-5)


TABLE: dict[str, Check] = {
    "output_dir": output_dir,
    "per_device_train_batch_size": per_device_train_batch_size,
    "per_device_eval_batch_size": per_device_eval_batch_size,
    "gradient_accumulation_steps": gradient_accumulation_steps,
    "learning_rate": learning_rate,
    "weight_decay": lambda bench, face: follows_adam(bench, face, weight_decay=0.3),
    "adam_beta1": lambda bench, face: follows_adam(bench, face, adam_beta1=0.5),
    "adam_beta2": lambda bench, face: follows_adam(bench, face, adam_beta2=0.7),
    "adam_epsilon": lambda bench, face: follows_adam(bench, face, adam_epsilon=0.1),
    "num_train_epochs": num_train_epochs,
    "max_steps": max_steps,
    "lr_scheduler_type": lr_scheduler_type,
    "lr_scheduler_kwargs": lr_scheduler_kwargs,
    "warmup_ratio": warmup_ratio,
    "warmup_steps": warmup_steps,
    "optim": optim,
    "eval_strategy": eval_strategy,
    "eval_steps": eval_steps,
    "seed": seed,
    "data_seed": data_seed,
    "bf16": bf16,
    "gradient_checkpointing": gradient_checkpointing,
    "gradient_checkpointing_kwargs": gradient_checkpointing_kwargs,
    "num_layers_unfrozen": num_layers_unfrozen,
    "mesh": mesh,
    "dataloader_drop_last": dataloader_drop_last,
    "pad_to_multiple_of": pad_to_multiple_of,
    "model_init_kwargs": model_init_kwargs,
    "push_to_hub": push_to_hub,
    "hub_model_id": hub_model_id,
    "hub_token": hub_token,
    "hub_private_repo": hub_private_repo,
    "hub_revision": hub_revision,
    "hub_strategy": hub_strategy,
}


@pytest.mark.parametrize("face", [*OFFLINE, *ONLINE])
@pytest.mark.parametrize("field", TABLE)
def test_the_field_acts_on_every_trainer(field: str, face: str, bench: Bench) -> None:
    TABLE[field](bench, face)


@pytest.mark.parametrize("face", FACES)
def test_the_loop_gets_the_config_itself(face: str, bench: Bench) -> None:
    """So what test_loop_fields.py shows of the loop holds for each trainer."""
    trainer = bench.trainer(face)
    assert trainer._loop.args is trainer.args
