"""What every algorithm of the registry must satisfy, whatever its formula.

A new algorithm is enrolled by an example batch in `conftest.py` and a row in `OTHER_VALUES`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.algos import ALGORITHMS
from jrlhf.errors import ConfigError
from jrlhf.types import Loss, Max, Mean, Min, Outputs

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def merge(losses: list[Loss]) -> Loss:
    def add(a: Loss, b: Loss) -> Loss:
        metrics = {k: a.metrics[k].merge(b.metrics[k]) for k in a.metrics}
        return Loss(a.objective.merge(b.objective), metrics)

    return functools.reduce(add, losses)


def take(part: dict, rows: Any) -> dict:
    return {k: v[rows] for k, v in part.items()}


def assert_same(a: Loss, b: Loss) -> None:
    assert a.metrics.keys() == b.metrics.keys()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), a, b)


def test_every_algorithm_has_an_example(examples):
    assert set(examples) == set(ALGORITHMS)


def test_a_loss_is_sums_and_weights_of_float32_scalars(case, evaluate):
    loss, _ = evaluate(case.algorithm, *case.example())
    for metric in (loss.objective, *loss.metrics.values()):
        assert isinstance(metric, (Mean, Max, Min))
        for x in metric:
            assert (x.shape, x.dtype) == ((), jnp.float32)
            assert np.isfinite(x)
    assert isinstance(loss.objective, Mean)
    assert loss.objective.weight > 0


@pytest.mark.parametrize("slices", [2, 4])
def test_micro_batches_add_up_to_the_whole(case, evaluate, slices):
    out, batch = case.example()
    whole, gradient = evaluate(case.algorithm, out, batch)
    parts = [slice(i, None, slices) for i in range(slices)]
    found = [evaluate(case.algorithm, take(out, p), take(batch, p)) for p in parts]
    assert_same(merge([loss for loss, _ in found]), whole)
    for name, expected in gradient.items():
        for p, (_, part) in zip(parts, found, strict=True):
            np.testing.assert_allclose(part[name], expected[p], **CLOSE)


def test_the_order_of_rows_does_not_matter(case, evaluate, rng):
    out, batch = case.example()
    whole, gradient = evaluate(case.algorithm, out, batch)
    order = rng.permutation(len(batch["lengths"]))
    shuffled, moved = evaluate(case.algorithm, take(out, order), take(batch, order))
    assert_same(shuffled, whole)
    for name, expected in gradient.items():
        np.testing.assert_allclose(moved[name], expected[order], **CLOSE)


def padded(part: dict, rows: int, columns: int, junk: float, tokens: int) -> dict:
    """More rows of zeros, and more columns of junk on per-token arrays (masks: of zeros)."""
    found = {}
    for name, x in part.items():
        widths = [(0, 0)] * x.ndim
        value = 0.0
        if columns and x.ndim > 1 and x.shape[-1] == tokens:
            widths[-1] = (0, columns)
            value = 0.0 if name == "mask" else junk
        x = np.pad(x, widths, constant_values=value)
        found[name] = np.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1))
    return found


def test_padded_tokens_never_matter_whatever_they_hold(case, evaluate):
    out, batch = case.example()
    tokens = batch["mask"].shape[-1]
    whole, gradient = evaluate(case.algorithm, out, batch)
    pad = functools.partial(padded, rows=0, columns=2, tokens=tokens)
    found, wider = evaluate(case.algorithm, pad(out, junk=0.0), pad(batch, junk=50.0))
    assert_same(found, whole)
    for name, expected in gradient.items():
        if expected.shape[-1] == tokens:
            np.testing.assert_array_equal(wider[name][..., tokens:], 0.0)
            wider[name] = wider[name][..., :tokens]
        np.testing.assert_allclose(wider[name], expected, **CLOSE)


def test_padded_rows_never_matter(case, evaluate):
    out, batch = case.example()
    whole, gradient = evaluate(case.algorithm, out, batch)
    pad = functools.partial(padded, rows=3, columns=0, junk=0.0, tokens=-1)
    found, longer = evaluate(case.algorithm, pad(out), pad(batch))
    assert_same(found, whole)
    for name, expected in gradient.items():
        np.testing.assert_array_equal(longer[name][len(expected) :], 0.0)
        np.testing.assert_allclose(longer[name][: len(expected)], expected, **CLOSE)


def test_a_batch_of_padding_alone_has_no_loss_no_weight_and_no_gradient(case, evaluate):
    out, batch = case.example()
    blank = [{k: np.zeros_like(v) for k, v in part.items()} for part in (out, batch)]
    loss, gradient = evaluate(case.algorithm, *blank)
    assert (float(loss.objective.total), float(loss.objective.weight)) == (0.0, 0.0)
    for name in gradient:
        np.testing.assert_array_equal(gradient[name], 0.0)
    for metric in loss.metrics.values():
        assert not np.isnan(metric.value())


def test_masked_tokens_get_no_gradient_and_all_others_a_finite_one(case, evaluate):
    out, batch = case.example()
    extreme = {k: v * 20 for k, v in out.items()}  # log-probs down to about -100
    batch = {**batch, "old_logps": extreme["logps"]} if "old_logps" in batch else batch
    _, gradient = evaluate(case.algorithm, extreme, batch)
    for found in gradient.values():
        assert np.isfinite(found).all()
        if found.shape == batch["mask"].shape:
            np.testing.assert_array_equal(found[batch["mask"] == 0], 0.0)


def test_only_what_the_loss_says_it_needs_is_needed(case, evaluate):
    """Entropy and top-1 flags are for logging: without them the objective is the same."""
    out, batch = case.example()
    whole, _ = evaluate(case.algorithm, out, batch)
    bare = {k: v for k, v in out.items() if k not in ("entropy", "correct")}
    loss, _ = evaluate(case.algorithm, bare, batch)
    np.testing.assert_allclose(loss.objective, whole.objective, rtol=1e-6)
    assert set(loss.metrics) <= set(whole.metrics)


def test_a_missing_output_is_an_error_that_names_it(case):
    _, batch = case.example()
    with pytest.raises(TypeError, match=r"Outputs\.(logps|scores)"):
        case.algorithm.loss(Outputs(), batch)


# For every field, a value other than its default (or the variant's) that must change something.
OTHER_VALUES: dict[str, dict[str, Any]] = {
    "sft": {},  # its one field has one value, and refuses any other
    "reward": {"center_rewards_coefficient": 0.3},
    "dpo": {"beta": 0.7, "loss_type": "robust", "label_smoothing": 0.3},
    "ppo": {
        "kl_coef": 0.2,
        "kl_estimator": "k3",
        "adap_kl_ctrl": True,
        "target": 1.0,
        "horizon": 10.0,
        "cliprange": 0.05,
        "cliprange_value": 0.05,
        "vf_coef": 1.0,
        "gamma": 0.5,
        "lam": 0.5,
        "whiten_rewards": True,
        "missing_eos_penalty": 2.0,
    },
    "grpo": {
        "num_generations": 2,
        "max_completion_length": 100,
        "beta": 0.5,
        "epsilon": 0.05,
        "epsilon_high": 0.9,
        "delta": 1.25,
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "scale_rewards": "none",
        "mask_truncated_completions": True,
        "use_bias_correction_kl": False,
    },
}
# Fields that act only beside another one.
NEEDS = {
    ("dpo", "loss_type"): {"label_smoothing": 0.2, "loss_type": "robust"},
    ("dpo", "label_smoothing"): {"loss_type": "robust"},
    ("ppo", "target"): {"adap_kl_ctrl": True},
    ("ppo", "horizon"): {"adap_kl_ctrl": True},
    ("grpo", "max_completion_length"): {"loss_type": "dr_grpo"},
    ("grpo", "use_bias_correction_kl"): {"beta": 0.5},
}
FIELDS = [(name, f.name) for name, cls in ALGORITHMS.items() for f in dataclasses.fields(cls)]
ONE_VALUE = {("sft", "loss_type")}


@pytest.mark.parametrize(("name", "field"), [f for f in FIELDS if f not in ONE_VALUE])
def test_every_field_acts(name, field, examples, evaluate):
    fixed = {"num_generations": 4, "delta": 3.0} if name == "grpo" else {}
    before = {**fixed, **NEEDS.get((name, field), {})}
    if (name, field) == ("dpo", "loss_type"):
        before = {}
    after = {**before, **NEEDS.get((name, field), {}), field: OTHER_VALUES[name][field]}
    out, batch = examples[name](np.random.default_rng(0))

    def numbers(settings: dict) -> Any:
        algorithm = ALGORITHMS[name](**settings)
        credited = {k: jnp.array(v) for k, v in batch.items()}
        if hasattr(algorithm, "credit"):
            credited = jax.jit(algorithm.credit)(credited)
        loss, _ = evaluate(algorithm, out, credited)
        coefficient = 0.0
        if hasattr(algorithm, "next_kl_coef"):
            coefficient = float(algorithm.next_kl_coef(0.1, 2.0, episodes=100.0))
        return float(loss.objective.total), float(loss.objective.weight), coefficient

    assert not np.allclose(numbers(after), numbers(before), rtol=1e-4)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_hyperparameters_are_frozen_hashable_and_given_by_name(name):
    algorithm = ALGORITHMS[name]()
    assert hash(algorithm) == hash(ALGORITHMS[name]())
    field = dataclasses.fields(algorithm)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(algorithm, field, None)
    with pytest.raises(TypeError):
        ALGORITHMS[name]("positional")


REFUSED = [
    ("sft", {"loss_type": "nil"}, "nll"),
    ("reward", {"center_rewards_coefficient": -1.0}, "negative"),
    ("dpo", {"beta": 0.0}, "positive"),
    ("dpo", {"loss_type": "sigmiod"}, "sigmoid"),
    ("dpo", {"loss_type": ["sigmoid", "robust"]}, "mixtures"),
    ("dpo", {"label_smoothing": 0.1}, "robust"),
    ("dpo", {"label_smoothing": 0.5, "loss_type": "robust"}, r"\[0, 0.5\)"),
    ("ppo", {"gamma": 1.5}, r"\[0, 1\]"),
    ("ppo", {"cliprange": 0.0}, "positive"),
    ("ppo", {"kl_coef": -0.1}, "negative"),
    ("ppo", {"horizon": 0.0}, "positive"),
    ("grpo", {"num_generations": 1}, "at least 2"),
    ("grpo", {"epsilon": 1.0}, r"\(0, 1\)"),
    ("grpo", {"epsilon_high": 0.0}, "positive"),
    ("grpo", {"beta": -0.1}, "negative"),
    ("grpo", {"delta": 1.2}, "1 \\+ epsilon_high"),
    ("grpo", {"max_completion_length": 0}, "positive"),
]


@pytest.mark.parametrize(("name", "settings", "hint"), REFUSED)
def test_a_bad_value_is_an_error_that_names_field_and_rule(name, settings, hint):
    with pytest.raises(ConfigError, match=hint) as error:
        ALGORITHMS[name](**settings)
    assert next(iter(settings)) in str(error.value)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "grpo"])
def test_fields_have_trls_names_and_defaults(name):
    import trl

    config = {
        "sft": "SFTConfig",
        "reward": "RewardConfig",
        "dpo": "DPOConfig",
        "grpo": "GRPOConfig",
    }
    theirs = {f.name: f for f in dataclasses.fields(getattr(trl, config[name]))}
    for field in dataclasses.fields(ALGORITHMS[name]):
        assert field.name in theirs
        default = theirs[field.name].default
        if default is dataclasses.MISSING:
            default = theirs[field.name].default_factory()
        ours = ALGORITHMS[name](**{field.name: default})
        assert getattr(ours, field.name) == getattr(ALGORITHMS[name](), field.name)
