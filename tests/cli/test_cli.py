"""The command line: errors without tracebacks, files and flags, every shipped config."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from jrlhf import cli
from jrlhf.commands.arguments import ScriptArguments, help_text, parse
from jrlhf.commands.dpo import DPOArguments
from jrlhf.commands.evaluate import EvaluateConfig
from jrlhf.commands.generate import GenerateConfig
from jrlhf.commands.grpo import GRPOArguments
from jrlhf.commands.label import LabelConfig
from jrlhf.commands.ppo import PPOArguments
from jrlhf.errors import ConfigError, MissingFileError, UnsupportedFieldError
from jrlhf.trainers.dpo import DPOConfig
from jrlhf.trainers.grpo_config import GRPOConfig
from jrlhf.trainers.ppo_config import PPOConfig
from jrlhf.trainers.reward import RewardConfig
from jrlhf.trainers.sft import SFTConfig

GROUPS: dict[str, tuple[type, ...]] = {
    "sft": (ScriptArguments, SFTConfig),
    "reward": (ScriptArguments, RewardConfig),
    "dpo": (ScriptArguments, DPOConfig, DPOArguments),
    "ppo": (ScriptArguments, PPOConfig, PPOArguments),
    "grpo": (ScriptArguments, GRPOConfig, GRPOArguments),
    "evaluate": (EvaluateConfig,),
    "label": (LabelConfig,),
}
NEEDED = {
    "evaluate": ["--before", "a", "--after", "b", "--reward_model_path", "c", "--prompts", "d",
                 "--judge_rows", "e"],
    "label": ["--model_name_or_path", "a", "--reward_model_path", "b", "--dataset_name", "c"],
}  # fmt: skip
CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def sft(*words: str) -> Any:
    return parse(list(words), ScriptArguments, SFTConfig, verb="sft")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: "/".join(p.parts[-3:]))
def test_every_shipped_config_loads(path: Path) -> None:
    verb = path.stem
    parse(["--config", str(path), *NEEDED.get(verb, [])], *GROUPS[verb], verb=verb)


def test_every_verb_has_its_file_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(f"jrlhf.commands.{verb}").main(["--help"])
        assert stop.value.code == 0
        assert f"jrlhf {verb}" in capsys.readouterr().out


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("learning_rate: 1e-3\nmax_steps: 7\nmesh: {data: 1, fsdp: 4}\n")
    script, config = sft("--config", str(file), "--max_steps=9", "--packing", "--model", "m")
    assert (config.learning_rate, config.max_steps, config.packing) == (1e-3, 9, True)
    assert config.mesh == {"data": 1, "fsdp": 4}
    assert script.model_name_or_path == "m"


@pytest.mark.parametrize("word", ["--model", "--model_name_or_path"])
@pytest.mark.parametrize("name", ["model", "model_name_or_path"])
def test_a_flag_wins_by_either_name_of_a_field(word: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(f"{name}: from-the-file\n")
    script, _ = sft("--config", str(file), word, "from-the-line")
    assert script.model_name_or_path == "from-the-line"


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_bytes("output_dir: Käse".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        sft("--config", str(file))


@pytest.mark.parametrize(
    ("word", "strings"),
    [("a,b", ["a", "b"]), (",", [","]), ('[",", "."]', [",", "."]), ("none", None)],
)
def test_a_list_is_separated_by_commas_or_is_json(word: str, strings: list[str] | None) -> None:
    (made,) = parse(
        ["--model", "m", "--prompt", "p", "--stop_strings", word], GenerateConfig, verb="generate"
    )
    assert made.stop_strings == strings


def test_flags_become_the_types_of_their_fields() -> None:
    _, config = sft(
        "--max_length", "none", "--bf16", "false", "--report_to", "wandb", "tensorboard",
        "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}', "--mesh", "data=1,fsdp=4",
    )  # fmt: skip
    assert config.max_length is None
    assert config.bf16 is False
    assert config.report_to == ["wandb", "tensorboard"]
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert config.mesh == "data=1,fsdp=4"


MISTAKES = {
    "misspelt flag": (["--lerning_rate", "1"], ConfigError, 'Did you mean "learning_rate"'),
    "twice": (["--seed", "1", "--seed", "2"], ConfigError, "given twice"),
    "no value": (["--learning_rate"], ConfigError, "needs a value"),
    "a word": (["learning_rate"], ConfigError, "--name value"),
    "two values": (["--seed", "1", "2"], ConfigError, "one value"),
    "wrong type": (["--max_steps", "many"], ConfigError, "max_steps"),
    "wrong choice": (["--eval_strategy", "step"], ConfigError, 'Did you mean "steps"'),
    "refused": (["--deepspeed", "z3.json"], ConfigError, "mesh"),
    "no file": (["--config="], ConfigError, "--config needs a value"),
    "no such file": (["--config", "nowhere.yaml"], MissingFileError, "nowhere.yaml"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_on_the_command_line_is_named(case: str) -> None:
    words, error, message = MISTAKES[case]
    with pytest.raises(error, match=message):
        sft(*words)


FILES = {
    "misspelt key": ("lerning_rate: 1\n", ConfigError, 'Did you mean "learning_rate"'),
    "a key twice": ("seed: 1\nseed: 2\n", ConfigError, "given twice"),
    "a number for a name": ("1: 2\n", ConfigError, "names are text"),
    "a word that YAML reads": ("on: true\n", ConfigError, "names are text"),
    "no mapping": ("- seed\n", ConfigError, "mapping"),
    "no YAML": ("seed: [1\n", ConfigError, "not valid YAML"),
    "code": ("seed: !!python/object/apply:os.getpid []\n", ConfigError, "not valid YAML"),
    "refused": ("hub_always_push: true\n", UnsupportedFieldError, "hub_always_push"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_the_file_is_named(case: str, tmp_path: Path) -> None:
    text, error, message = FILES[case]
    file = tmp_path / "sft.yaml"
    file.write_text(text)
    with pytest.raises(error, match=message):
        sft("--config", str(file))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stf"], 'Did you mean "sft"'),
        (["sft", "--lerning_rate", "1"], "learning_rate"),
        (["sft"], "dataset_name"),
        (["sft", "--model", "x", "--dataset_name", "nowhere.jsonl"], "nowhere.jsonl"),
        (["generate", "--model", "x", "--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens"),
        (["grpo", "--dataset_name", "x"], "reward_funcs"),
        (["generate", "--model", "x"], "--prompt"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


ROWS = {
    "no prompt": ({"promt": "a"}, 'Is "promt" the column prompt?'),
    "a chat": ({"prompt": [{"role": "user", "content": "a"}]}, "row 0: prompt must be text"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_cannot_be_compared_are_named_before_a_model_is_read(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, said = ROWS[case]
    rows, judge = tmp_path / "rows.jsonl", tmp_path / "judge.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    judge.write_text(json.dumps({"text": "good", "label": 1}) + "\n")
    common = ["--reward_model_path", "./no-such"]
    label = ["label", "--model", "./no-such", "--dataset", str(rows), *common]
    evaluate = ["evaluate", "--before", "./no-such", "--after", "./no-such", "--prompts",
                str(rows), "--judge_rows", str(judge), *common]  # fmt: skip
    for words in (label, evaluate):
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err


def test_help_describes_every_field() -> None:
    for verb, classes in GROUPS.items():
        lines = help_text(verb, classes).splitlines()
        bare = [
            a for a, b in zip(lines, [*lines[1:], ""], strict=True)
            if a.startswith("  --") and not b.startswith("        ")
        ]  # fmt: skip
        assert not bare, f"{verb}: no description of {bare}"


def test_a_run_from_the_command_line(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("jrlhf.trainers.sft")
    import sys

    sys.path.insert(0, str(repository / "scripts"))
    import assets

    try:
        model = assets.fetch("glassllm")
    except assets.AssetError as error:
        pytest.skip(f"the model glassllm cannot be had here: {error}")
    rows = "".join(json.dumps({"text": f"Alice saw {i} cats."}) + "\n" for i in range(16))
    (tmp_path / "rows.jsonl").write_text(rows)
    out = tmp_path / "out"
    words = ["sft", "--model", str(model), "--dataset_name", str(tmp_path / "rows.jsonl"),
             "--output_dir", str(out), "--max_steps", "2", "--logging_steps", "1",
             "--per_device_train_batch_size", "1"]  # fmt: skip
    assert cli.main(words) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][:2] == [1, 2]
    assert (out / "model" / "model.safetensors").is_file()
    assert (out / "checkpoint-2").is_dir()
