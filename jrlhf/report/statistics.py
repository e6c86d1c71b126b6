"""Statistics of paired comparisons, in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EXACT_UP_TO = 16  # pairs: 2^16 sign patterns are enumerated, more are drawn
DRAWS = 100_000


class Paired(NamedTuple):
    """A paired comparison.

    Attributes:
        before: mean of the first member of each pair.
        after: mean of the second.
        change: mean of the differences, after - before.
        low: lower end of the 95 % bootstrap interval of `change`.
        high: upper end.
        p: two-sided p-value of the sign-flip test.
        pairs: how many pairs.
    """

    before: float
    after: float
    change: float
    low: float
    high: float
    p: float
    pairs: int


def compare(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> Paired:
    """Compares two measurements of the same items.

    Args:
        before: one number per item.
        after: one number per item, in the same order.
        seed: of the random sign patterns and of the bootstrap.
    """
    x, y = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not x.size:
        raise ValueError(f"paired samples need one shape [n], got {x.shape} and {y.shape}")
    difference = y - x
    low, high = bootstrap_interval(difference, seed=seed)
    return Paired(
        before=float(x.mean()),
        after=float(y.mean()),
        change=float(difference.mean()),
        low=low,
        high=high,
        p=sign_flip_p(difference, seed=seed),
        pairs=x.size,
    )


def sign_flip_p(differences: Sequence[float] | np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation (sign-flip) test of a mean of zero.

    If treatment changes nothing, each difference is as likely as its negative; p is the share of
    sign patterns whose |mean| reaches the one seen. All 2^n patterns are enumerated up to
    `EXACT_UP_TO` pairs. Beyond, `DRAWS` random patterns are drawn and the observed one counts as
    one more, so p is valid and never 0.

    References:
        Fisher, "The Design of Experiments", 1935, §21.
        Phipson and Smyth, "Permutation P-values Should Never Be Zero", 2010.
    """
    d = np.asarray(differences, np.float64)
    # Rounding must not break ties between patterns that are equal on paper.
    reached = abs(d.sum()) * (1 - 1e-12) - 1e-300
    if d.size <= EXACT_UP_TO:
        patterns = (np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1
        sums = (1.0 - 2.0 * patterns) @ d
        return float(np.mean(np.abs(sums) >= reached))
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(10):
        signs = rng.integers(0, 2, size=(DRAWS // 10, d.size), dtype=np.int8) * 2.0 - 1.0
        hits += int(np.sum(np.abs(signs @ d) >= reached))
    return (hits + 1) / (DRAWS + 1)


def bootstrap_interval(
    differences: np.ndarray, *, seed: int = 0, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean."""
    d = np.asarray(differences, np.float64)
    rng = np.random.default_rng([seed, 1])
    means = np.concatenate(
        [d[rng.integers(0, d.size, size=(draws // 10, d.size))].mean(axis=1) for _ in range(10)]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def distinct(texts: Sequence[Sequence[str]], n: int = 2) -> float:
    """Distinct-n: different n-grams over all n-grams of a set of texts, 0 where there are none.

    References:
        Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016.
    """
    total = 0
    seen: set[tuple[str, ...]] = set()
    for words in texts:
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else 0.0
