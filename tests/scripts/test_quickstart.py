"""The stages of the quick start, with a program in jrlhf's place that only leaves files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import quickstart

# Writes down its words, leaves what the verb would leave, and fails where a file says so.
STAND_IN = """
import json, pathlib, sys
verb, words = sys.argv[1], sys.argv[2:]
fields = dict(zip([w[2:] for w in words[::2]], words[1::2]))
here = pathlib.Path(__file__).parent
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps([verb, fields]) + "\\n")
if "output_dir" in fields:
    output = pathlib.Path(fields["output_dir"])
    (output / "checkpoint-5").mkdir(parents=True, exist_ok=True)
    if (here / f"fail-{verb}").exists():
        sys.exit(3)
    (output / "model").mkdir(exist_ok=True)
elif verb == "report":
    (pathlib.Path(fields["run_dir"]) / "report.html").write_text("page")
elif "output" in fields:
    pathlib.Path(fields["output"]).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(fields["output"]).write_text("{}")
"""


class Bench:
    """A run directory whose data are there already, and the calls that were made in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"
        (root / "stand_in.py").write_text(STAND_IN)
        (self.run / "data").mkdir(parents=True)
        for name in ("sft", "pairs", "prompts", "heldout_prompts", "heldout_reviews", "judge"):
            (self.run / "data" / f"{name}.jsonl").write_text("{}\n")
        asked = {"seed": 0, "model": "tiny", "full": False, "model_path": "tiny"}
        (self.run / "quickstart.json").write_text(json.dumps(asked))
        ledger = quickstart.Ledger(self.run / "stages.json")
        ledger.record("data", [["split", "imdb", "0"]], 1.0)

    def start(self, *words: str) -> list[tuple[str, dict]]:
        """Runs with --resume unless a stage is named; returns the calls of this run."""
        log = self.root / "calls.jsonl"
        log.unlink(missing_ok=True)
        options = [*words, "--model", "tiny", "--output", str(self.run)]
        program = (sys.executable, str(self.root / "stand_in.py"))
        try:
            quickstart.main(options, program=program)
        finally:
            lines = log.read_text().splitlines() if log.exists() else []
            self.calls = [(verb, fields) for verb, fields in map(json.loads, lines)]
        return self.calls


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_stages_run_in_order_and_feed_each_other(bench: Bench) -> None:
    calls = bench.start("--resume")
    assert [verb for verb, _ in calls] == ["sft", "reward", "ppo", "evaluate", "report"]
    fields = dict(calls)
    sft = str(bench.run / "sft" / "model")
    assert fields["sft"]["model_name_or_path"] == "tiny"
    assert fields["reward"]["model_name_or_path"] == sft
    assert fields["ppo"]["model_name_or_path"] == fields["evaluate"]["before"] == sft
    assert fields["evaluate"]["after"] == str(bench.run / "ppo" / "model")
    assert all(fields[verb]["seed"] == "0" for verb in ("sft", "reward", "ppo", "evaluate"))


def test_finished_stages_are_skipped(bench: Bench) -> None:
    bench.start("--resume")
    assert bench.start("--resume") == []
    (bench.run / "report.html").unlink()
    assert [verb for verb, _ in bench.start("--resume")] == ["evaluate", "report"]


def test_a_failed_stage_goes_on_from_its_checkpoint(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    (bench.root / "fail-reward").touch()
    with pytest.raises(SystemExit) as stopped:
        bench.start("--resume")
    assert stopped.value.code == 2
    assert "exit code 3" in capfd.readouterr().err
    (bench.root / "fail-reward").unlink()
    calls = bench.start("--resume")
    assert [verb for verb, _ in calls] == ["reward", "ppo", "evaluate", "report"]
    assert calls[0][1]["resume_from_checkpoint"] == "true"
    assert "resume_from_checkpoint" not in calls[1][1]


def test_one_stage_alone_starts_afresh_and_makes_later_ones_old(bench: Bench) -> None:
    bench.start("--resume")
    calls = bench.start("--stage", "reward")
    assert [verb for verb, _ in calls] == ["reward"]
    assert "resume_from_checkpoint" not in calls[0][1]
    assert [verb for verb, _ in bench.start("--resume")] == ["ppo", "evaluate", "report"]


def test_a_stage_without_its_input_says_what_is_missing(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.start("--stage", "ppo")
    assert f"needs {bench.run / 'sft' / 'model'}" in capfd.readouterr().err
    assert bench.calls == []


@pytest.mark.parametrize(
    ("policy", "verbs"), [("grpo", ["grpo"]), ("dpo", ["label", "dpo"]), ("ppo", ["ppo"])]
)
def test_the_policy_may_be_trained_in_three_ways(
    bench: Bench, policy: str, verbs: list[str]
) -> None:
    bench.start("--resume", "--stage", "sft")
    bench.start("--resume", "--stage", "reward")
    calls = bench.start("--resume", "--policy", policy)
    assert [verb for verb, _ in calls] == [*verbs, "evaluate", "report"]
    assert dict(calls)["evaluate"]["after"] == str(bench.run / policy / "model")


def test_other_options_do_not_mix_with_an_old_run(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.start("--resume", "--seed", "7")
    assert "seed 0 there, 7 now" in capfd.readouterr().err


def test_a_directory_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(SystemExit):
        quickstart.main(["--output", str(tmp_path), "--model", "tiny"])
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_starting_over_removes_what_the_quick_start_made_and_nothing_else(bench: Bench) -> None:
    (bench.run / "notes.txt").write_text("mine")
    asked = {"seed": 0, "model": "tiny", "full": False}
    assert quickstart.start(bench.run, asked, again=False) == "tiny"
    assert sorted(path.name for path in bench.run.iterdir()) == ["notes.txt", "quickstart.json"]


def test_full_and_short_runs_read_other_files(bench: Bench) -> None:
    def configs(full: bool) -> set[str]:
        stages = quickstart.plan(bench.run, model="m", seed=0, full=full, policy="ppo")
        words = [word for stage in stages for command in stage.commands for word in command]
        return {word for word in words if word.endswith(".yaml")}

    assert configs(True)
    assert not configs(True) & configs(False)


def test_every_config_of_the_plan_exists(bench: Bench) -> None:
    for policy in quickstart.POLICIES:
        for full in (False, True):
            for stage in quickstart.plan(bench.run, model="m", seed=0, full=full, policy=policy):
                for command in stage.commands:
                    for word in command:
                        assert not word.endswith(".yaml") or Path(word).is_file(), word
