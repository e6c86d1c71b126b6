"""Runs the stages of the quick start, each one `jrlhf` verb; see quickstart.sh for the options.

Everything lies in one directory:

    data/               the split of the reviews, disjoint JSONL files
    sft/ reward/ ppo/   one per stage: metrics.jsonl, checkpoints, model/ at its end
    evaluation.json     both policies on the held-out prompts, number by number
    report.html         the page
    quickstart.json     what was asked for; stages.json: what is finished, and its time
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import assets
import quickstart_data

ROOT = Path(__file__).parent.parent
POLICIES = ("ppo", "grpo", "dpo")
DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class Stage(NamedTuple):
    """One stage: its commands, what must be there before it and what is there after it."""

    name: str
    about: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[Path, ...]
    makes: Path


def plan(run: Path, *, model: str, seed: int, full: bool, policy: str) -> list[Stage]:
    """The stages after the data, in order: pure, so that `--resume` can compare commands."""
    data, configs = run / "data", ROOT / "configs" / "quickstart"
    sft, reward, trained = run / "sft" / "model", run / "reward" / "model", run / policy / "model"

    def verb(name: str, config: str | None = None, **fields: object) -> tuple[str, ...]:
        words = ["jrlhf", name]
        if config:
            words += ["--config", str(configs / ("full" if full else ".") / f"{config}.yaml")]
        for field, value in fields.items():
            words += [f"--{field}", str(value)]
        return tuple(words)

    def train(name: str, **fields: object) -> tuple[str, ...]:
        return verb(name, name, **fields, output_dir=run / name, seed=seed)

    against = {"model_name_or_path": sft, "reward_model_path": reward}
    if policy == "dpo":
        pairs = run / "dpo" / "pairs.jsonl"
        last = (
            verb("label", "label", **against, dataset_name=data / "prompts.jsonl",
                 output=pairs, seed=seed),
            train("dpo", model_name_or_path=sft, dataset_name=pairs),
        )  # fmt: skip
    else:
        last = (train(policy, **against, dataset_name=data / "prompts.jsonl"),)
    evaluate = verb(
        "evaluate",
        "evaluate",
        before=sft,
        after=trained,
        reward_model_path=reward,
        prompts=data / "heldout_prompts.jsonl",
        texts=data / "heldout_reviews.jsonl",
        judge_rows=data / "judge.jsonl",
        output=run / "evaluation.json",
        seed=seed,
    )
    return [
        Stage(
            "sft",
            "the language model learns the language of reviews",
            (train("sft", model_name_or_path=model, dataset_name=data / "sft.jsonl"),),
            (data / "sft.jsonl",),
            sft,
        ),
        Stage(
            "reward",
            "a reward model learns which of two reviews people meant kindly",
            (train("reward", model_name_or_path=sft, dataset_name=data / "pairs.jsonl"),),
            (data / "pairs.jsonl", sft),
            reward,
        ),
        Stage(
            policy,
            "the policy learns to please the reward model and to stay near its start",
            last,
            (data / "prompts.jsonl", sft, reward),
            trained,
        ),
        Stage(
            "report",
            "both policies on held-out prompts, and judges that training never saw",
            (evaluate, verb("report", run_dir=run)),
            (data / "judge.jsonl", sft, reward, trained),
            run / "report.html",
        ),
    ]


class Ledger:
    """`stages.json`: which stages are finished, by which commands, in how many seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def finished(self, name: str, commands: Sequence[Sequence[str]], makes: Path) -> bool:
        wanted = [list(command) for command in commands]
        return makes.exists() and self.entries.get(name, {}).get("commands") == wanted

    def record(self, name: str, commands: Sequence[Sequence[str]], seconds: float) -> None:
        # A stage that ran again makes everything after it old.
        self.entries.pop(name, None)
        self.entries[name] = {
            "seconds": round(seconds, 1),
            "commands": [list(command) for command in commands],
        }
        self._write()

    def forget(self, names: Sequence[str]) -> None:
        for name in names:
            self.entries.pop(name, None)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.entries, indent=1) + "\n")
        partial.replace(self.path)


def stop(message: str) -> SystemExit:
    print(f"quickstart: error: {message}", file=sys.stderr)
    return SystemExit(2)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def head(text: str) -> None:
    print(f"\n── {text} " + "─" * max(3, 96 - len(text)), flush=True)


