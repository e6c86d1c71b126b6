"""Dataset types and their conversions, above all the split of an implicit prompt."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jrlhf.data.formats import (
    extract_prompt,
    split_preference,
    to_chatml,
)
from jrlhf.errors import DataError

words = st.text(alphabet=string.ascii_lowercase + " .\n", max_size=30)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@settings(max_examples=300, deadline=None)
@given(words | st.text(max_size=10), st.text(max_size=20) | words, st.text(max_size=20) | words)
def test_prompt_plus_rest_is_always_the_original_text(shared: str, a: str, b: str) -> None:
    chosen, rejected = shared + a, shared + b
    prompt, good, bad = extract_prompt(chosen, rejected)
    assert prompt + good == chosen
    assert prompt + bad == rejected
    assert bool(good) == bool(chosen), "an answer became empty"
    assert bool(bad) == bool(rejected), "an answer became empty"


@settings(max_examples=200, deadline=None)
@given(words, words, words)
def test_a_prompt_never_ends_inside_a_word_or_with_the_space_of_the_next(
    shared: str, a: str, b: str
) -> None:
    prompt, good, bad = extract_prompt(shared + a, shared + b)
    for rest in (good, bad):
        assert not (prompt[-1:].isalnum() and rest[:1].isalnum())
    if good and prompt[-1:] == " ":  # only where more than one space stood there
        assert good[0] == bad[0] == " "


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # TRL: "The sky is bl"
        ("A ", "B", ""),  # TRL: "A"
        ("", "anything", ""),  # TRL: UnboundLocalError
        ("same", "same", ""),  # TRL: "sam"
        ("Say it. Yes", "Say it. Yes, sir", "Say it."),
        ("Q: why?\n\nBecause.", "Q: why?\n\nNo idea.", "Q: why?\n\n"),
        ("天空是蓝色", "天空是红色", "天空是"),
        ("cafe\u0301s", "cafes", ""),  # an accent stays with its letter
    ],
)
def test_strings_are_cut_where_a_tokenizer_would(chosen: str, rejected: str, prompt: str) -> None:
    assert extract_prompt(chosen, rejected)[0] == prompt


def test_hh_dialogues_are_cut_after_the_last_shared_assistant_marker() -> None:
    turns = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Really?\n\nAssistant:"
    # The answers share their first words; TRL would give those to the prompt.
    got = extract_prompt(turns + " I think so.", turns + " I think not.")
    assert got == (turns, " I think so.", " I think not.")


def test_conversations_share_whole_messages_and_keep_an_answer() -> None:
    talk = [user("Hi"), assistant("Hello")]
    good, bad = [*talk, user("?"), assistant("yes")], [*talk, user("?"), assistant("no")]
    assert extract_prompt(good, bad) == (good[:3], good[3:], bad[3:])
    assert extract_prompt(good, good) == (good[:3], good[3:], good[3:])


def test_a_text_prompt_beside_conversations_is_replaced_by_their_own() -> None:
    row = {
        "prompt": "Hi",
        "chosen": [user("Hi"), assistant("a")],
        "rejected": [user("Hi"), assistant("b")],
    }
    assert split_preference(row, "row 0")["prompt"] == [user("Hi")]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "a", "rejected": [assistant("b")]},
        {"prompt": [user("?")], "chosen": "a", "rejected": "b"},
        {"chosen": "a", "rejected": None},
        {"chosen": 3, "rejected": "b"},
    ],
)
def test_sides_of_different_kinds_are_an_error_that_names_the_row(row: dict) -> None:
    with pytest.raises(DataError, match="row 7"):
        split_preference(row, "row 7")


def test_sharegpt_becomes_chatml_without_touching_the_row() -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    before = repr(row)
    assert to_chatml(row) == {"messages": [user("Hi"), assistant("Yo")]}
    assert repr(row) == before


def test_keys_that_datasets_filled_with_none_disappear() -> None:
    row = {"messages": [{"role": "user", "content": "Hi", "tool_calls": None}]}
    assert to_chatml(row)["messages"] == [user("Hi")]
