from __future__ import annotations

import numpy as np
import pytest

from jrlhf.algos import DPO


def oracle(logps, batch, beta, smoothing):
    """Σ over pairs of the loss, float64, in loops."""
    total = 0.0
    for row, ref, mask in zip(logps, batch["ref_logps"], batch["mask"], strict=True):
        chosen, rejected = (
            sum(float(row[i, t]) - float(ref[i, t]) for t in np.flatnonzero(mask[i]))
            for i in range(2)
        )
        margin = beta * (chosen - rejected)
        clean, flipped = np.logaddexp(0, -margin), np.logaddexp(0, margin)
        total += ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)
    return total


@pytest.mark.parametrize(
    "algorithm", [DPO(), DPO(beta=0.4), DPO(beta=0.4, loss_type="robust", label_smoothing=0.2)]
)
def test_loss_and_gradient_are_those_of_the_definition(
    examples, evaluate, rng, central_differences, algorithm
):
    out, batch = examples["dpo"](rng)
    loss, gradient = evaluate(algorithm, out, batch)

    def reference(logps):
        return oracle(logps, batch, algorithm.beta, algorithm.label_smoothing)

    np.testing.assert_allclose(loss.objective.total, reference(out["logps"]), rtol=1e-5)
    assert loss.objective.weight == len(batch["mask"])
    expected = central_differences(reference, out["logps"])
    np.testing.assert_allclose(gradient["logps"], expected, rtol=1e-4, atol=1e-6)


def test_a_policy_equal_to_its_reference_has_loss_log_two_and_rewards_zero(examples, evaluate, rng):
    out, batch = examples["dpo"](rng)
    loss, gradient = evaluate(DPO(beta=0.3), out, {**batch, "ref_logps": out["logps"]})
    np.testing.assert_allclose(loss.objective.value(), np.log(2), rtol=1e-6)
    found = {name: float(metric.value()) for name, metric in loss.metrics.items()}
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert found[name] == 0.0
    # There the gradient is -β/2 on every chosen token and +β/2 on every rejected one.
    sign = np.array([-1.0, 1.0])[None, :, None]
    np.testing.assert_allclose(gradient["logps"], 0.15 * sign * batch["mask"], rtol=1e-5)


def test_swapping_the_sides_flips_every_reward(examples, evaluate, rng):
    out, batch = examples["dpo"](rng)
    swapped = [
        {k: v[:, ::-1] if v.ndim > 1 else v for k, v in part.items()} for part in (out, batch)
    ]
    a, b = (evaluate(DPO(), *arrays)[0].metrics for arrays in ((out, batch), swapped))
    np.testing.assert_allclose(a["rewards/chosen"], b["rewards/rejected"], rtol=1e-6)
    np.testing.assert_allclose(
        a["rewards/margins"].total, -b["rewards/margins"].total, rtol=1e-4, atol=1e-5
    )
    assert a["rewards/accuracies"].value() == 1 - b["rewards/accuracies"].value()


def test_trls_list_of_one_loss_is_that_loss():
    assert DPO(loss_type=["sigmoid"]) == DPO()
