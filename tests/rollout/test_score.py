"""`outputs` against the definition: log softmax of the whole logits, one position earlier."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jrlhf.rollout import score
from jrlhf.rollout.score import Actor
from jrlhf.types import Loss, Mean, Outputs
from tests.rollout.conftest import VOCAB, Model, model, padded

LENGTHS = (16, 4, 1, 9)
N = 6
outputs = jax.jit(score.outputs, static_argnums=0, static_argnames=("temperature", "entropy"))


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return padded([draw.integers(3, VOCAB, n).tolist() for n in LENGTHS], 16)


@pytest.fixture(scope="module")
def slots() -> np.ndarray:
    """Completions of the rows: full, none left, none possible, in the middle."""
    table = np.zeros((4, N), np.int32)
    table[0] = np.arange(10, 16)
    table[1, :1] = [3]
    table[3, :3] = [4, 5, 6]
    return table


def definition(policy: Model, batch: dict, temperature: float) -> dict[str, np.ndarray]:
    """Float64 numbers per position [b s] from the whole array of logits."""
    hidden = jax.jit(policy.net.hidden)(policy.params, batch["ids"])
    values = np.asarray(policy.net.values(policy.params, hidden), np.float64)[:, :-1]
    hidden = np.asarray(hidden, np.float64)
    head = np.asarray(policy.net.head(policy.params), np.float64)
    logits = hidden @ head / temperature
    peak = logits.max(-1, keepdims=True)
    log_p = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    before = log_p[:, :-1]
    ids = batch["ids"][:, 1:, None]
    first = ((0, 0), (1, 0))
    real = np.arange(16)[None, :] < batch["lengths"][:, None]
    real[:, 0] = False
    found = {
        "logps": np.take_along_axis(before, ids, 2)[..., 0],
        "entropy": -(np.exp(before) * before).sum(-1),
        "correct": (before.argmax(-1) == ids[..., 0]).astype(np.float64),
        "values": values,
    }
    return {name: np.where(real, np.pad(x, first), 0.0) for name, x in found.items()}


def test_outputs_are_log_softmax_of_the_position_before(
    policy: Model, batch: dict, slots: np.ndarray
) -> None:
    wanted = definition(policy, batch, 0.7)
    found = outputs(policy.net, policy.params, batch, temperature=0.7, entropy=True)
    chosen = {**batch, "slots": slots}
    picked = outputs(policy.net, policy.params, chosen, temperature=0.7, entropy=True)
    for name, numbers in wanted.items():
        array = getattr(found, name)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, numbers, atol=2e-5, err_msg=name)
        numbers = np.where(slots > 0, np.take_along_axis(numbers, slots, 1), 0.0)
        np.testing.assert_allclose(getattr(picked, name), numbers, atol=2e-5, err_msg=name)
        assert not np.asarray(getattr(picked, name))[slots == 0].any()
    assert found.scores is None


def test_slots_beyond_a_row_are_exactly_zero(policy: Model, batch: dict) -> None:
    beyond = {**batch, "slots": np.full((4, N), 15, np.int32)}
    found = outputs(policy.net, policy.params, beyond, temperature=0.7, entropy=True)
    assert np.asarray(found.logps)[0].all()
    assert not np.asarray(found.logps)[1:].any()


def test_pairs_are_rows(policy: Model, batch: dict) -> None:
    rows = outputs(policy.net, policy.params, batch)
    pairs = {name: x.reshape(2, 2, *x.shape[1:]) for name, x in batch.items()}
    found = outputs(policy.net, policy.params, pairs)
    np.testing.assert_array_equal(found.logps.reshape(4, 16), rows.logps)
    assert found.values.shape == (2, 2, 16)


def test_packed_documents_score_as_if_alone(policy: Model, batch: dict) -> None:
    alone = outputs(policy.net, policy.params, batch)
    ids, lengths = batch["ids"], batch["lengths"]
    packed = {
        "ids": np.concatenate([ids[1, :4], ids[3, :9], [7, 7, 7]])[None],
        "segments": np.repeat([1, 2, 0], [4, 9, 3])[None].astype(np.int32),
        "positions": np.concatenate([np.arange(4), np.arange(9), np.zeros(3)])[None].astype(int),
        "lengths": np.asarray([13], np.int32),
    }
    found = np.asarray(outputs(policy.net, policy.params, packed).logps[0])
    np.testing.assert_allclose(found[:4], alone.logps[1, : lengths[1]], atol=2e-5)
    np.testing.assert_allclose(found[4:13], alone.logps[3, : lengths[3]], atol=2e-5)
    assert found[0] == 0
    assert found[4] == 0
    assert not found[13:].any()


def test_a_separate_value_net_speaks_instead_of_the_value_head(policy: Model, batch: dict) -> None:
    other = model(5, value_head=True)
    actor = Actor(policy.net, 1.0, other.net)
    trainable = {"policy": policy.params, "value": other.params}
    found = jax.jit(actor.outputs)(trainable, {"policy": {}, "value": {}}, batch)
    wanted = outputs(other.net, other.params, batch).values
    np.testing.assert_allclose(found.values, wanted, atol=2e-5)
    own = outputs(policy.net, policy.params, batch)
    np.testing.assert_allclose(found.logps, own.logps, atol=2e-5)
    assert not np.allclose(found.values, own.values)


def test_classifiers_score_the_last_real_token(classifier: Model, batch: dict) -> None:
    found = outputs(classifier.net, classifier.params, batch)
    assert found.logps is None
    assert found.scores.shape == (4,)
    hidden = jax.jit(classifier.net.hidden)(classifier.params, batch["ids"])
    ends = np.asarray(hidden)[np.arange(4), np.asarray(LENGTHS) - 1]
    wanted = ends @ np.asarray(classifier.params["score"]["kernel"])
    np.testing.assert_allclose(found.scores, wanted[:, 0], atol=2e-5)


class Ratio:
    """A loss that is nothing but its ratio."""

    def loss(self, out: Outputs, batch: dict) -> Loss:
        ratio = jax.numpy.exp(out.logps - batch["old_logps"])
        return Loss(Mean(ratio.sum(), jax.numpy.float32(ratio.size)), {})


def test_fresh_means_the_policy_is_its_own_old_policy(policy: Model, batch: dict) -> None:
    actor = Actor(policy.net)
    wrong = {**batch, "old_logps": np.full((4, 16), -1.0, np.float32)}

    @jax.jit
    def total(params: Any, fresh: Any) -> Any:
        return actor.loss(Ratio(), params, {}, {**wrong, "fresh": fresh}).objective.total

    value, slope = jax.jit(jax.value_and_grad(total))(policy.params, np.float32(1))
    assert value == 4 * 16
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(slope)) > 1e-3
    assert total(policy.params, np.float32(0)) != 4 * 16
