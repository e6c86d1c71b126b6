"""Tokenizers in the directories of saved models: which stay, which go, and that they go whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jrlhf import AutoModelForCausalLM
from jrlhf.models.hub import TOKENIZER_RECORD
from jrlhf.models.tokenizer import load_tokenizer
from jrlhf.models.tokenizer_files import save_tokenizer
from tests.models.conftest import CONFIG, tensors_of, write_hf
from tests.models.test_save_over import contents
from tests.rollout.conftest import word_tokenizer

WORDS = [f"w{i}" for i in range(3, 40)]
# Files of old layouts, which transformers' tokenizers of today do not write.
MAP, SLOW = "special_tokens_map.json", "vocab.json"
TEMPLATES = "additional_chat_templates"
OTHERS = pytest.warns(UserWarning, match="keeps the tokenizer that lay there")


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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Two models whose tokenizers give the same words other ids; the first has templates."""
    root = tmp_path_factory.mktemp("pair")
    first = model_with(root / "a", {"default": "old", "other": "older"})
    return first, model_with(root / "b", words=WORDS[::-1])


def tokens(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files."""
    other = ("model.safetensors", "config.json", "generation_config.json", TOKENIZER_RECORD)
    return {name: found for name, found in contents(directory).items() if name not in other}


def of(model: Any) -> dict[str, bytes]:
    return tokens(model.source.path)


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


def test_a_tokenizer_that_was_saved_first_is_kept(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("mine", added=2)
    without = AutoModelForCausalLM.from_config(CONFIG)
    for name, model in {"with": model_with(tmp_path / "a", "old"), "without": without}.items():
        for turn in range(3):
            if turn != 1:  # saved once, and the model again and again
                tokenizer.save_pretrained(tmp_path / name)
            with OTHERS if turn and name == "with" else contextlib.nullcontext():
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


# ------------------------------------------------------------------ whose it is


def copied(out: Path) -> None:
    once = shutil.move(out, out.with_name(f"{out.name}-once"))
    shutil.copytree(once, out, copy_function=shutil.copyfile)


def edited(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config))


def touched(out: Path) -> None:
    for path in out.rglob("*"):
        os.utime(path, (0, 0))


@pytest.mark.parametrize("change", [copied, edited, touched])
def test_a_models_tokenizer_goes_and_a_users_stays_whatever_times_say(
    tmp_path: Path, pair: tuple[Any, Any], change: Any
) -> None:
    first, second = pair
    first.save_pretrained(tmp_path / "models")
    tokenizer_with("mine").save_pretrained(tmp_path / "users")
    first.save_pretrained(tmp_path / "users")
    for name in ("models", "users"):
        change(tmp_path / name)
    second.save_pretrained(tmp_path / "models")
    assert tokens(tmp_path / "models") == of(second)
    with OTHERS:
        second.save_pretrained(tmp_path / "users")
    assert load_tokenizer(tmp_path / "users").chat_template == "mine"


def test_what_transformers_saved_stays_with_a_warning(
    tmp_path: Path, pair: tuple[Any, Any]
) -> None:
    first, second = pair
    shutil.copytree(first.source.path, tmp_path / "out")
    with OTHERS:
        second.save_pretrained(tmp_path / "out")
    assert tokens(tmp_path / "out") == of(first)
    # Its own is there already, whoever wrote it: nothing to say.
    again = AutoModelForCausalLM.from_pretrained(first.source.path)
    assert again.tokenizer is not None
    again.save_pretrained(tmp_path / "out")
    assert tokens(tmp_path / "out") == of(first)


@pytest.mark.parametrize("held", [False, True])
def test_a_tokenizer_that_the_model_holds_is_none_that_is_given(tmp_path: Path, held: bool) -> None:
    model = model_with(tmp_path / "a", "old")
    if held:
        assert model.tokenizer.chat_template == "old"
    tokenizer_with("mine").save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == "mine"


def test_a_tokenizer_that_was_given_is_the_users(tmp_path: Path) -> None:
    model = model_with(tmp_path / "a", "old")
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer_with("mine"))
    assert not (tmp_path / "out" / TOKENIZER_RECORD).exists()
    with OTHERS:
        model.save_pretrained(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == "mine"


def test_what_the_held_tokenizer_became_is_saved(tmp_path: Path) -> None:
    made = AutoModelForCausalLM.from_config(CONFIG, tokenizer=tokenizer_with("old"))
    for model in (model_with(tmp_path / "a", "old"), made):
        model.save_pretrained(tmp_path / "out")
        model.tokenizer.chat_template = "new"
        model.save_pretrained(tmp_path / "out")
        assert load_tokenizer(tmp_path / "out").chat_template == "new"


@pytest.mark.parametrize("name", ["chat_template.jinja", "vocab.txt", "added_tokens.json"])
def test_one_file_is_no_tokenizer(tmp_path: Path, pair: tuple[Any, Any], name: str) -> None:
    without = AutoModelForCausalLM.from_config(CONFIG)
    (tmp_path / name).write_text("{}")
    without.save_pretrained(tmp_path)
    assert (tmp_path / name).read_text() == "{}"
    pair[0].save_pretrained(tmp_path)
    assert tokens(tmp_path) == of(pair[0])


def test_a_template_of_the_users_beside_the_models_stays(
    tmp_path: Path, pair: tuple[Any, Any]
) -> None:
    first = pair[0]
    first.save_pretrained(tmp_path)
    (tmp_path / TEMPLATES / "mine.jinja").write_text("mine")
    with OTHERS:
        first.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template["mine"] == "mine"


def test_a_model_without_a_tokenizer_leaves_none_of_another_model(
    tmp_path: Path, pair: tuple[Any, Any]
) -> None:
    without = AutoModelForCausalLM.from_config(CONFIG)
    pair[0].save_pretrained(tmp_path / "models")
    without.save_pretrained(tmp_path / "models")
    assert not tokens(tmp_path / "models")
    tokenizer_with("mine").save_pretrained(tmp_path / "users")
    without.save_pretrained(tmp_path / "users")
    assert load_tokenizer(tmp_path / "users").chat_template == "mine"


@pytest.mark.parametrize("record", ["{", "[]", '{"tokenizer.json": 3}', '{"tokenizer.json": "x"}'])
def test_a_damaged_record_says_nothing(tmp_path: Path, pair: tuple[Any, Any], record: str) -> None:
    pair[0].save_pretrained(tmp_path)
    (tmp_path / TOKENIZER_RECORD).write_text(record)
    with OTHERS:
        pair[1].save_pretrained(tmp_path)
    assert tokens(tmp_path) == of(pair[0])


# ------------------------------------------------------------------ how it goes


def test_a_save_that_stopped_anywhere_is_made_good_by_the_next(
    tmp_path: Path, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair
    replace, stops = os.replace, 0

    def stopping(left: int) -> Any:
        def one(old: Any, new: Any) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            replace(old, new)

        return one

    while True:
        out = tmp_path / str(stops)
        first.save_pretrained(out)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping(stops))
            try:
                second.save_pretrained(out)
                break
            except KeyboardInterrupt:
                stops += 1
        second.save_pretrained(out)
        assert tokens(out) == of(second), stops
    assert stops > 5


def test_a_tokenizer_that_cannot_be_written_does_not_make_the_other_the_users(
    tmp_path: Path, pair: tuple[Any, Any]
) -> None:
    first, second = pair
    first.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="template name"):
        second.save_pretrained(tmp_path, tokenizer=tokenizer_with({"../out": "x"}))
    second.save_pretrained(tmp_path)
    assert tokens(tmp_path) == of(second)


def test_what_links_point_at_is_not_touched(tmp_path: Path, pair: tuple[Any, Any]) -> None:
    first, second = pair
    base, out = tmp_path / "base", tmp_path / "out"
    first.save_pretrained(base)
    before = contents(base), {path: path.stat() for path in base.rglob("*") if path.is_file()}
    out.mkdir()
    for path in base.iterdir():
        (out / path.name).symlink_to(path)
    for model in (AutoModelForCausalLM.from_config(CONFIG), first, second):
        model.save_pretrained(out)
    after = {path: path.stat() for path in base.rglob("*") if path.is_file()}
    assert contents(base) == before[0]
    assert {p: s.st_mtime_ns for p, s in after.items()} == {
        p: s.st_mtime_ns for p, s in before[1].items()
    }
    second.save_pretrained(base)
    assert tokens(base) == of(second)


def test_a_file_where_templates_go_gives_way(tmp_path: Path, pair: tuple[Any, Any]) -> None:
    (tmp_path / TEMPLATES).write_text("no directory")
    pair[0].save_pretrained(tmp_path)
    assert tokens(tmp_path) == of(pair[0])


def test_a_tokenizer_from_nowhere_has_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty name is no path to the directory of work."""
    monkeypatch.chdir(tmp_path)
    Path(SLOW).write_text("{}")
    tokenizer = tokenizer_with()
    tokenizer.name_or_path = ""
    save_tokenizer(Path(), tokenizer=tokenizer, source=None)
    assert not Path(SLOW).exists()


def test_the_origin_is_found_from_another_directory_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_with(tmp_path / "a", "old")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("a")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    model.save_pretrained("out")
    assert load_tokenizer("out").chat_template == "old"
