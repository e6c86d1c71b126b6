"""Saves over earlier ones: those that fail change nothing, those that succeed leave nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import pytest

from jrlhf import AutoModelForCausalLM
from jrlhf.errors import ConfigError, MissingFileError, ModelError, UnsupportedModelError
from jrlhf.models.load import load_pretrained
from jrlhf.models.save import save_pretrained
from jrlhf.models.tokenizer import load_tokenizer
from jrlhf.peft import LoraConfig, get_peft_model
from tests.models.conftest import CONFIG, HFDirectory

INDEX = "model.safetensors.index.json"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize(("first", "then"), [(1, 1), (1, "5GB"), ("5GB", 1), ("5GB", "5GB")])
def test_a_save_that_fails_leaves_the_earlier_one_as_it_was(
    hf_directory: HFDirectory, tmp_path: Path, first: Any, then: Any
) -> None:
    net, params, source = load_pretrained(hf_directory()[0])
    target = tmp_path / "s"
    save_pretrained(target, net, params, source=source, max_shard_size=first)
    before = contents(target)
    params = jax.tree.map(lambda leaf: leaf + 1, params)
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(7e4)
    with pytest.raises(ConfigError, match="beyond float16"):
        save_pretrained(target, net, params, source=source, max_shard_size=then, dtype="float16")
    assert contents(target) == before


def test_a_model_that_no_config_can_say_is_refused_before_anything_is_written(
    hf_directory: HFDirectory, tmp_path: Path
) -> None:
    net, params, source = load_pretrained(hf_directory()[0])
    odd = net.of(net.spec.replace(embedding_scale=2.5))
    with pytest.raises(UnsupportedModelError, match=r"embedding_scale=2\.5 cannot be written"):
        save_pretrained(tmp_path / "s", odd, params, source=source)
    assert not (tmp_path / "s").exists()


def test_shards_that_took_their_places_in_part_do_not_load(
    hf_directory: HFDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine stops between two names: an error then, never a mixture."""
    net, params, source = load_pretrained(hf_directory()[0])
    save_pretrained(tmp_path, net, params, source=source, max_shard_size=1)
    replace = os.replace
    done: list[Any] = []

    def stopping(old: Any, new: Any) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(new)
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(tmp_path, net, params, source=source, max_shard_size=1)
    with pytest.raises(MissingFileError, match="neither"):
        load_pretrained(tmp_path)
    save_pretrained(tmp_path, net, params, source=source, max_shard_size=1)
    load_pretrained(tmp_path)


def test_what_a_killed_process_left_is_removed(hf_directory: HFDirectory, tmp_path: Path) -> None:
    net, params, source = load_pretrained(hf_directory()[0])
    target = tmp_path / "s"
    target.mkdir()
    (target / ".model-00002-of-00021.safetensors.4711").write_bytes(b"half")
    (target / ".mine").write_bytes(b"whole")
    save_pretrained(target, net, params, source=source)
    assert [name for name in contents(target) if name.startswith(".")] == [".mine"]


# ------------------------------------------------------------------ names


@pytest.fixture(scope="module")
def models() -> Any:
    """A model without files, and one with an adapter."""
    model = AutoModelForCausalLM.from_config(CONFIG)
    return model, get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("target", "says"),
    [
        (None, r"a directory, got None \(NoneType\)"),
        (3, r"got 3 \(int\)"),
        ("file", "file is a file: name another directory"),
        ("file/below", "file is a file: name another directory"),
        ("a" * 300, r"No directory is 'a{80}'… \(300 characters\): File name too long"),
        ("~nobody-here/out", "No directory is '~nobody-here/out'"),
    ],
)
def test_what_is_no_directory_is_named(
    models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: bool,
    target: Any,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("here")
    model = models[adapter]
    with pytest.raises(ConfigError, match=says):
        model.save_pretrained(target)
    assert contents(tmp_path) == {"file": b"here"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a" * 300, r"No model has the name 'a{80}'… \(300 characters\): File name too long"),
        ("~nobody-here/model", "No model has the name '~nobody-here/model'"),
    ],
)
def test_a_name_that_no_file_can_have_is_named(name: str, says: str) -> None:
    for load in (AutoModelForCausalLM.from_pretrained, load_tokenizer):
        with pytest.raises(ModelError, match=says):
            load(name)


@pytest.mark.parametrize("letter", ["a", "é"])
def test_a_shard_that_no_file_can_be_is_named(hf_directory: HFDirectory, letter: str) -> None:
    origin, _ = hf_directory(shards=2)
    index = json.loads((origin / INDEX).read_text())
    size = len(letter.encode())
    for length, says in ((243 // size, "lacks shards"), (244 // size + 1, "end at 255 bytes")):
        index["weight_map"]["model.norm.weight"] = f"{letter * length}.safetensors"
        (origin / INDEX).write_text(json.dumps(index))
        with pytest.raises((ModelError, MissingFileError), match=says):
            load_pretrained(origin)


def test_a_classifier_has_no_generation_config(hf_directory: HFDirectory, tmp_path: Path) -> None:
    origin, _ = hf_directory()
    (origin / "generation_config.json").write_text('{"top_p": 0.9}')
    net, params, source = load_pretrained(origin)
    save_pretrained(tmp_path / "s", net, params, source=source)
    net, params, source = load_pretrained(origin, head="classifier", num_labels=2)
    save_pretrained(tmp_path / "s", net, params, source=source)
    assert not (tmp_path / "s" / "generation_config.json").exists()
    # Its own directory's says how the origin generates, and nothing here could say it again.
    save_pretrained(origin, net, params, source=source)
    assert (origin / "generation_config.json").read_text() == '{"top_p": 0.9}'


def test_an_adapter_does_not_lie_over_the_model_it_was_merged_into(
    hf_directory: HFDirectory, tmp_path: Path
) -> None:
    """transformers loads the adapter of a directory over its weights."""
    base = AutoModelForCausalLM.from_pretrained(hf_directory()[0])
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    assert "adapter_config.json" in contents(tmp_path)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    assert {name for name in contents(tmp_path) if "adapter" in name} == {
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
    }
