"""Model cards, and uploads to a hub: a stand-in on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jrlhf.errors import ConfigError, HubError
from jrlhf.peft import LoraConfig
from tests.fields.bench import Bench
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
    with pytest.raises(ConfigError, match="no id on the hub"):
        model.push_to_hub("../elsewhere")


def test_without_a_hub_an_upload_is_a_named_error(bench: Bench) -> None:
    with pytest.raises(HubError, match=r"org/alone.*offline[\s\S]*HF_HUB_OFFLINE"):
        bench.model("sft").push_to_hub("org/alone")


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
