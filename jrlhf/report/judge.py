"""Judges of sentiment that training never sees.

A policy that learns from a reward model may learn to please that model only. So the report asks
judges of another kind: a naive-Bayes bag of words and word pairs, fitted on reviews that no
training stage reads, and VADER, a lexicon written by hand. Both are simple enough to be known
completely, and neither shares a weight, a token or a training row with the reward model.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jrlhf.errors import DataError, EmptyDatasetError, MissingColumnError, MissingFileError

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[!?]")


class Judge(NamedTuple):
    """A named scorer: `score(texts)` gives one float per text, higher is more positive."""

    name: str
    description: str
    score: Callable[[Sequence[str]], np.ndarray]


def words(text: str) -> list[str]:
    """Lower-case words, with `!` and `?` as words of their own."""
    return _WORD.findall(text.lower())


def features(text: str) -> set[str]:
    """The words and neighbouring word pairs of a text, each counted once.

    Presence works better than counts for sentiment (Wang and Manning, "Baselines and Bigrams",
    2012), and it keeps a policy from raising its score by repeating one good word.
    """
    tokens = words(text)
    return {*tokens, *(f"{a} {b}" for a, b in itertools.pairwise(tokens))}


class NaiveBayes:
    """A binarised multinomial naive-Bayes classifier with calibrated probabilities.

    The weight of a feature is the difference of its smoothed log-frequencies in the two classes:
    w = log (n₊ + α) / (N₊ + αV) − log (n₋ + α) / (N₋ + αV), and a text's log-odds are the sum over
    its features. These log-odds are much too sure of themselves, since features are not
    independent; a line a·x + b fitted on rows kept aside turns them into P(positive).

    Attributes:
        weights: feature -> weight, in nats.
        slope: a of the calibration.
        offset: b of the calibration.
        accuracy: on the rows kept aside.
    """

    def __init__(
        self, weights: dict[str, float], *, slope: float, offset: float, accuracy: float
    ) -> None:
        self.weights = weights
        self.slope = slope
        self.offset = offset
        self.accuracy = accuracy

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[int],
        *,
        smoothing: float = 1.0,
        min_count: int = 2,
        calibrate_on: float = 0.1,
        calibrate_words: int | None = None,
    ) -> NaiveBayes:
        """Fits on texts with labels 1 (positive) and 0 (negative).

        Args:
            texts: the reviews; their order is kept, so shuffle them before.
            labels: one of 0, 1 per text.
            smoothing: α, the pseudo-count of every feature in each class.
            min_count: features in fewer texts than this are dropped.
            calibrate_on: share of rows, from the end, kept aside for the calibration.
            calibrate_words: cut those rows to so many words, the length that will be judged.

        Raises:
            DataError: lengths differ, a label is not 0 or 1, or a class is missing.
        """
        _check_rows(texts, labels)
        keep = len(texts) - max(2, round(len(texts) * calibrate_on))
        counts = (Counter[str](), Counter[str]())
        for text, label in zip(texts[:keep], labels[:keep], strict=True):
            counts[label].update(features(text))
        weights = _log_ratios(counts, smoothing=smoothing, min_count=min_count)
        aside = [_first_words(text, calibrate_words) for text in texts[keep:]]
        truth = np.asarray(labels[keep:], dtype=np.float64)
        raw = _log_odds(weights, aside)
        slope, offset = _calibrate(raw, truth)
        right = (slope * raw + offset > 0) == (truth > 0.5)
        return cls(weights, slope=slope, offset=offset, accuracy=float(right.mean()))

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """P(positive) of each text, float64 in (0, 1)."""
        return _sigmoid(self.slope * _log_odds(self.weights, texts) + self.offset)


def naive_bayes(path: str | Path, *, calibrate_words: int | None = None) -> Judge:
    """Fits the naive-Bayes judge on a JSONL file with columns text and label (0 or 1)."""
    rows = _read_rows(Path(path))
    model = NaiveBayes.fit(
        [row["text"] for row in rows],
        [row["label"] for row in rows],
        calibrate_words=calibrate_words,
    )
    length = f"their first {calibrate_words} words" if calibrate_words else "whole reviews"
    return Judge(
        "naive_bayes",
        f"P(positive) by a naive-Bayes bag of words and word pairs, fitted on {len(rows):,} reviews"
        f" that no stage trained on; {model.accuracy:.1%} right on {length} kept aside",
        model.score,
    )


def vader() -> Judge | None:
    """The VADER judge, or None where the optional package vaderSentiment is not installed."""
    if importlib.util.find_spec("vaderSentiment") is None:
        return None
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def score(texts: Sequence[str]) -> np.ndarray:
        return np.array([analyzer.polarity_scores(text)["compound"] for text in texts], np.float64)

    return Judge("vader", "VADER's compound score, from -1 to 1: a sentiment lexicon", score)


def sentiment_judges(path: str | Path, *, calibrate_words: int | None = None) -> list[Judge]:
    """The naive-Bayes judge fitted on `path`, and VADER where it is installed."""
    optional = vader()
    first = naive_bayes(path, calibrate_words=calibrate_words)
    return [first] if optional is None else [first, optional]


def _log_ratios(
    counts: tuple[Counter[str], Counter[str]], *, smoothing: float, min_count: int
) -> dict[str, float]:
    negative, positive = counts
    kept = [f for f in negative | positive if negative[f] + positive[f] >= min_count]
    minus = np.array([negative[f] for f in kept], np.float64) + smoothing
    plus = np.array([positive[f] for f in kept], np.float64) + smoothing
    ratios = np.log(plus / plus.sum()) - np.log(minus / minus.sum())
    return dict(zip(kept, ratios.tolist(), strict=True))


def _log_odds(weights: dict[str, float], texts: Iterable[str]) -> np.ndarray:
    # fsum: the order of a set's elements differs between processes, its exact sum does not.
    return np.array(
        [math.fsum(weights.get(f, 0.0) for f in features(text)) for text in texts], np.float64
    )


def _calibrate(raw: np.ndarray, truth: np.ndarray, *, rounds: int = 50) -> tuple[float, float]:
    """Logistic regression of the truth on one number, by Newton's method (Platt scaling).

    Platt's targets (n₊+1)/(n₊+2) and 1/(n₋+2) keep the maximum finite on separable rows.
    """
    positives, negatives = truth.sum(), (1 - truth).sum()
    target = np.where(truth > 0.5, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    scale = max(float(np.abs(raw).max()), 1e-12)
    x = np.stack([raw / scale, np.ones_like(raw)], axis=1)
    line = np.zeros(2)
    for _ in range(rounds):
        p = _sigmoid(x @ line)
        gradient = x.T @ (p - target)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        line = line - step * min(1.0, 10.0 / max(float(np.abs(step).max()), 1e-12))
    return float(line[0] / scale), float(line[1])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _first_words(text: str, count: int | None) -> str:
    return text if count is None else " ".join(text.split()[:count])


def _check_rows(texts: Sequence[str], labels: Sequence[int]) -> None:
    if len(texts) != len(labels):
        raise DataError(f"the judge got {len(texts)} texts and {len(labels)} labels.")
    if set(labels) != {0, 1}:
        raise DataError(
            f"the judge needs labels 0 and 1, both of them; the rows have {sorted(set(labels))}."
        )
    if len(texts) < 8:
        raise DataError(f"the judge needs at least 8 rows, got {len(texts)}.")


def _read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise MissingFileError(f"the judge's rows are not at {path}.")
    with path.open(encoding="utf-8") as lines:
        try:
            rows = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise DataError(f"{path} is not JSONL with columns text and label: {error}") from error
    if not rows:
        raise EmptyDatasetError(f"{path} has no rows.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} is a {type(row).__name__}, expected an object.")
        if missing := [name for name in ("text", "label") if name not in row]:
            raise MissingColumnError(f"{path}:{number} lacks the column {missing[0]}.")
    return rows
