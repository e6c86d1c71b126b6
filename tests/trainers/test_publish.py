"""Model cards, and uploads to a hub: a stand-in on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from jrlhf import AutoModelForCausalLM
from jrlhf.errors import ConfigError, HubError
from jrlhf.model import Model
from jrlhf.models.hub import TOKENIZER_RECORD
from jrlhf.peft import LoraConfig, get_peft_model
from tests.fields.bench import Bench
from tests.rollout.conftest import word_tokenizer
from tests.standin_hub import StandInHub


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("publish"))


def head_of(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_a_run_uploads_its_model_at_every_save_and_at_its_end(
    bench: Bench, standin_hub: StandInHub
) -> None:
    trainer = bench.trainer(
        "sft", max_steps=2, save_steps=1, logging_steps=1, learning_rate=0.0123, push_to_hub=True,
        hub_model_id="org/tuned", hub_token="hf_secret", hub_private_repo=True,
    )  # fmt: skip
    assert standin_hub.repos == {}
    trainer.train()
    trainer.save_model()
    steps = [f"Training in progress, step {step}" for step in (1, 2)]
    assert [commit.message for commit in standin_hub.commits] == [*steps, "Model save"]
    assert {commit.token for commit in standin_hub.commits} == {"hf_secret"}
    first, second, last = (commit.files for commit in standin_hub.commits)
    assert first["model.safetensors"] != second["model.safetensors"] == last["model.safetensors"]
    saved = Path(trainer.args.output_dir) / "model"
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == last

    card = last["README.md"].decode()
    head = head_of(card)
    assert head["model_name"] == "tuned"
    assert head["library_name"] == "transformers"
    assert {"generated_from_trainer", "jrlhf", "sft"} <= set(head["tags"])
    assert "| learning_rate | 0.0123 |" in card
    loss = trainer.state.log_history[1]["loss"]
    assert f"| loss | {loss:.6g} | 2 |" in card
    assert "2 steps" in card
    # The weights of the first save were a step behind, and so was its card.
    assert "1 steps" in first["README.md"].decode()
    run = Path(trainer.args.output_dir)
    for path in run.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path


def test_a_hub_that_refuses_is_found_before_the_training_and_does_not_end_it_later(
    bench: Bench, standin_hub: StandInHub, caplog: pytest.LogCaptureFixture
) -> None:
    standin_hub.refuse = True
    trainer = bench.trainer("sft", push_to_hub=True, hub_model_id="org/closed")
    with pytest.raises(HubError, match=r"org/closed.*\n.*hub_token"):
        trainer.train()
    assert trainer.state.global_step == 0
    for callback in trainer._loop.callbacks:
        callback.on_save(trainer.args, trainer.state, None)
    assert "The training goes on" in caplog.text
    with pytest.raises(HubError, match="org/closed"):
        trainer.save_model()
    assert (Path(trainer.args.output_dir) / "model" / "model.safetensors").is_file()


def test_a_trainer_uploads_when_it_is_told_to(bench: Bench, standin_hub: StandInHub) -> None:
    trainer = bench.trainer("dpo", output_dir="mine")
    url = trainer.push_to_hub(
        "Done", token="hf_t", revision="v2", dataset_name="trl-lib/tldr", tags=["mine"]
    )
    (commit,) = standin_hub.commits
    assert url == f"{standin_hub.url}/me/mine/commit/1"
    assert (commit.repo, commit.revision, commit.message) == ("me/mine", "v2", "Done")
    head = head_of(commit.files["README.md"].decode())
    assert head["datasets"] in ("trl-lib/tldr", ["trl-lib/tldr"])
    assert {"mine", "dpo"} <= set(head["tags"])


def test_a_card_can_be_written_alone(bench: Bench) -> None:
    trainer = bench.trainer("reward", output_dir="scores")
    trainer.model.name_or_path = "org/base-model"
    trainer.create_model_card(model_name="Scores | of texts")
    card = (Path("scores") / "model" / "README.md").read_text()
    head = head_of(card)
    assert head["base_model"] == "org/base-model"
    assert head["pipeline_tag"] == "text-classification"
    assert "https://huggingface.co/org/base-model" in card
    assert "None was logged." in card


def test_a_model_and_its_card_go_into_one_directory(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    trainer = bench.trainer("sft")
    trainer.save_model("~/saved")
    there = {path.name for path in (tmp_path / "home" / "saved").iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= there
    trainer = bench.trainer("sft", output_dir="~/run", max_steps=1, save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    there = {path.name for path in (tmp_path / "home" / "run").iterdir()}
    assert there == {"metrics.jsonl", "checkpoint-1", "model"}
    assert not Path("~").exists()
    with pytest.raises(ConfigError, match=r"saved into a directory, got 3 \(int\)"):
        trainer.save_model(3)


def test_an_adapters_card_says_so(bench: Bench) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = bench.trainer("sft", given={"peft_config": adapter})
    trainer.save_model()
    head = head_of((Path(trainer.args.output_dir) / "model" / "README.md").read_text())
    assert head["library_name"] == "peft"
    assert "lora" in head["tags"]


def test_a_model_uploads_itself(bench: Bench, standin_hub: StandInHub) -> None:
    model = bench.model("sft")
    model.push_to_hub("org/alone", commit_message="Here", private=True, dtype="bfloat16")
    (commit,) = standin_hub.commits
    assert (commit.repo, commit.message) == ("org/alone", "Here")
    assert standin_hub.repos == {"org/alone": True}
    assert json.loads(commit.files["config.json"])["dtype"] == "bfloat16"
    assert "tokenizer.json" in commit.files
    assert TOKENIZER_RECORD not in commit.files
    wrong: list[Any] = ["../elsewhere", None, 3, Path("org/alone")]
    for name in wrong:
        with pytest.raises(ConfigError, match=rf"^{re.escape(repr(name))} is no id on the hub"):
            model.push_to_hub(name)


def test_an_upload_replaces_an_earlier_one(bench: Bench, standin_hub: StandInHub) -> None:
    """What lies in a repository is the last model, in files of whatever size."""
    model = bench.model("sft")
    small: dict[str, Any] = {"max_shard_size": "4KB"}
    index = "model.safetensors.index.json"
    for sizes, gone in (({}, index), (small, "model.safetensors"), ({}, index)):
        model.params = jax.tree.map(lambda leaf: leaf + 1, model.params)
        model.push_to_hub("org/again", **sizes)
        files = standin_hub.files["org/again"]
        assert files == standin_hub.commits[-1].files
        assert gone not in files
        assert len([name for name in files if name.endswith(".safetensors")]) > (7 if sizes else 0)
    model.push_to_hub("org/again", **small)
    again = AutoModelForCausalLM.from_pretrained("org/again")
    for old, new in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_upload_deletes_only_what_it_stands_for(bench: Bench, standin_hub: StandInHub) -> None:
    old = {
        "model.safetensors", "model-00001-of-00002.safetensors", "model-of-mine.safetensors",
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "additional_chat_templates/a.jinja", "special_tokens_map.json", "tokenizer.model",
        "generation_config.json", "README.md", "onnx/model.safetensors",
    }  # fmt: skip
    standin_hub.files["org/own"] = dict.fromkeys(old, b"old")
    model = bench.model("sft")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.push_to_hub("org/own")
    (commit,) = standin_hub.commits
    assert standin_hub.files["org/own"].keys() == old | commit.files.keys()
    # In a branch of its own, whose tokenizer stays: the model has none.
    model = Model(model.net, model.params)
    model.push_to_hub("org/own", revision="whole")
    assert standin_hub.files["org/own"].keys() == old | commit.files.keys()
    left = {
        "model-of-mine.safetensors", "onnx/model.safetensors", "README.md", "tokenizer.model",
        "chat_template.jinja", "additional_chat_templates/a.jinja", "special_tokens_map.json",
    }  # fmt: skip
    branch = standin_hub.files["org/own@whole"]
    assert {name for name in branch if branch[name] == b"old"} == left
    model.push_to_hub("org/own", revision="whole", tokenizer=word_tokenizer(["w3"]))
    gone = {"chat_template.jinja", "additional_chat_templates/a.jinja", "special_tokens_map.json"}
    assert {name for name in branch if branch[name] == b"old"} == left - gone


def test_without_a_hub_an_upload_is_a_named_error(bench: Bench) -> None:
    with pytest.raises(HubError, match=r"org/alone.*offline[\s\S]*HF_HUB_OFFLINE"):
        bench.model("sft").push_to_hub("org/alone")


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
