"""The statistics against enumeration, scipy and their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from jrlhf.report.statistics import (
    DRAWS,
    EXACT_UP_TO,
    bootstrap_interval,
    compare,
    distinct,
    sign_flip_p,
)


@pytest.mark.parametrize("seed", range(4))
def test_a_small_sign_flip_test_is_the_enumeration_of_all_patterns(seed: int) -> None:
    d = np.random.default_rng(seed).normal(0.5, 1.0, size=9)
    means = [abs(np.dot(s, d)) for s in itertools.product((1, -1), repeat=d.size)]
    assert sign_flip_p(d) == np.mean(np.array(means) >= abs(d.sum()) - 1e-12)
    oracle = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(d) == pytest.approx(oracle.pvalue, abs=1e-12)


def test_the_drawn_test_agrees_with_the_enumeration() -> None:
    d = np.random.default_rng(3).normal(0.5, 1.0, size=EXACT_UP_TO + 2)
    patterns = (np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1
    exact = np.mean(np.abs((1 - 2 * patterns) @ d) >= abs(d.sum()) - 1e-12)
    assert 0.001 < exact < 0.5
    assert abs(sign_flip_p(d, seed=1) - exact) < 5 * np.sqrt(exact * (1 - exact) / DRAWS)


def test_differences_of_zero_prove_nothing() -> None:
    assert sign_flip_p(np.zeros(5)) == 1.0
    assert sign_flip_p(np.zeros(50)) == 1.0


def test_equal_differences_give_the_smallest_possible_p() -> None:
    assert sign_flip_p(np.ones(10)) == 2 / 2**10  # all + and all -
    assert sign_flip_p(np.ones(200)) == 1 / (DRAWS + 1)  # never zero


def test_the_direction_of_a_change_does_not_matter_to_p() -> None:
    d = np.random.default_rng(0).normal(0.2, 1.0, size=40)
    assert sign_flip_p(d) == sign_flip_p(-d)


def test_p_is_uniform_when_nothing_changed() -> None:
    rng = np.random.default_rng(11)
    p = np.array([sign_flip_p(rng.normal(size=10)) for _ in range(400)])
    for level in (0.05, 0.2, 0.5):
        assert abs(np.mean(p <= level) - level) < 4 * np.sqrt(level * (1 - level) / p.size)


def test_the_bootstrap_interval_is_near_the_normal_one_for_many_items() -> None:
    d = np.random.default_rng(2).exponential(size=400)
    half = 1.96 * d.std() / np.sqrt(d.size)
    low, high = bootstrap_interval(d)
    np.testing.assert_allclose([low, high], [d.mean() - half, d.mean() + half], atol=0.25 * half)


def test_a_comparison_holds_means_and_their_difference() -> None:
    x, y = np.random.default_rng(5).normal(size=(2, 30))
    result = compare(x, y)
    np.testing.assert_allclose(result[:3], [x.mean(), y.mean(), y.mean() - x.mean()])
    assert result.low < result.change < result.high
    assert result.pairs == 30
    assert result.p == sign_flip_p(y - x)


@pytest.mark.parametrize(("x", "y"), [([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])])
def test_unpaired_samples_are_refused(x: list, y: list) -> None:
    with pytest.raises(ValueError, match="one shape"):
        compare(x, y)


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        ([["a", "b", "c"]], 2, 1.0),
        ([["a", "b", "a", "b"]], 2, 2 / 3),  # ab ba ab
        ([["a", "b"], ["a", "b"]], 2, 1 / 2),
        ([["a", "a"], ["b"]], 1, 2 / 3),
        ([["a"]], 2, 0.0),
        ([], 2, 0.0),
    ],
)
def test_distinct_counts_different_over_all(texts: list, n: int, expected: float) -> None:
    assert distinct(texts, n) == expected


def test_distinct_pairs_do_not_cross_texts() -> None:
    assert distinct([["a", "b"], ["c", "d"]], 2) == 1.0
    assert distinct([["b", "c"], ["a", "b"], ["c", "a"]], 2) == 1.0