def start(run: Path, asked: dict[str, Any], *, again: bool) -> str:
    """Keeps two different runs out of one directory, and returns the model's path.

    Args:
        run: the directory.
        asked: seed, model and size as the user gave them.
        again: go on with what lies there (--resume, --stage) instead of starting over.
    """
    note = run / "quickstart.json"
    if run.exists() and any(run.iterdir()) and not note.is_file():
        raise stop(f"{run} holds other files; choose another --output.")
    if note.is_file() and again:
        before = json.loads(note.read_text())
        changed = [key for key in asked if before.get(key) != asked[key]]
        if changed:
            told = ", ".join(f"{key} {before.get(key)} there, {asked[key]} now" for key in changed)
            raise stop(f"{run} was made with other options ({told}); choose another --output.")
        return before["model_path"]
    if note.is_file():
        head(f"starting over in {run} (--resume would go on)")
        for name in ("data", "sft", "reward", *POLICIES):
            shutil.rmtree(run / name, ignore_errors=True)
        for name in ("evaluation.json", "report.html", "report.json", "stages.json"):
            (run / name).unlink(missing_ok=True)
    # Settled once: a hub that answers today and not tomorrow must not change the model midway.
    path = str(assets.resolve("smollm2")) if asked["model"] == DEFAULT_MODEL else asked["model"]
    run.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({**asked, "model_path": path}, indent=1) + "\n")
    return path


def prepare_data(run: Path, ledger: Ledger, *, seed: int) -> None:
    key = [["split", "imdb", str(seed)]]
    if ledger.finished("data", key, run / "data" / "judge.jsonl"):
        return
    head("data: reviews, split into files that share no row")
    begun = time.perf_counter()
    counts = quickstart_data.write(assets.resolve("imdb"), run / "data", seed=seed)
    for name, count in counts.items():
        print(f"  {name + '.jsonl':<24}{count:>7,} rows")
    ledger.record("data", key, time.perf_counter() - begun)


def execute(stage: Stage, run: Path, *, resume: bool, program: Sequence[str]) -> None:
    for path in stage.needs:
        if not path.exists():
            raise stop(f"stage {stage.name} needs {path}; run the stages before it first.")
    for command in stage.commands:
        words = [*program, *command[1:]]
        output = run / command[1]
        if resume and command[1] == output.name and any(output.glob("checkpoint-*")):
            words += ["--resume_from_checkpoint", "true"]
        print(f"$ {shlex.join(['jrlhf', *words[len(program) :]])}", flush=True)
        code = subprocess.run(words, check=False).returncode
        if code:
            raise stop(
                f"stage {stage.name} stopped with exit code {code}. "
                f"Once that is mended, --resume --output {run} goes on from here."
            )


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quickstart.sh")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--policy", choices=POLICIES, default="ppo")
    parser.add_argument("--stage", choices=("data", "sft", "reward", *POLICIES, "report"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args(words)
    if options.stage in POLICIES:
        options.policy = options.stage
    return options


def main(words: Sequence[str] | None = None, *, program: Sequence[str] | None = None) -> int:
    """Runs what the options ask for.

    Args:
        words: the command line; None takes the process's.
        program: what stands for `jrlhf`; None is this interpreter's.
    """
    options = arguments(words)
    program = program or (sys.executable, "-m", "jrlhf.cli")
    begun = time.perf_counter()
    run = options.output
    try:
        asked = {"seed": options.seed, "model": options.model, "full": options.full}
        model = start(run, asked, again=options.resume or options.stage is not None)
        ledger = Ledger(run / "stages.json")
        if options.stage == "data" and not options.resume:
            ledger.forget(list(ledger.entries))
        prepare_data(run, ledger, seed=options.seed)
    except (assets.AssetError, ValueError) as error:
        raise stop(str(error)) from None
    stages = plan(run, model=model, seed=options.seed, full=options.full, policy=options.policy)
    for place, stage in enumerate(stages, 1):
        if options.stage not in (None, stage.name):
            continue
        label = f"{place}/{len(stages)} {stage.name}"
        if options.resume and ledger.finished(stage.name, stage.commands, stage.makes):
            head(f"{label}: finished before")
            continue
        head(f"{label}: {stage.about}")
        stage_begun = time.perf_counter()
        ledger.forget([later.name for later in stages[place - 1 :]])
        if not options.resume and stage.name != "report":
            shutil.rmtree(run / stage.name, ignore_errors=True)
        execute(stage, run, resume=options.resume, program=program)
        ledger.record(stage.name, stage.commands, time.perf_counter() - stage_begun)
        spent, whole = (time.perf_counter() - t for t in (stage_begun, begun))
        print(f"{stage.name}: {clock(spent)} (since the start: {clock(whole)})", flush=True)
    if (run / "report.html").exists() and options.stage in (None, "report"):
        print(f"\nThe report: {(run / 'report.html').resolve()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; --resume goes on from here", file=sys.stderr)
        sys.exit(130)
