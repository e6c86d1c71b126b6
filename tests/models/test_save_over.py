"""Saves over earlier ones: those that fail change nothing, those that succeed leave nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import pytest
from transformers import AutoTokenizer

from jrlhf import AutoModelForCausalLM
from jrlhf.errors import ConfigError, MissingFileError, ModelError, UnsupportedModelError
from jrlhf.models.load import load_pretrained, save_pretrained
from jrlhf.models.tokenizer import load_tokenizer, save_tokenizer
from jrlhf.peft import LoraConfig, get_peft_model
from tests.models.conftest import CONFIG, HFDirectory, tensors_of, write_hf
from tests.rollout.conftest import word_tokenizer

INDEX = "model.safetensors.index.json"
WORDS = [f"w{i}" for i in range(3, 40)]
# Files of old layouts, which transformers' tokenizers of today do not write.
MAP, SLOW = "special_tokens_map.json", "vocab.json"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def tokenizer_with(template: Any = None, *, words: list[str] = WORDS, added: int = 0) -> Any:
    tokenizer = word_tokenizer(words)
    tokenizer.add_tokens([f"<added{i}>" for i in range(added)])
    tokenizer.chat_template = template
    return tokenizer


def model_with(directory: Path, template: Any = None, **changes: Any) -> Any:
    """A model whose own directory has a tokenizer."""
    write_hf(directory, CONFIG, tensors_of(CONFIG))
    tokenizer_with(template, **changes).save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


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


# ------------------------------------------------------------------ the tokenizer


@pytest.mark.parametrize("home", [False, True])
def test_a_tokenizer_without_a_template_replaces_one_with(tmp_path: Path, home: bool) -> None:
    """Also in the directory that the model came from: what is given is what loads again."""
    model = model_with(tmp_path / "a", {"default": "old", "other": "older"})
    target = tmp_path / ("a" if home else "b")
    model.save_pretrained(target)
    assert load_tokenizer(target).chat_template == {"default": "old", "other": "older"}
    (target / MAP).write_text('{"eos_token": "w7"}')
    (target / SLOW).write_text("{}")
    (target / "notes.txt").write_text("mine")
    model.save_pretrained(target, tokenizer=tokenizer_with())
    for again in (load_tokenizer(target), AutoTokenizer.from_pretrained(target)):
        assert (again.chat_template, again.eos_token) == (None, "</s>")
    files = contents(target).keys()
    assert not any(name.endswith(".jinja") or name.startswith(".") for name in files)
    # A vocabulary of the model's own directory could not be made again.
    assert (SLOW in files) == home
    assert "notes.txt" in files


@pytest.mark.parametrize("words", [WORDS, WORDS[::-1]])
def test_the_origins_tokenizer_replaces_that_of_an_earlier_model_whole(
    tmp_path: Path, words: list[str]
) -> None:
    """Also one with the same vocabulary: a chat model's over its base's."""
    first = model_with(tmp_path / "a", "old", words=words)
    second = model_with(tmp_path / "b")
    first.save_pretrained(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == "old"
    second.save_pretrained(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert (again.chat_template, again.eos_token) == (None, "</s>")
    assert again.get_vocab() == load_tokenizer(tmp_path / "b").get_vocab()


def test_a_tokenizer_that_was_saved_first_is_kept(models: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_with("mine", added=2)
    for name, model in {"with": model_with(tmp_path / "a", "old"), "without": models[0]}.items():
        for turn in range(3):
            if turn != 1:  # saved once, and the model again and again
                tokenizer.save_pretrained(tmp_path / name)
            model.save_pretrained(tmp_path / name)
            again = load_tokenizer(tmp_path / name)
            assert (again.chat_template, len(again)) == ("mine", len(tokenizer))


def test_a_tokenizer_that_was_saved_first_is_kept_beside_an_origin_of_old_files(
    tmp_path: Path,
) -> None:
    """Nothing tells whether an origin's vocab.txt is the vocabulary that was saved."""
    write_hf(tmp_path / "a", CONFIG, tensors_of(CONFIG))
    (tmp_path / "a" / "vocab.txt").write_text("[UNK]\nword\n")
    tokenizer_with("mine").save_pretrained(tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == "mine"
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_a_directory_keeps_its_tokenizer_when_its_own_model_is_saved_there(tmp_path: Path) -> None:
    model = model_with(tmp_path / "a", "old")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"pieces")
    tokens = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"}
    before = contents(tmp_path / "a")
    model.save_pretrained(tmp_path / "a", max_shard_size=1)
    after = contents(tmp_path / "a")
    assert {name: after[name] for name in tokens} == {name: before[name] for name in tokens}


def test_a_vocabulary_beside_the_tokenizer_that_is_given_is_kept(tmp_path: Path) -> None:
    tokenizer_with().save_pretrained(tmp_path)
    (tmp_path / SLOW).write_text("{}")
    save_tokenizer(tmp_path, tokenizer=load_tokenizer(tmp_path), source=None)
    assert (tmp_path / SLOW).is_file()


def test_templates_that_lie_elsewhere_stay_there(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "other.jinja").write_text("older")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "additional_chat_templates").symlink_to(tmp_path / "theirs")
    templates = {"default": "new", "mine": "newer"}
    save_tokenizer(tmp_path / "out", tokenizer=tokenizer_with(templates), source=None)
    assert load_tokenizer(tmp_path / "out").chat_template == templates
    assert (tmp_path / "theirs" / "other.jinja").read_text() == "older"


def test_a_tokenizer_that_cannot_be_written_leaves_the_other(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, tokenizer=tokenizer_with("old"), source=None)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="template name"):
        save_tokenizer(tmp_path, tokenizer=tokenizer_with({"../out": "x"}), source=None)
    assert contents(tmp_path) == before


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
