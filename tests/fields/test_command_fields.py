"""The fields that only the command line has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jrlhf.commands import dpo, generate, grpo, label, ppo, report, sft, training
from jrlhf.commands.arguments import ScriptArguments, parse
from jrlhf.commands.dpo import DPOArguments
from jrlhf.commands.generate import GenerateConfig
from jrlhf.commands.grpo import GRPOArguments
from jrlhf.commands.label import LabelConfig
from jrlhf.commands.ppo import PPOArguments
from jrlhf.commands.report import ReportConfig
from jrlhf.errors import ConfigError, MissingFileError, ModelError
from jrlhf.trainers.sft import SFTConfig
from tests.cli.test_adapter_flags import FLAGS
from tests.fields.bench import PAIRS, PROMPTS, Bench, declared, words
from tests.rollout.conftest import EOS

Check = Callable[[Bench], None]


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


# ------------------------------------------------------------------ training verbs


def script(*argv: str) -> tuple[ScriptArguments, SFTConfig]:
    made = training.arguments(["--dataset_name", "data", *argv], SFTConfig, verb="sft")
    return made[0], made[1]


def loaded(*argv: str) -> tuple[list[str], list[str] | None]:
    """The texts of the training and the evaluation set of a small repository of data."""
    for name in ("train", "test", "extra"):
        write(f"data/{name}.jsonl", [{"text": name}])
        write(f"data/other/{name}.jsonl", [{"text": f"other {name}"}])
    files = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(
            f"  - split: {name}\n    path: {folder}{name}.jsonl\n"
            for name in ("train", "test", "extra")
        )
        + f"  default: {str(config == 'first').lower()}\n"
        for config, folder in (("first", ""), ("second", "other/"))
    )
    Path("data/README.md").write_text(f"---\nconfigs:\n{files}---\n")
    train, test = training.datasets(*script(*argv))
    texts = [row["text"] for row in train]
    return texts, None if test is None else [row["text"] for row in test]


def model_name_or_path(bench: Bench) -> None:
    with pytest.raises(MissingFileError, match=r"no-such-model"):
        sft.main(["--dataset_name", write("r.jsonl", PAIRS), "--model", "./no-such-model"])


def dtype(bench: Bench) -> None:
    assert script()[1].model_init_kwargs is None
    assert script("--dtype", "bfloat16")[1].model_init_kwargs == {"dtype": "bfloat16"}


def attn_implementation(bench: Bench) -> None:
    given = script("--attn_implementation", "xla")[1].model_init_kwargs
    assert given == {"attn_implementation": "xla"}
    loaded = bench.trainer("sft", by_name=True, model_init_kwargs=given).model
    assert loaded.net.spec.attention == "xla"
    with pytest.raises(ConfigError, match="attn_implementation='slash' is not known"):
        bench.trainer("sft", by_name=True, model_init_kwargs={"attn_implementation": "slash"})


def dataset_name(bench: Bench) -> None:
    assert loaded()[0] == ["train"]
    alone = ["--dataset_name", "data/extra.jsonl"]
    train, _ = training.datasets(*training.arguments(alone, SFTConfig, verb="sft"))
    assert [row["text"] for row in train] == ["extra"]
    with pytest.raises(ConfigError, match="dataset_name"):
        training.arguments([], SFTConfig, verb="sft")


def dataset_config(bench: Bench) -> None:
    assert loaded("--dataset_config", "second")[0] == ["other train"]
    alone = ["--dataset_name", "data/test.jsonl", "--dataset_config", "second"]
    with pytest.raises(ConfigError, match="single file"):
        training.datasets(*training.arguments(alone, SFTConfig, verb="sft"))


def dataset_train_split(bench: Bench) -> None:
    assert loaded("--dataset_train_split", "extra")[0] == ["extra"]


def dataset_test_split(bench: Bench) -> None:
    assert loaded()[1] is None
    assert loaded("--eval_strategy", "epoch")[1] == ["test"]
    assert loaded("--eval_strategy", "epoch", "--dataset_test_split", "extra")[1] == ["extra"]


def dataset_streaming(bench: Bench) -> None:
    loaded()
    for value in (False, True):
        train, _ = training.datasets(*script("--dataset_streaming", str(value)))
        assert hasattr(train, "__len__") != value
        assert [row["text"] for row in train] == ["train"]


def eval_dataset_name(bench: Bench) -> None:
    file = write("held-out.jsonl", [{"text": "held out"}])
    assert loaded("--eval_strategy", "epoch", "--eval_dataset_name", file)[1] == ["held out"]
    with pytest.raises(ConfigError, match="eval_dataset_name"):
        loaded("--eval_dataset_name", file)
    alone = ["--dataset_name", file, "--eval_strategy", "epoch"]
    with pytest.raises(ConfigError, match="eval_dataset_name"):
        training.datasets(*training.arguments(alone, SFTConfig, verb="sft"))


def missing(verb: Any, flag: str, bench: Bench, *more: str) -> None:
    """A path that is not there is asked for, and so is the flag that names it."""
    words = ["--model", bench.path, "--dataset_name", write("rows.jsonl", PAIRS),
             "--mesh", "fsdp=8", flag, "./no-such-place", *more]  # fmt: skip
    with pytest.raises((MissingFileError, ModelError), match="no-such-place"):
        verb.main(words)


FUNCTION = ("--reward_funcs", "tests.fields.bench.length_reward")


def reward_funcs(verb: Any) -> Check:
    def check(bench: Bench) -> None:
        rows = ["--dataset_name", write("rows.jsonl", PROMPTS)]
        with pytest.raises(ConfigError, match=r"tests\.fields\.nothing"):
            verb.main([*rows, "--reward_funcs", "tests.fields.nothing"])
        with pytest.raises(ConfigError, match="a model"):  # the function was found
            verb.main([*rows, *FUNCTION])

    return check


SCRIPT: dict[str, Check] = {
    "model_name_or_path": model_name_or_path,
    "dtype": dtype,
    "attn_implementation": attn_implementation,
    "dataset_name": dataset_name,
    "dataset_config": dataset_config,
    "dataset_train_split": dataset_train_split,
    "dataset_test_split": dataset_test_split,
    "dataset_streaming": dataset_streaming,
    "eval_dataset_name": eval_dataset_name,
}
REF, VALUE = "--ref_model_name_or_path", "--value_model_name_or_path"
SMALL = ("--num_generations", "2", "--beta", "0.1")
DPO: dict[str, Check] = {"ref_model_name_or_path": lambda bench: missing(dpo, REF, bench)}
PPO: dict[str, Check] = {
    "ref_model_name_or_path": lambda bench: missing(ppo, REF, bench, *FUNCTION),
    "value_model_name_or_path": lambda bench: missing(ppo, VALUE, bench, *FUNCTION),
    "reward_funcs": reward_funcs(ppo),
}
GRPO: dict[str, Check] = {
    "ref_model_name_or_path": lambda bench: missing(grpo, REF, bench, *FUNCTION, *SMALL),
    "reward_model_name_or_path": lambda bench: missing(
        grpo, "--reward_model_name_or_path", bench, *SMALL
    ),
    "reward_funcs": reward_funcs(grpo),
}


# ------------------------------------------------------------------ generate


def made(bench: Bench, *argv: str) -> GenerateConfig:
    (cfg,) = parse(["--model", bench.path, "--prompt", words(1, 2), *argv], GenerateConfig,
                   verb="generate")  # fmt: skip
    return cfg


def sampler(bench: Bench, *argv: str) -> Any:
    return generate.sampler(made(bench, *argv), bench.model("sft"), count=64)


def samples(name: str, value: Any, default: Any) -> Check:
    def check(bench: Bench) -> None:
        assert getattr(sampler(bench).sampling, name) == default
        sampling = ["--do_sample"] if name in GenerateConfig.OF_SAMPLING else []
        assert getattr(sampler(bench, f"--{name}", str(value), *sampling).sampling, name) == value
        if sampling:
            with pytest.raises(ConfigError, match=f"--{name} acts only when sampling"):
                made(bench, f"--{name}", str(value))

    return check


def generated(bench: Bench, *argv: str) -> list[dict[str, Any]]:
    """Rows that the verb writes; four sampled words each."""
    words = ["--model", bench.path, "--max_new_tokens", "4", "--do_sample", "--output", "out.jsonl"]
    assert generate.main([*words, *argv]) == 0
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_generate_writes_what_was_asked_for(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """One program for all of these: prompt, dataset_name, chat, output, seed, stop_strings."""
    (one,) = generated(bench, "--prompt", words(1, 2))
    assert one["prompt"] == words(1, 2)
    assert len(one["completion"].split()) <= 4
    (other,) = generated(bench, "--prompt", words(1, 2), "--seed", "1")
    assert other["completion"] != one["completion"]
    (chat,) = generated(bench, "--prompt", words(1, 2), "--chat")
    assert chat["prompt"] == [{"role": "user", "content": words(1, 2)}]
    second = one["completion"].split()[1]
    (cut,) = generated(bench, "--prompt", words(1, 2), "--stop_strings", second)
    assert cut["completion"].split() == one["completion"].split()[:2]
    capsys.readouterr()
    generate.main(["--model", bench.path, "--max_new_tokens", "4", "--do_sample",
                   "--prompt", words(1, 2)])  # fmt: skip
    assert capsys.readouterr().out == one["completion"] + "\n"


def prompt(bench: Bench) -> None:
    assert generate.rows_of(made(bench))[0]["prompt"] == words(1, 2)


def generate_dataset_name(bench: Bench) -> None:
    (cfg,) = parse(["--model", "m", "--dataset_name", write("p.jsonl", PROMPTS)], GenerateConfig,
                   verb="generate")  # fmt: skip
    assert [row["prompt"] for row in generate.rows_of(cfg)] == [row["prompt"] for row in PROMPTS]
    with pytest.raises(ConfigError, match="--prompt and --dataset_name"):
        generate.rows_of(made(bench, "--dataset_name", "p.jsonl"))


def chat(bench: Bench) -> None:
    assert generate.rows_of(made(bench, "--chat"))[0]["prompt"][0]["content"] == words(1, 2)
    with pytest.raises(ConfigError, match="--chat"):
        generate.main(["--model", "m", "--dataset_name", "p.jsonl", "--chat"])


def rows(bench: Bench) -> None:
    assert sampler(bench)._row_count(64) == 32
    assert sampler(bench, "--rows", "8")._row_count(64) == 8


def mesh(bench: Bench) -> None:
    model = generate.load(made(bench, "--mesh", "fsdp=4,tensor=2"))
    assert dict(model.mesh.shape) | {"fsdp": 4, "tensor": 2} == dict(model.mesh.shape)


def generate_dtype(bench: Bench) -> None:
    assert generate.load(made(bench, "--dtype", "bfloat16")).net.spec.dtype == "bfloat16"


def generate_model(bench: Bench) -> None:
    assert generate.load(made(bench)).name_or_path == bench.path


GENERATE: dict[str, Check] = {
    "model_name_or_path": generate_model,
    "prompt": prompt,
    "dataset_name": generate_dataset_name,
    "chat": chat,
    "max_new_tokens": samples("max_new_tokens", 9, 64),
    "do_sample": samples("do_sample", True, False),
    "temperature": samples("temperature", 0.5, 1.0),
    "top_k": samples("top_k", 3, 0),
    "top_p": samples("top_p", 0.9, 1.0),
    "min_p": samples("min_p", 0.1, 0.0),
    "repetition_penalty": samples("repetition_penalty", 1.2, 1.0),
    "rows": rows,
    "mesh": mesh,
    "dtype": generate_dtype,
}
BY_RUNNING = {"output", "seed", "stop_strings"}


# ------------------------------------------------------------------ label and report


def labelled(bench: Bench, *argv: str) -> list[dict[str, Any]]:
    words = ["--model_name_or_path", bench.path, "--reward_model_path", bench.path,
             "--dataset_name", write("p.jsonl", PROMPTS), "--max_new_tokens", "4",
             "--output", "pairs/out.jsonl", *argv]  # fmt: skip
    assert label.main(words) == 0
    return [json.loads(line) for line in Path("pairs/out.jsonl").read_text().splitlines()]


def test_label_writes_the_best_and_the_worst_of_each_prompt(bench: Bench) -> None:
    """dataset_name, output, seed, max_prompts, num_generations, by one program."""
    two, other = labelled(bench), labelled(bench, "--seed", "1")
    assert {row["prompt"] for row in two} <= {row["prompt"] for row in PROMPTS}
    assert all(row["margin"] > 0 for row in two)
    assert two != other
    few = labelled(bench, "--max_prompts", "3")
    assert {row["prompt"] for row in few} <= {row["prompt"] for row in PROMPTS[:3]}
    four = labelled(bench, "--num_generations", "4")
    # The first two of a prompt's four differ from its two, so compare on average.
    assert sum(row["margin"] for row in four) > sum(row["margin"] for row in two)
    with pytest.raises(ConfigError, match="num_generations"):
        labelled(bench, "--num_generations", "1")


def label_parts(bench: Bench, *argv: str) -> tuple[Any, Any, Any]:
    words = {"model_name_or_path": bench.path, "reward_model_path": bench.path, "dataset_name": "p"}
    given = [f"--{k}={v}" for k, v in words.items() if f"--{k}" not in argv]
    (cfg,) = parse([*given, *argv], LabelConfig, verb="label")
    return label.parts(cfg)


def label_sampling(bench: Bench) -> None:
    engine = label_parts(bench, "--max_new_tokens", "9", "--temperature", "0.5", "--rows", "8")[1]
    assert (engine.sampling.max_new_tokens, engine.sampling.temperature) == (9, 0.5)
    assert engine.sampling.eos_token_ids == (EOS,)
    assert engine._row_count(64) == 8
    plain = label_parts(bench)[1]
    assert (plain.sampling.max_new_tokens, plain.sampling.temperature) == (48, 1.0)
    assert plain._row_count(64) == 32


def label_models(bench: Bench) -> None:
    model, _, judge = label_parts(bench, "--mesh", "fsdp=8", "--bf16")
    assert model.mesh.shape["fsdp"] == 8
    assert (model.net.spec.dtype, judge.net.spec.dtype) == ("bfloat16", "bfloat16")
    for name in ("model_name_or_path", "reward_model_path"):
        with pytest.raises(MissingFileError, match="no-such-place"):
            label_parts(bench, f"--{name}", "./no-such-place")


LABEL: dict[str, Check] = {
    **dict.fromkeys(("max_new_tokens", "temperature", "rows"), label_sampling),
    **dict.fromkeys(("mesh", "bf16", "model_name_or_path", "reward_model_path"), label_models),
}
LABEL_BY_RUNNING = {"dataset_name", "output", "seed", "max_prompts", "num_generations"}


def run_dir(bench: Bench) -> None:
    write("run/sft/metrics.jsonl", [{"step": 1, "loss": 2.0}])
    assert report.main(["--run_dir", "run"]) == 0
    assert "sft" in Path("run/report.html").read_text()


def output(bench: Bench) -> None:
    write("run/sft/metrics.jsonl", [{"step": 1, "loss": 2.0}])
    assert report.main(["--run_dir", "run", "--output", "elsewhere/page.html"]) == 0
    assert Path("elsewhere/page.html").is_file()
    assert not Path("run/report.html").exists()


# tests/cli/test_adapter_flags.py flips these.
ADAPTERS = {words[0][2:] for words, _ in FLAGS.values() if words} | {
    "use_peft",
    "load_in_4bit",
    "load_in_8bit",
}
REPORT: dict[str, Check] = {"run_dir": run_dir, "output": output}
TABLES: dict[type, tuple[dict[str, Check], set[str]]] = {
    ScriptArguments: (SCRIPT, ADAPTERS),
    DPOArguments: (DPO, set()),
    PPOArguments: (PPO, set()),
    GRPOArguments: (GRPO, set()),
    GenerateConfig: (GENERATE, BY_RUNNING),
    LabelConfig: (LABEL, LABEL_BY_RUNNING),
    ReportConfig: (REPORT, set()),
}
CASES = [(config, field) for config, (table, _) in TABLES.items() for field in table]


@pytest.mark.parametrize(("config", "field"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_the_field_acts(config: type, field: str, bench: Bench) -> None:
    TABLES[config][0][field](bench)


@pytest.mark.parametrize("config", TABLES, ids=lambda x: x.__name__)
def test_every_field_is_flipped(config: type) -> None:
    table, by_running = TABLES[config]
    assert set(table) | by_running == set(declared(config))
