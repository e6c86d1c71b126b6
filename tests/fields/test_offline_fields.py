"""The fields of SFT, reward modelling and DPO alone: what rows and losses they make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.algos import DPO, Reward
from jrlhf.errors import ConfigError, EmptyDatasetError
from jrlhf.types import Outputs
from tests.fields.bench import (
    CONTEXT,
    PAIRS,
    TEXTS,
    Bench,
    dropout_is_turned_off,
    first_batch,
    first_rows,
    router_is_balanced,
    words,
)

Check = Callable[[Bench], None]
CHAT = "{% for m in messages %}{{ 'w50 ' + m['content'] + ' ' }}{% endfor %}"
ASSISTANT = (
    "{% for m in messages %}w50 {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, texts, strict=False)
    ]


def template(text: str = CHAT) -> str:
    Path("chat.jinja").write_text(text)
    return "chat.jinja"


def everything(bench: Bench, face: str, data: Any = None, **fields: Any) -> dict[str, np.ndarray]:
    """All ten rows as one batch, in the order of the dataset."""
    more = {"shuffle_dataset": False} if face == "sft" else {}
    rows = 10 if data is None else len(data)
    return first_batch(
        bench.trainer(face, data=data, per_device_train_batch_size=rows, **more, **fields)
    )


# ------------------------------------------------------------------ SFT


def sft_loss_type(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="loss_type"):
        bench.trainer("sft", loss_type="dft")


def sft_max_length(bench: Bench) -> None:
    natural = everything(bench, "sft")["lengths"]
    np.testing.assert_array_equal(
        everything(bench, "sft", max_length=7)["lengths"], np.minimum(natural, 7)
    )
    assert natural.max() > 7
    long = [{"text": words(*range(100))}]
    assert everything(bench, "sft", long, max_length=None)["lengths"].max() == CONTEXT
    with pytest.raises(ConfigError, match="max_length must be at least 1, got 0"):
        everything(bench, "sft", max_length=0)


def sft_packing(bench: Bench) -> None:
    plain = everything(bench, "sft", max_length=24)
    packed = everything(bench, "sft", max_length=24, packing=True)
    assert "segments" not in plain
    # All tokens are there, in fewer rows of several documents.
    assert packed["lengths"].sum() == plain["lengths"].sum()
    assert (packed["lengths"] > 0).sum() < 6
    assert packed["segments"].max() > 1


def sft_packing_strategy(bench: Bench) -> None:
    long = [{"text": words(*range(20))}]  # and EOS: 21 tokens in rows of 8
    made = {
        strategy: everything(bench, "sft", long * 4, max_length=8, packing=True,
                             packing_strategy=strategy)["lengths"]
        for strategy in ("bfd", "bfd_split")
    }  # fmt: skip
    assert made["bfd"].tolist() == [8] * 4  # the rest is cut off
    assert made["bfd_split"].tolist()[:4] == [8] * 4
    trainers = {
        strategy: bench.trainer("sft", data=long * 4, max_length=8, packing=True,
                                packing_strategy=strategy)._loop.source.loader.rows
        for strategy in ("bfd", "bfd_split", "wrapped")
    }  # fmt: skip
    tokens = {name: sum(len(row["ids"]) for row in rows) for name, rows in trainers.items()}
    assert tokens == {"bfd": 32, "bfd_split": 84, "wrapped": 84}
    # Split documents stay apart where they fit; wrapped ones go on in the next row.
    assert max(len(row["seq_lengths"]) for row in trainers["wrapped"]) == 2
    assert len(trainers["wrapped"]) == 11 < len(trainers["bfd_split"])


def sft_completion_only_loss(bench: Bench) -> None:
    rows = [{"prompt": words(1, 2, 3), "completion": " " + words(4, 5)}] * 2
    trained = {
        value: everything(bench, "sft", rows, completion_only_loss=value)["mask"][0].tolist()
        for value in (None, True, False)
    }
    assert trained[None] == trained[True] == [0, 0, 0, 1, 1, 1, 0, 0]  # and EOS
    assert trained[False] == [0, 1, 1, 1, 1, 1, 0, 0]


def sft_assistant_only_loss(bench: Bench) -> None:
    rows = [{"messages": turns(words(1, 2), words(3, 4))}] * 2
    fields = {"chat_template_path": template(ASSISTANT)}
    trained = {
        value: everything(bench, "sft", rows, assistant_only_loss=value, **fields)["mask"][0]
        for value in (False, True)
    }
    assert trained[False].tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    assert trained[True].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def sft_dataset_text_field(bench: Bench) -> None:
    rows = [{"text": words(1, 2), "review": words(3, 4, 5)}] * 2
    lengths = [
        everything(bench, "sft", rows, dataset_text_field=name)["lengths"][0]
        for name in ("text", "review")
    ]
    assert lengths == [3, 4]  # and EOS


def sft_chat_template_path(bench: Bench) -> None:
    rows = [{"messages": turns(words(1), words(2))}] * 2
    ids = first_rows(bench.trainer("sft", data=rows, chat_template_path=template()))[0]
    assert bench.tokenizer.decode(ids) == f"w50 {words(1)} w50 {words(2)}"


def sft_shuffle_dataset(bench: Bench) -> None:
    wanted = [tuple(bench.tokenizer(row["text"])["input_ids"]) for row in TEXTS[:2]]
    in_order, shuffled = (
        first_rows(bench.trainer("sft", shuffle_dataset=value)) for value in (False, True)
    )
    assert [row[:-1] for row in in_order] == wanted
    assert shuffled != in_order


# ------------------------------------------------------------------ reward modelling


def reward_center_rewards_coefficient(bench: Bench) -> None:
    scores = np.array([[1.0, -0.5], [0.25, 2.0]])
    batch = {"lengths": jnp.array([[3, 2], [4, 4]])}
    plain = np.log1p(np.exp(-(scores[:, 0] - scores[:, 1])))
    for c in (None, 0.3):
        algorithm: Reward = bench.trainer("reward", center_rewards_coefficient=c).args
        loss = algorithm.loss(Outputs(scores=jnp.asarray(scores, jnp.float32)), batch)
        wanted = np.mean(plain + (c or 0) * scores.sum(1) ** 2)
        np.testing.assert_allclose(loss.objective.value(), wanted, rtol=1e-6)


def test_the_trained_loss_is_that_of_the_config(bench: Bench) -> None:
    """Through the model: one pair, whose loss its logged margin and mean reward determine."""
    c, pair = 0.5, {"eval_dataset": PAIRS[:1]}
    metrics = bench.trainer("reward", center_rewards_coefficient=c, given=pair).evaluate()
    total = 2 * metrics["eval_mean_reward"]
    wanted = softplus(-metrics["eval_margin"]) + c * total**2
    assert abs(total) > 1e-3
    np.testing.assert_allclose(metrics["eval_loss"], wanted, rtol=1e-5)


def reward_max_length(bench: Bench) -> None:
    # Answers of 1 to 3 words after prompts of 2, and EOS; the longer pairs are left out whole.
    assert len(bench.trainer("reward")._loop.source.loader.rows) == 10
    kept = bench.trainer("reward", max_length=5)._loop.source.loader.rows
    assert 0 < len(kept) < 10
    assert max(len(row["chosen"]) for row in kept) == 5


def reward_append_eos(bench: Bench) -> None:
    ended = first_rows(bench.trainer("reward"))[0]
    cut_off = first_rows(bench.trainer("reward", append_eos=False))[0]
    assert len(ended) == len(cut_off) + 1


def reward_chat_template_path(bench: Bench) -> None:
    rows = [{"chosen": turns(words(1), words(2)), "rejected": turns(words(1), words(3))}] * 2
    ids = first_rows(bench.trainer("reward", data=rows, chat_template_path=template()))[0]
    assert bench.tokenizer.decode(ids[:4]) == f"w50 {words(1)} w50 {words(2)}"


# ------------------------------------------------------------------ DPO


def dpo_max_length(bench: Bench) -> None:
    natural = everything(bench, "dpo")["lengths"]
    cut = everything(bench, "dpo", max_length=4)["lengths"]
    assert natural.max() > 4
    assert sorted(map(tuple, cut)) == sorted(map(tuple, np.minimum(natural, 4)))


def dpo_truncation_mode(bench: Bench) -> None:
    # Five words of prompt, answers of two words and of one, and EOS: 8 and 7 tokens, cut to 4.
    row = {"prompt": words(*range(5)), "chosen": " " + words(9, 8), "rejected": " " + words(7)}
    with pytest.raises(EmptyDatasetError):
        everything(bench, "dpo", [row], max_length=4, truncation_mode="keep_start")
    batch = everything(bench, "dpo", [row], max_length=4, truncation_mode="keep_end")
    texts = [bench.tokenizer.decode(ids[:4]) for ids in batch["ids"][0]]
    assert texts == [words(4, 9, 8) + " </s>", words(3, 4, 7) + " </s>"]
    assert batch["mask"][0, :, :4].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]


def dpo_loss(bench: Bench, **fields: Any) -> tuple[float, np.ndarray]:
    """The loss of two pairs, and their log-ratios (chosen - rejected) in float64."""
    draw = np.random.default_rng(0)
    logps, ref_logps = -draw.random((2, 2, 2, 3)) * 2
    batch = {"mask": jnp.ones((2, 2, 3)), "lengths": jnp.full((2, 2), 3),
             "ref_logps": jnp.asarray(ref_logps, jnp.float32)}  # fmt: skip
    algorithm: DPO = bench.trainer("dpo", **fields).args
    loss = algorithm.loss(Outputs(logps=jnp.asarray(logps, jnp.float32)), batch)
    ratios = (logps - ref_logps).sum(-1)
    return float(loss.objective.value()), ratios[:, 0] - ratios[:, 1]


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def dpo_beta(bench: Bench) -> None:
    for beta in (0.1, 0.7):
        loss, margin = dpo_loss(bench, beta=beta)
        np.testing.assert_allclose(loss, softplus(-beta * margin).mean(), rtol=1e-5)


def dpo_label_smoothing(bench: Bench) -> None:
    e = 0.2
    loss, margin = dpo_loss(bench, loss_type="robust", label_smoothing=e)
    wanted = ((1 - e) * softplus(-0.1 * margin) - e * softplus(0.1 * margin)) / (1 - 2 * e)
    np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-5)
    with pytest.raises(ConfigError, match="label_smoothing"):
        bench.trainer("dpo", label_smoothing=e)


def dpo_loss_type(bench: Bench) -> None:
    plain, _ = dpo_loss(bench, loss_type=["sigmoid"])
    robust, _ = dpo_loss(bench, loss_type="robust", label_smoothing=0.4)
    assert abs(plain - robust) > 1e-3
    with pytest.raises(ConfigError, match="loss_type"):
        bench.trainer("dpo", loss_type="hinged")


TABLES: dict[str, dict[str, Check]] = {
    "sft": {
        "loss_type": sft_loss_type,
        "max_length": sft_max_length,
        "packing": sft_packing,
        "packing_strategy": sft_packing_strategy,
        "completion_only_loss": sft_completion_only_loss,
        "assistant_only_loss": sft_assistant_only_loss,
        "dataset_text_field": sft_dataset_text_field,
        "chat_template_path": sft_chat_template_path,
        "shuffle_dataset": sft_shuffle_dataset,
        "router_aux_loss_coef": lambda bench: router_is_balanced(bench, "sft"),
    },
    "reward": {
        "disable_dropout": lambda bench: dropout_is_turned_off(bench, "reward"),
        "center_rewards_coefficient": reward_center_rewards_coefficient,
        "append_eos": reward_append_eos,
        "max_length": reward_max_length,
        "chat_template_path": reward_chat_template_path,
    },
    "dpo": {
        "disable_dropout": lambda bench: dropout_is_turned_off(bench, "dpo"),
        "router_aux_loss_coef": lambda bench: router_is_balanced(bench, "dpo"),
        "beta": dpo_beta,
        "loss_type": dpo_loss_type,
        "label_smoothing": dpo_label_smoothing,
        "max_length": dpo_max_length,
        "truncation_mode": dpo_truncation_mode,
    },
}
CASES = [(face, field) for face, table in TABLES.items() for field in table]


@pytest.mark.parametrize(("face", "field"), CASES)
def test_the_field_acts(face: str, field: str, bench: Bench) -> None:
    TABLES[face][field](bench)
