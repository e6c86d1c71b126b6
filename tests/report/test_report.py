"""Summary, curves, charts, page and table of a run."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from jrlhf import report
from jrlhf.errors import DataError, MissingFileError
from jrlhf.report import charts, statistics
from jrlhf.report.curves import Curve, find_stages, read_stage
from jrlhf.report.judge import words
from jrlhf.report.schema import Evaluation
from jrlhf.report.summary import fixed, format_p, signed


def rows(evaluation: Evaluation) -> dict[str, report.Row]:
    return {row.key: row for row in report.summarize(evaluation).rows}


def test_rows_are_means_over_the_prompts(evaluation: Evaluation) -> None:
    found = rows(evaluation)
    for key, read in {
        "reward": lambda c: c.reward,
        "kl": lambda c: c.kl,
        "tokens": lambda c: c.tokens,
        "judge/naive_bayes": lambda c: c.judges["naive_bayes"],
    }.items():
        before = np.mean([read(sample.before) for sample in evaluation.samples])
        after = np.mean([read(sample.after) for sample in evaluation.samples])
        np.testing.assert_allclose(found[key][3:6], [before, after, after - before], atol=1e-12)


def test_perplexity_weighs_every_token_alike(evaluation: Evaluation) -> None:
    row = rows(evaluation)["perplexity"]
    assert row.before == pytest.approx(math.exp((30.0 + 5.0) / (10 + 2)))
    assert row.after == pytest.approx(math.exp((31.0 + 6.0) / (10 + 2)))
    assert row.p == 2 / 2**8  # eight differences of one sign: all + or all -


def test_distinct_is_counted_on_the_completions_alone(evaluation: Evaluation) -> None:
    texts = [words(sample.after.text) for sample in evaluation.samples]
    assert rows(evaluation)["distinct_2"].after == statistics.distinct(texts, 2)


def test_kl_has_no_p_value_since_it_is_zero_before(evaluation: Evaluation) -> None:
    assert rows(evaluation)["kl"].p is None


@pytest.mark.parametrize(
    ("options", "improved", "diverse", "says"),
    [
        ({"lift": 0.3}, True, True, "rose"),
        ({"lift": 0.0}, False, True, "which chance alone could do"),
        ({"lift": 0.0, "noise": 0.0}, False, True, "stayed at"),
        ({"lift": -0.3}, False, True, "fell"),
        ({"words": "same"}, True, False, "rose"),
        ({"judges": False}, False, True, "No independent judge"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(
    evaluations: Callable[..., Evaluation], options: dict, improved: bool, diverse: bool, says: str
) -> None:
    summary = report.summarize(evaluations(**options))
    assert (summary.improved, summary.diverse) == (improved, diverse)
    assert says in summary.verdict


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (1e-5, "< 0.0001"), (0.0042, "= 0.0042"), (0.3, "= 0.30")]
)
def test_p_values_are_printed_with_their_relation(p: float | None, text: str) -> None:
    assert format_p(p) == text


def test_zeros_have_no_minus() -> None:
    assert [fixed(v, 2) for v in (-0.001, 0.0, -0.01, 1.005e3)] == [
        "0.00",
        "0.00",
        "-0.01",
        "1005.00",
    ]
    assert [signed(v, 1) for v in (-0.04, 0.04, -0.06, 2.0)] == ["+0.0", "+0.0", "-0.1", "+2.0"]


def test_the_terminal_table_is_aligned_and_names_everything(evaluation: Evaluation) -> None:
    summary = report.summarize(evaluation)
    from jrlhf.report.terminal import table

    lines = table(evaluation, summary).splitlines()
    head = lines[2]
    assert "24 held-out prompts" in head
    ends = [match.end() for match in re.finditer(r"sft|ppo|change", head)]
    for row, line in zip(summary.rows, lines[4:], strict=False):
        assert line.startswith(row.label)
        for end in ends:
            assert line[end - 1] != " "
            assert line[end : end + 2] == "  "
    assert max(map(len, lines)) <= 110


def write(directory: Path, text: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def test_curves_keep_the_last_record_of_a_step_and_drop_what_is_no_number(tmp_path: Path) -> None:
    text = (
        '{"step": 1, "loss": 3.0, "note": "a", "flag": true}\n'
        '{"step": 2, "loss": NaN, "objective/kl": 0.5}\n\n'
        '{"step": 2, "loss": 2.5, "epoch": 0.1}\n'
        '{"step": 1, "loss": 9.0}\n'
        '{"step": 3, "lo'
    )
    stage = read_stage("sft", write(tmp_path, text))
    assert stage.curves == (
        Curve("objective/kl", (2.0,), (0.5,)),
        Curve("loss", (1.0, 2.0), (9.0, 2.5)),
    )


@pytest.mark.parametrize("text", ['{"step": 1}\n{"st\n{"step": 2}\n', '{"loss": 1}\n', "[1]\n"])
def test_damaged_metrics_are_named_with_their_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"metrics.jsonl:[12]"):
        read_stage("sft", write(tmp_path, text))


def test_stages_come_in_the_order_in_which_they_ran(tmp_path: Path) -> None:
    for age, name in enumerate(["ppo", "reward", "sft"]):
        path = write(tmp_path / name, '{"step": 1, "loss": 1}\n') / "metrics.jsonl"
        os.utime(path, (1000 - age, 1000 - age))
    assert list(find_stages(tmp_path)) == ["sft", "reward", "ppo"]
    assert list(find_stages(tmp_path / "ppo")) == ["ppo"]


@pytest.mark.parametrize("size", [1, 2, 30, 5000])
@pytest.mark.parametrize("kind", ["constant", "zero", "line", "tiny", "huge"])
def test_charts_are_valid_and_stay_inside(size: int, kind: str) -> None:
    steps = np.arange(1, size + 1, dtype=float)
    values = {
        "constant": np.full(size, 2.5),
        "zero": np.zeros(size),
        "line": steps * 0.1 - 1,
        "tiny": steps * 1e-9,
        "huge": steps * 1e12,
    }[kind]
    svg = charts.line_chart(Curve("loss <&>", tuple(steps), tuple(values)))
    tree = ElementTree.fromstring(svg)
    width, height = (float(x) for x in tree.attrib["viewBox"].split()[2:])
    assert "nan" not in svg
    assert "inf" not in svg
    count = 0
    for node in tree.iter("polyline"):
        for point in node.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height
            count += 1
    assert count <= 2 * charts.MOST_POINTS + 2


def test_a_moving_average_keeps_lines_and_ends() -> None:
    line = np.linspace(-3, 5, 200)
    np.testing.assert_allclose(charts.smooth(line), line, atol=1e-12)
    noisy = np.random.default_rng(0).normal(size=200)
    assert charts.smooth(noisy).std() < 0.5 * noisy.std()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (1e-7, 3e-7), (0.999, 1.001)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6
    span = high - low
    assert all(low - 1e-9 * span <= tick <= high + 1e-9 * span for tick in found)
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12000, "12k"), (1.41e-5, "1.41e-5"), (0.0521, "0.0521"), (-1234.0, "-1234"),
     (2e9, "2e9")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert charts.number(value) == text


class Balance(HTMLParser):
    """Checks that every tag is closed, and collects tags and attributes."""

    VOID = {"meta", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_loads_nothing_and_runs_nothing(run: Path) -> None:
    (run / "stages.json").write_text('{"sft": {"seconds": 125.4}}')
    html = report.build(run).path.read_text(encoding="utf-8")
    page = Balance()
    page.feed(html)
    assert not page.open
    for tag, attributes in page.seen:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href")]
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    # sft has 60 points: both curves raw and smoothed; ppo has 5: both once.
    assert html.count("<polyline") == 2 * 2 + 2
    assert "2 min 05 s" in html
    assert "A test of the report" in html


def test_what_a_model_wrote_stays_text(run: Path, evaluation: Evaluation) -> None:
    raw = json.loads((run / "evaluation.json").read_text())
    evil = "<script>alert(1)</script><img src=x onerror=y> \x00 \ud800 \" ' & </p></main>"
    raw["samples"][0]["after"]["text"] = evil
    raw["samples"][0]["prompt"] = evil
    raw["title"] = raw["before"] = evil
    raw["settings"] = {evil: evil}
    raw["judges"] = {"naive_bayes": evil}
    (run / "evaluation.json").write_text(json.dumps(raw))
    result = report.build(run)
    page = Balance()
    page.feed(result.path.read_text(encoding="utf-8"))
    assert not page.open
    assert not {"script", "img"} & {tag for tag, _ in page.seen}
    result.table.encode("utf-8")


def test_a_run_without_an_evaluation_shows_its_curves(run: Path) -> None:
    (run / "evaluation.json").unlink()
    result = report.build(run / "sft", output=run / "pages" / "sft.html")
    assert result.path == run / "pages" / "sft.html"
    assert (result.table, result.summary) == ("", None)
    assert "<polyline" in result.path.read_text(encoding="utf-8")


def test_the_numbers_of_the_table_are_written_as_json(run: Path, evaluation: Evaluation) -> None:
    result = report.build(run)
    numbers = json.loads((run / "report.json").read_text())
    assert result.summary is not None
    assert numbers == json.loads(json.dumps(result.summary.to_json()))
    assert numbers["improved"] is True
    assert {row["key"] for row in numbers["rows"]} == set(rows(evaluation))


def test_a_directory_with_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="neither"):
        report.build(tmp_path)
    with pytest.raises(MissingFileError, match="stage sft"):
        report.build(tmp_path, stages={"sft": tmp_path})


def test_stages_may_be_named(run: Path) -> None:
    html = report.build(run, stages={"Alignment": run / "ppo"}).path.read_text(encoding="utf-8")
    assert "<h3>Alignment" in html
    assert "<h3>sft" not in html
