"""The report as one HTML file that needs nothing else: style and charts inline, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from jrlhf.report import charts
from jrlhf.report.curves import Curve, Stage
from jrlhf.report.schema import Completion, Evaluation, Sample
from jrlhf.report.summary import JUDGE_LABELS, Row, Summary, share
from jrlhf.report.terminal import cells, plain

FIRST_CURVES = 6  # per stage; the others are folded
FIRST_SAMPLES = 8
_SHORT = {
    "judge/naive_bayes": "Independent judge",
    "judge/vader": "VADER",
    "reward": "Reward model",
    "perplexity": "Perplexity",
}
# Nothing may be loaded or run: what a model wrote stays text even if escaping had a hole.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(
    *,
    title: str,
    evaluation: Evaluation | None,
    summary: Summary | None,
    stages: Sequence[Stage],
    seconds: Mapping[str, float],
) -> str:
    """Builds the page.

    Args:
        title: heading where there is no evaluation, which brings its own.
        evaluation: the comparison, or None for curves only.
        summary: its rows; None exactly when `evaluation` is.
        stages: training stages in the order in which they ran.
        seconds: wall time of a stage by its name, where known.
    """
    parts = []
    if evaluation is not None and summary is not None:
        title = evaluation.title
        parts += [
            _header(title, evaluation, summary),
            _table(evaluation, summary),
            _scatters(evaluation),
        ]
    else:
        parts.append(f"<header><p class=kicker>jrlhf report</p><h1>{text(title)}</h1></header>")
    parts += [_stages(stages, seconds)]
    if evaluation is not None:
        parts += [_samples(evaluation), _settings(evaluation)]
    style = resources.files("jrlhf.report").joinpath("style.css").read_text(encoding="utf-8")
    # The charts' texts are escaped but not cleaned, so the page as a whole is.
    return plain(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n<footer>Written by jrlhf. The page is self-contained: it loads nothing and runs no "
        "script.</footer>\n</main></body></html>\n"
    )


def text(value: object) -> str:
    """Text that is safe in HTML, whatever a model has written."""
    return escape(str(value), quote=True)


def _header(title: str, evaluation: Evaluation, summary: Summary) -> str:
    if summary.judged is None:
        pill = ""
    elif summary.improved and summary.diverse:
        pill = '<span class="pill good">Improved, no collapse</span>'
    elif summary.improved:
        pill = '<span class="pill warn">Improved, but texts lost variety</span>'
    else:
        pill = '<span class="pill bad">Not shown to improve</span>'
    tiles = "".join(_tile(row) for row in summary.rows if row.key != "tokens")
    arms = f"{text(evaluation.before)} → {text(evaluation.after)}"
    return (
        f"<header><p class=kicker>jrlhf report · {arms}</p>"
        f"<h1>{text(title)}</h1><p class=verdict>{pill}{text(summary.verdict)}</p>"
        f"<div class=tiles>{tiles}</div></header>"
    )


def _tile(row: Row) -> str:
    before, after, change, interval, p = cells(row)
    more = f"{text(change)}" + (f" · p {text(p)}" if row.p is not None else "")
    if row.key == "distinct_2":
        more = f"{text(share(row))} of before"
    elif row.key == "kl":
        more = text(interval)
    name = _SHORT.get(row.key, row.label.split(",")[0])
    return (
        f'<div class="card tile"><div class=name>{text(name)}</div><div class=value>'
        f"<s>{text(before)} →</s> {text(after)}</div><div class=more>{more}</div></div>"
    )


def _table(evaluation: Evaluation, summary: Summary) -> str:
    head = "".join(
        f"<th>{text(name)}</th>"
        for name in ("", evaluation.before, evaluation.after, "change", "95 % interval", "p")
    )
    body = []
    for row in summary.rows:
        before, after, *rest = cells(row)
        others = "".join(f"<td>{text(cell)}</td>" for cell in rest)
        body.append(
            f"<tr><td>{text(row.label)}<small>{text(row.note)}</small></td>"
            f"<td>{text(before)}</td><td class=after>{text(after)}</td>{others}</tr>"
        )
    return (
        "<h2>Before and after</h2><p class=note>Means over the same "
        f"{summary.prompts} held-out prompts. p is two-sided, from the paired sign-flip "
        "permutation test; the interval is a bootstrap of the mean difference.</p>"
        f'<div class="card wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _scatters(evaluation: Evaluation) -> str:
    samples = evaluation.samples
    measures = [
        (
            JUDGE_LABELS.get(name, name),
            [sample.before.judges[name] for sample in samples],
            [sample.after.judges[name] for sample in samples],
        )
        for name in samples[0].before.judges
    ]
    measures.append(
        (
            "Reward model's score",
            [s.before.reward for s in samples],
            [s.after.reward for s in samples],
        )
    )
    figures = []
    for label, before, after in measures:
        higher = sum(b > a for a, b in zip(before, after, strict=True))
        plot = charts.paired_scatter(
            before,
            after,
            names=(evaluation.before, evaluation.after),
            labels=[sample.prompt for sample in samples],
        )
        figures.append(
            f"<figure class=card><figcaption>{text(label)}<span>{higher} of {len(samples)} higher"
            f"</span></figcaption>{plot}</figure>"
        )
    return (
        "<h2>Prompt by prompt</h2><p class=note>One dot is one prompt: its score before across, "
        "after upwards. Above the dashed line it rose.</p>"
        f"<div class=scatters>{''.join(figures)}</div>"
    )


def _stages(stages: Sequence[Stage], seconds: Mapping[str, float]) -> str:
    if not stages:
        return ""
    parts = [
        "<h2>Training</h2><p class=note>What each stage logged, by optimizer step. Faint: as "
        "logged. Strong: moving average.</p>"
    ]
    for stage in stages:
        told = []
        if stage.curves:
            told.append(f"{max(int(curve.steps[-1]) for curve in stage.curves):,} steps")
        if stage.name in seconds:
            told.append(_duration(seconds[stage.name]))
        small = f"<small>{text(' · '.join(told))}</small>"
        first = "".join(_figure(curve) for curve in stage.curves[:FIRST_CURVES])
        rest = "".join(_figure(curve) for curve in stage.curves[FIRST_CURVES:])
        parts.append(f"<h3>{text(stage.name)}{small}</h3><div class=grid3>{first}</div>")
        if rest:
            count = len(stage.curves) - FIRST_CURVES
            parts.append(
                f"<details><summary>{count} more curves of {text(stage.name)}</summary>"
                f"<div class=grid3>{rest}</div></details>"
            )
    return "\n".join(parts)


def _figure(curve: Curve) -> str:
    span = f"{charts.number(curve.values[0])} → {charts.number(curve.values[-1])}"
    return (
        f"<figure class=card><figcaption>{text(curve.name)}<span>{text(span)}</span></figcaption>"
        f"{charts.line_chart(curve)}</figure>"
    )


def _samples(evaluation: Evaluation) -> str:
    blocks = [_sample(evaluation, sample) for sample in evaluation.samples]
    first, rest = "".join(blocks[:FIRST_SAMPLES]), "".join(blocks[FIRST_SAMPLES:])
    folded = f"<details><summary>{len(blocks) - FIRST_SAMPLES} more</summary>{rest}</details>"
    return (
        "<h2>Samples, side by side</h2><p class=note>In the order of the held-out file: none were "
        f"picked.</p>{first}{folded if rest else ''}"
    )


def _sample(evaluation: Evaluation, sample: Sample) -> str:
    arms = _arm(evaluation.before, "before", sample.before) + _arm(
        evaluation.after, "after", sample.after
    )
    return (
        f'<div class="card sample"><p class=prompt>{text(sample.prompt)}…</p>'
        f"<div class=arms>{arms}</div></div>"
    )


def _arm(name: str, kind: str, item: Completion) -> str:
    scores = [f"reward <b>{item.reward:.2f}</b>"]
    scores += [
        f"{text(judge.replace('_', ' '))} <b>{value:.2f}</b>"
        for judge, value in item.judges.items()
    ]
    scores.append(f"KL {item.kl:.1f}")
    scores.append(f"{item.tokens} tokens")
    return (
        f'<div class="arm {kind}"><div class=who>{text(name)}</div><p>{text(item.text.strip())}</p>'
        f"<div class=scores>{' · '.join(scores)}</div></div>"
    )


def _settings(evaluation: Evaluation) -> str:
    if not evaluation.settings:
        return ""
    rows = "".join(
        f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in evaluation.settings.items()
    )
    return f'<h2>Settings</h2><div class="card"><dl>{rows}</dl></div>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
