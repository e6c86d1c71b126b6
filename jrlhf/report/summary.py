"""The table of a comparison: one row per measure, with its paired test, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jrlhf.report import statistics
from jrlhf.report.judge import words
from jrlhf.report.schema import Evaluation

SIGNIFICANT = 0.01  # the judge's rise must be this far beyond chance
_NBSP = "\N{NO-BREAK SPACE}"  # a wrapped line keeps "p < 0.0001" together
DIVERSE = 0.8  # distinct-2 must keep this share of its value before


class Row(NamedTuple):
    """One measure. `low`, `high` and `p` are None where no pairs exist (corpus statistics)."""

    key: str
    label: str
    note: str
    before: float
    after: float
    change: float
    low: float | None
    high: float | None
    p: float | None
    digits: int = 2


class Summary(NamedTuple):
    """All rows and what they mean.

    Attributes:
        rows: in the order of the table.
        judged: the row of the independent judge, None without judges.
        improved: the judge's mean rose, beyond chance.
        diverse: distinct-2 kept at least `DIVERSE` of its value.
        verdict: one sentence with both.
        prompts: number of held-out prompts.
    """

    rows: tuple[Row, ...]
    judged: Row | None
    improved: bool
    diverse: bool
    verdict: str
    prompts: int

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "improved": self.improved,
            "diverse": self.diverse,
            "verdict": self.verdict,
            "rows": [row._asdict() for row in self.rows],
        }


JUDGE_LABELS = {"naive_bayes": "Independent judge, P(positive)", "vader": "VADER compound"}


def summarize(evaluation: Evaluation) -> Summary:
    """Computes every row from the raw numbers of an evaluation."""
    samples = evaluation.samples
    before = [sample.before for sample in samples]
    after = [sample.after for sample in samples]

    def paired(key: str, label: str, note: str, x: Sequence[float], y: Sequence[float]) -> Row:
        result = statistics.compare(x, y)
        return Row(key, label, note, *result[:6])

    rows = [
        paired(
            f"judge/{name}",
            JUDGE_LABELS.get(name, name),
            evaluation.judges.get(name, ""),
            [item.judges[name] for item in before],
            [item.judges[name] for item in after],
        )
        for name in before[0].judges
    ]
    judged = rows[0] if rows else None
    reward = paired(
        "reward",
        "Reward model's score",
        "the score that training maximises, of prompt and completion",
        [item.reward for item in before],
        [item.reward for item in after],
    )
    kl = paired(
        "kl",
        f"KL to {evaluation.before}, nats per completion",
        f"sum of log {evaluation.after} − log {evaluation.before} over the tokens that "
        f"{evaluation.after} sampled, averaged over the prompts",
        [item.kl for item in before],
        [item.kl for item in after],
    )._replace(p=None)  # zero before by definition: there is nothing to test
    length = paired(
        "tokens",
        "Tokens per completion",
        "end-of-text token included",
        [item.tokens for item in before],
        [item.tokens for item in after],
    )._replace(digits=1)
    variety = _distinct_row([item.text for item in before], [item.text for item in after])
    rows += [reward, kl, *_perplexity_rows(evaluation), variety, length]
    improved = judged is not None and judged.change > 0 and (judged.p or 0.0) < SIGNIFICANT
    diverse = variety.after >= DIVERSE * variety.before
    verdict = _verdict(judged, variety, len(samples))
    return Summary(tuple(rows), judged, improved, diverse, verdict, len(samples))


def _distinct_row(before: Sequence[str], after: Sequence[str]) -> Row:
    one = statistics.distinct([words(text) for text in before])
    two = statistics.distinct([words(text) for text in after])
    note = "different word pairs over all word pairs of all completions: falls when texts repeat"
    return Row("distinct_2", "Distinct-2", note, one, two, two - one, None, None, None, 3)


def _perplexity_rows(evaluation: Evaluation) -> list[Row]:
    texts = [text for text in evaluation.texts if text.tokens]
    if not texts:
        return []
    tokens = sum(text.tokens for text in texts)
    one = math.exp(sum(text.before for text in texts) / tokens)
    two = math.exp(sum(text.after for text in texts) / tokens)
    # The test is on the loss per token of each text: perplexity itself is one number per corpus.
    per_text = [
        np.array([getattr(t, arm) / t.tokens for t in texts]) for arm in ("before", "after")
    ]
    p = statistics.sign_flip_p(per_text[1] - per_text[0])
    label = f"Perplexity of {len(texts)} held-out texts"
    note = "exp of the mean loss per token; p from the paired losses of the texts; lower is better"
    return [Row("perplexity", label, note, one, two, two - one, None, None, p, 1)]


def _verdict(judged: Row | None, variety: Row, prompts: int) -> str:
    kept = f"distinct-2 is {share(variety)} of before"
    if judged is None:
        return f"No independent judge was asked; {kept}."
    p = format_p(judged.p).replace(" ", _NBSP)
    one, two = fixed(judged.before, 2), fixed(judged.after, 2)
    moved = f"{'rose' if judged.change > 0 else 'fell'} from {one} to {two}"
    if one == two:
        moved = f"stayed at {one}"
    significant = judged.p is not None and judged.p < SIGNIFICANT
    certainty = "" if significant else ", which chance alone could do"
    return (
        f"The independent judge's mean {moved} on {prompts} held-out prompts "
        f"(paired sign-flip test, p{_NBSP}{p}){certainty}; {kept}."
    )


def fixed(value: float, digits: int) -> str:
    """So many decimals, and never a minus before zeros."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def signed(value: float, digits: int) -> str:
    """As `fixed`, with a plus before everything that is not negative."""
    text = fixed(value, digits)
    return text if text.startswith("-") else f"+{text}"


def share(row: Row) -> str:
    """after / before as a percentage."""
    return f"{row.after / row.before:.0%}" if row.before else "–"


def format_p(p: float | None) -> str:
    """A p-value as people print it, with its relation."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 1e-4 else f"= {p:.4f}" if p < 0.01 else f"= {p:.2f}"
