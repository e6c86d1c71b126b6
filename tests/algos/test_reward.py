from __future__ import annotations

import numpy as np
import pytest

from jrlhf.algos import Reward


def oracle(scores, margin, c):
    scores = np.asarray(scores, np.float64)
    difference = scores[:, 0] - scores[:, 1]
    return np.logaddexp(0, margin - difference) + c * (scores[:, 0] + scores[:, 1]) ** 2


@pytest.mark.parametrize("coefficient", [None, 0.1])
@pytest.mark.parametrize("with_margin", [True, False])
def test_loss_and_gradient_are_those_of_the_definition(
    examples, evaluate, rng, central_differences, coefficient, with_margin
):
    out, batch = examples["reward"](rng)
    margin = batch["margin"] if with_margin else np.zeros(len(batch["margin"]))
    if not with_margin:
        del batch["margin"]
    algorithm = Reward(center_rewards_coefficient=coefficient)
    loss, gradient = evaluate(algorithm, out, batch)

    def reference(scores):
        return oracle(scores, margin, coefficient or 0.0).sum()

    np.testing.assert_allclose(loss.objective.total, reference(out["scores"]), rtol=1e-5)
    assert loss.objective.weight == len(margin)
    expected = central_differences(reference, out["scores"])
    np.testing.assert_allclose(gradient["scores"], expected, rtol=1e-4, atol=1e-6)


def test_without_centring_only_the_difference_of_the_two_scores_matters(examples, evaluate, rng):
    out, batch = examples["reward"](rng)
    before, gradient = evaluate(Reward(), out, batch)
    shifted, _ = evaluate(Reward(), {**out, "scores": out["scores"] + 5.0}, batch)
    np.testing.assert_allclose(shifted.objective.total, before.objective.total, rtol=1e-4)
    np.testing.assert_allclose(gradient["scores"].sum(axis=1), 0.0, atol=1e-6)


def test_a_pair_that_beats_its_margin_by_far_is_left_alone(evaluate):
    out = {"scores": np.array([[50.0, -50.0]], np.float32)}
    batch = {"lengths": np.array([[3, 3]])}
    loss, gradient = evaluate(Reward(), out, batch)
    assert float(loss.objective.total) < 1e-20
    np.testing.assert_allclose(gradient["scores"], 0.0, atol=1e-20)


def test_metrics_count_real_pairs_only(evaluate):
    out = {"scores": np.array([[2.0, 1.0], [-3.0, 0.5], [99.0, -99.0]], np.float32)}
    batch = {"lengths": np.array([[3, 4], [2, 2], [0, 0]])}
    metrics = evaluate(Reward(), out, batch)[0].metrics
    found = {name: float(metric.value()) for name, metric in metrics.items()}
    assert found == {
        "accuracy": 0.5,
        "margin": (1.0 - 3.5) / 2,
        "mean_reward": (2 + 1 - 3 + 0.5) / 4,
        "min_reward": -3.0,
        "max_reward": 2.0,
    }
