"""The naive-Bayes judge against its formula, and its habits."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jrlhf.errors import DataError, EmptyDatasetError, MissingColumnError, MissingFileError
from jrlhf.report import judge

GOOD = ["wonderful", "great", "moving", "superb", "loved"]
BAD = ["awful", "boring", "dull", "terrible", "hated"]
PLAIN = ["the", "film", "was", "and", "with", "story", "actors", "a"]


def reviews(count: int, *, seed: int = 0, noise: float = 0.2) -> tuple[list[str], list[int]]:
    rng = random.Random(seed)
    texts, labels = [], []
    for i in range(count):
        label = i % 2
        words = [rng.choice(PLAIN) for _ in range(12)]
        for _ in range(3):
            right = rng.random() > noise
            words.insert(rng.randrange(len(words)), rng.choice(GOOD if right == label else BAD))
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


def test_weights_are_smoothed_log_ratios() -> None:
    texts = ["good film", "good story", "bad film", "bad bad", "good", "bad"] + ["x", "y"]
    labels = [1, 1, 0, 0, 1, 0] + [1, 0]  # the last two are kept aside
    model = judge.NaiveBayes.fit(texts, labels, smoothing=1.0, min_count=1, calibrate_on=0.25)
    # By hand. Positive presence counts: good 3, film 1, story 1, two pairs. Negative: bad 3,
    # film 1, "bad film", "bad bad". Vocabulary: good bad film story + 4 pairs = 8.
    positives, negatives = 3 + 1 + 1 + 2 + 8, 3 + 1 + 1 + 1 + 8
    assert model.weights["good"] == pytest.approx(math.log(4 / positives) - math.log(1 / negatives))
    assert model.weights["film"] == pytest.approx(math.log(2 / positives) - math.log(2 / negatives))
    assert model.weights["bad bad"] == pytest.approx(
        math.log(1 / positives) - math.log(2 / negatives)
    )


def test_the_judge_is_right_and_calibrated_on_texts_it_never_saw() -> None:
    model = judge.NaiveBayes.fit(*reviews(2000))
    texts, labels = reviews(2000, seed=1)
    p, truth = model.score(texts), np.array(labels)
    # Bayes' optimum of this noise: at least two of three words point the right way.
    optimum = 0.8**3 + 3 * 0.8**2 * 0.2
    assert np.mean((p > 0.5) == truth) > optimum - 0.03
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = (p >= low) & (p < low + 0.25)
        if chosen.sum() > 50:
            assert abs(p[chosen].mean() - truth[chosen].mean()) < 0.1


def test_calibration_solves_the_logistic_equations() -> None:
    rng = np.random.default_rng(0)
    raw = rng.normal(scale=20, size=300)
    truth = (rng.random(300) < 1 / (1 + np.exp(-0.1 * raw - 0.4))).astype(float)
    slope, offset = judge._calibrate(raw, truth)
    ones, zeros = truth.sum(), (1 - truth).sum()
    target = np.where(truth == 1, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    residual = 1 / (1 + np.exp(-slope * raw - offset)) - target
    assert abs(residual.sum()) < 1e-6
    assert abs((residual * raw).sum()) < 1e-4


def test_calibration_stays_finite_on_separable_rows() -> None:
    slope, offset = judge._calibrate(np.array([-3.0, -2.0, 2.0, 3.0]), np.array([0.0, 0, 1, 1]))
    assert 0 < slope < 100
    assert abs(offset) < 1e-6


def test_rows_kept_aside_are_cut_to_the_length_that_is_judged() -> None:
    texts, labels = reviews(400)
    padded = [
        f"{text} {GOOD[0] if label else BAD[0]}" for text, label in zip(texts, labels, strict=True)
    ]
    # The last word gives the label away: only an uncut calibration can use it.
    whole = judge.NaiveBayes.fit(padded, labels)
    cut = judge.NaiveBayes.fit(padded, labels, calibrate_words=4)
    assert whole.accuracy > cut.accuracy + 0.1
    assert cut.weights == whole.weights


def test_repeating_a_good_word_gains_nothing() -> None:
    model = judge.NaiveBayes.fit(*reviews(400))
    once, many = model.score(["great great", "great great great great great"])
    assert once == many


def test_unknown_words_say_nothing() -> None:
    model = judge.NaiveBayes.fit(*reviews(400))
    empty, unknown = model.score(["", "zyzzyva quux"])
    assert empty == unknown


def test_scores_do_not_depend_on_the_hash_seed(tmp_path: Path, repository: Path) -> None:
    texts, labels = reviews(120)
    path = tmp_path / "rows.jsonl"
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    script = (
        "import sys; from jrlhf.report import judge\n"
        "print(judge.naive_bayes(sys.argv[1]).score([sys.argv[2]])[0].hex())"
    )
    seen = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(repository)}
        command = [sys.executable, "-c", script, str(path), texts[0]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seen.add(done.stdout)
    assert len(seen) == 1


def test_words_keep_apostrophes_and_exclamations() -> None:
    assert judge.words("I DIDN'T like it!!") == ["i", "didn't", "like", "it", "!", "!"]
    assert judge.features("so so good") == {"so", "good", "so so", "so good"}


def test_judges_of_a_file_describe_themselves(tmp_path: Path) -> None:
    texts, labels = reviews(200)
    path = tmp_path / "rows.jsonl"
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, *rest = judge.sentiment_judges(path, calibrate_words=10)
    assert first.name == "naive_bayes"
    assert "200 reviews" in first.description
    assert "first 10 words" in first.description
    assert first.score(["great superb loved"])[0] > 0.5 > first.score(["dull awful"])[0]
    assert [item.name for item in rest] in ([], ["vader"])


def test_vader_reads_sentiment() -> None:
    pytest.importorskip("vaderSentiment")
    vader = judge.vader()
    assert vader is not None
    good, bad = vader.score(["A wonderful, great film!", "A horrible, awful film."])
    assert -1 <= bad < 0 < good <= 1


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["a"] * 10, [1] * 10),
        (["a"] * 10, [0, 1] * 4),
        (["a"] * 4, [0, 1] * 2),
        (["a"] * 9, [2] * 9),
    ],
)
def test_rows_that_teach_nothing_are_refused(texts: list[str], labels: list[int]) -> None:
    with pytest.raises(DataError):
        judge.NaiveBayes.fit(texts, labels)


def test_a_missing_an_empty_and_a_narrow_file_have_their_errors(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(MissingFileError):
        judge.naive_bayes(path)
    path.write_text("\n")
    with pytest.raises(EmptyDatasetError):
        judge.naive_bayes(path)
    path.write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(MissingColumnError, match=":2 lacks the column label"):
        judge.naive_bayes(path)
