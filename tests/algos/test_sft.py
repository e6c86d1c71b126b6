from __future__ import annotations

import numpy as np

from jrlhf.algos import SFT


def test_the_loss_is_the_mean_nll_of_trained_tokens_and_its_gradient_minus_one(
    examples, evaluate, rng
):
    out, batch = examples["sft"](rng)
    loss, gradient = evaluate(SFT(), out, batch)
    mask = batch["mask"]
    kept = out["logps"][mask > 0].astype(np.float64)
    np.testing.assert_allclose(loss.objective.value(), -kept.mean(), rtol=1e-6)
    np.testing.assert_array_equal(gradient["logps"], -mask)
    for metric, source in (("entropy", "entropy"), ("mean_token_accuracy", "correct")):
        expected = out[source][mask > 0].mean()
        np.testing.assert_allclose(loss.metrics[metric].value(), expected, rtol=1e-6)
        np.testing.assert_array_equal(gradient[source], 0.0)


def test_a_long_row_counts_for_its_tokens_and_not_as_one_row(evaluate):
    mask = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    out = {"logps": np.array([[-8.0, 0, 0, 0], [-1, -1, -1, -1]], np.float32)}
    loss, _ = evaluate(SFT(), out, {"mask": mask, "lengths": np.array([1, 4])})
    np.testing.assert_allclose(loss.objective.value(), (8 + 4) / 5)
