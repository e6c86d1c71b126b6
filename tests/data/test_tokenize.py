"""What becomes of a row: EOS, masks, truncation, dropping, and every error a user can cause."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import numpy as np
import pytest

from jrlhf.data.encode import Encoder
from jrlhf.data.rows import Rows
from jrlhf.data.tokenize import preference_rows, prompt_rows, reward_rows, sft_rows
from jrlhf.errors import (
    ConfigError,
    DataError,
    EmptyDatasetError,
    MissingColumnError,
    PromptTooLongError,
    TokenizerError,
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALK = [user("What color is the sky?"), assistant("It is blue.")]


@pytest.mark.parametrize("kind", ["tokenizer", "bos_tokenizer", "eos_tokenizer"])
@pytest.mark.parametrize("ending", ["", "<|im_end|>"])
def test_text_ends_with_exactly_one_trained_eos(
    kind: str, ending: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    eos = tokenizer.eos_token_id
    rows = [{"text": f"The sky{ending}"}]
    (row,) = sft_rows(rows, tokenizer, max_length=None)
    assert row["ids"].tolist().count(eos) == 1
    assert row["ids"][-1] == eos
    assert row["mask"][-1] == 1
    assert tokenizer.decode(row["ids"]).endswith("The sky<|im_end|>")


def test_bos_appears_once_in_text_and_as_the_template_says_in_chats(bos_tokenizer: Any) -> None:
    bos = bos_tokenizer.bos_token_id
    (text,) = sft_rows([{"text": "The sky"}], bos_tokenizer, max_length=None)
    assert text["ids"].tolist().count(bos) == 1
    (chat,) = sft_rows([{"messages": TALK}], bos_tokenizer, max_length=None)
    assert bos not in chat["ids"]
    template = "{{ bos_token }}" + bos_tokenizer.chat_template
    encoder = Encoder(bos_tokenizer, chat_template=template)
    (chat,) = sft_rows([{"messages": TALK}], encoder, max_length=None)
    assert chat["ids"].tolist().count(bos) == 1


def test_a_cut_text_does_not_end_with_eos(tokenizer: Any) -> None:
    (row,) = sft_rows([{"text": "The sky is blue " * 9}], tokenizer, max_length=8)
    assert len(row["ids"]) == len(row["mask"]) == 8
    assert tokenizer.eos_token_id not in row["ids"]


def test_loss_is_on_the_completion_where_there_is_one(tokenizer: Any) -> None:
    rows = [{"prompt": "The sky is", "completion": " blue."}]
    (row,) = sft_rows(rows, tokenizer, max_length=None)
    assert tokenizer.decode(row["ids"][row["mask"] > 0]) == " blue.<|im_end|>"
    (row,) = sft_rows(rows, tokenizer, max_length=None, completion_only_loss=False)
    assert row["mask"].all()


def test_a_conversational_completion_starts_after_the_header(tokenizer: Any) -> None:
    rows = [{"prompt": TALK[:1], "completion": TALK[1:]}]
    (row,) = sft_rows(rows, tokenizer, max_length=None)
    assert tokenizer.decode(row["ids"][row["mask"] > 0]) == "It is blue.<|im_end|>\n"


def test_assistant_only_loss_trains_on_every_assistant_turn(tokenizer: Any) -> None:
    rows = [{"messages": TALK + TALK}]
    (row,) = sft_rows(rows, tokenizer, max_length=None, assistant_only_loss=True)
    assert tokenizer.decode(row["ids"][row["mask"] > 0]) == "It is blue.<|im_end|>" * 2


def test_the_formatting_function_makes_the_text(tokenizer: Any) -> None:
    rows = [{"q": "The", "a": "sky"}]
    (row,) = sft_rows(rows, tokenizer, max_length=None,
                      formatting_func=lambda row: f"{row['q']} {row['a']}")  # fmt: skip
    assert tokenizer.decode(row["ids"]) == "The sky<|im_end|>"


def test_completion_masks_of_tokenized_rows_count_by_default(tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 0]}]
    (row,) = sft_rows(rows, tokenizer, max_length=None)
    assert row["mask"].tolist() == [0, 1, 0]


def test_rows_whose_prompt_fills_max_length_are_dropped_and_counted(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "The sky is " * 20, "completion": "blue"},
        {"prompt": "a", "completion": "b"},
    ]
    with caplog.at_level(logging.WARNING):
        made = sft_rows(rows, tokenizer, max_length=8)
    assert len(made) == 1
    assert "1 of 2 rows dropped" in caplog.text


def test_a_row_whose_only_target_is_its_first_token_is_dropped(tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 6], "labels": [5, -100]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    assert len(sft_rows(rows, tokenizer, max_length=None)) == 1


def test_a_pair_needs_room_for_at_least_one_answer_token(tokenizer: Any) -> None:
    rows = [{"prompt": "The sky is", "chosen": " blue", "rejected": " green"}]
    n = len(tokenizer("The sky is")["input_ids"])
    (row,) = preference_rows(rows, tokenizer, max_length=n + 1)
    assert len(row["chosen"]) == len(row["rejected"]) == n + 1
    with pytest.raises(EmptyDatasetError, match="prompt alone"):
        preference_rows(rows, tokenizer, max_length=n)


def test_a_dataset_that_is_all_dropped_is_an_error_with_the_reason(tokenizer: Any) -> None:
    rows = [{"prompt": "The sky is " * 20, "completion": "blue"}]
    with pytest.raises(EmptyDatasetError, match="nothing to train on within max_length"):
        sft_rows(rows, tokenizer, max_length=8)


def test_both_sides_of_a_pair_share_the_prompt_and_end_with_eos(tokenizer: Any) -> None:
    rows = [
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: I am",
            "rejected": "\n\nHuman: Hi\n\nAssistant: I go",
        }
    ]
    (row,) = preference_rows(rows, tokenizer, max_length=None)
    n = row["prompt_length"]
    assert tokenizer.decode(row["chosen"][:n]) == "\n\nHuman: Hi\n\nAssistant:"
    np.testing.assert_array_equal(row["chosen"][:n], row["rejected"][:n])
    assert row["chosen"][-1] == row["rejected"][-1] == tokenizer.eos_token_id


def test_a_boundary_inside_a_token_is_reported(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "the m", "chosen": "an", "rejected": "a"}]
    with caplog.at_level(logging.WARNING):
        preference_rows(rows, tokenizer, max_length=None)
    assert "tokenized differently" in caplog.text


def test_reward_pairs_are_dropped_never_cut(tokenizer: Any) -> None:
    rows = [
        {"chosen": "The sky " * 20, "rejected": "no"},
        {
            "chosen": "a",
            "rejected": "b",
        },
    ]
    (row,) = reward_rows(rows, tokenizer, max_length=8)
    assert tokenizer.decode(row["chosen"]) == "a<|im_end|>"


def test_a_pair_of_exactly_max_length_is_kept(tokenizer: Any) -> None:
    rows = [{"chosen": "The sky is", "rejected": "The sky"}]
    n = len(tokenizer("The sky is")["input_ids"]) + 1  # and EOS
    assert len(reward_rows(rows, tokenizer, max_length=n)) == 1
    with pytest.raises(EmptyDatasetError, match="longer than max_length"):
        reward_rows(rows, tokenizer, max_length=n - 1)


def test_reward_text_of_a_tokenizer_without_eos_is_left_alone(fresh_tokenizer: Any) -> None:
    # DeBERTa and its kind end with their own separator.
    fresh_tokenizer.eos_token = None
    (row,) = reward_rows([{"chosen": "The sky", "rejected": "b"}], fresh_tokenizer, max_length=None)
    assert fresh_tokenizer.decode(row["chosen"]) == "The sky"


def test_reward_text_may_be_left_cut_off(tokenizer: Any) -> None:
    pair = [{"chosen": "The sky", "rejected": "b"}]
    (ended,), (open_end,) = (
        reward_rows(pair, tokenizer, max_length=None, append_eos=eos) for eos in (True, False)
    )
    assert tokenizer.decode(open_end["chosen"]) == "The sky"
    assert ended["chosen"].tolist() == [*open_end["chosen"].tolist(), tokenizer.eos_token_id]


def test_margins_and_tokenized_pairs_pass_through(tokenizer: Any) -> None:
    rows = [{"chosen_ids": [1, 2], "rejected_ids": [3], "margin": 2}]
    (row,) = reward_rows(rows, tokenizer, max_length=None)
    assert (row["chosen"].tolist(), row["rejected"].tolist(), row["margin"]) == ([1, 2], [3], 2.0)


def test_prompts_carry_all_other_columns(tokenizer: Any) -> None:
    (row,) = prompt_rows([{"prompt": "The sky is", "answer": 3, "topic": "x"}], tokenizer)
    assert tokenizer.decode(row["ids"]) == row["prompt"] == "The sky is"
    assert row["columns"] == {"answer": 3, "topic": "x"}


def test_the_prompt_of_hh_pairs_is_their_shared_prefix(tokenizer: Any) -> None:
    rows = [
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    ]
    (row,) = prompt_rows(rows, tokenizer)
    assert row["prompt"] == tokenizer.decode(row["ids"]) == "\n\nHuman: Hi\n\nAssistant:"


def test_chat_prompts_end_with_the_header_or_stay_open(tokenizer: Any) -> None:
    rows = [{"prompt": TALK[:1]}, {"prompt": [*TALK[:1], assistant("It is")]}]
    fresh, open_ = prompt_rows(rows, tokenizer)
    assert tokenizer.decode(fresh["ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(open_["ids"]).endswith("<|im_start|>assistant\nIt is")


def test_tokenized_prompts_are_decoded_for_reward_functions(tokenizer: Any) -> None:
    ids = tokenizer("The sky")["input_ids"]
    (row,) = prompt_rows([{"input_ids": ids, "attention_mask": [1] * len(ids)}], tokenizer)
    assert row["prompt"] == "The sky"
    assert row["columns"] == {}


def test_tools_reach_the_template_as_lists_or_json(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, chat_template="{{ tools[0].name }}" + tokenizer.chat_template)
    for tools in ('[{"name": "sea"}]', [{"name": "sea", "none": None}]):
        (row,) = prompt_rows([{"prompt": TALK[:1], "tools": tools}], encoder)
        assert tokenizer.decode(row["ids"]).startswith("sea")


def test_template_arguments_come_from_the_row(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, chat_template="{{ 'sea' if thinking }}" + tokenizer.chat_template)
    rows = [{"prompt": TALK[:1], "chat_template_kwargs": {"thinking": True}}]
    (row,) = prompt_rows(rows, encoder)
    assert tokenizer.decode(row["ids"]).startswith("sea")


def test_a_prompt_that_is_too_long_is_named_with_its_length(tokenizer: Any) -> None:
    rows = [{"prompt": "a"}, {"prompt": "The sky is blue"}]
    n = len(tokenizer("The sky is blue")["input_ids"])
    with pytest.raises(PromptTooLongError, match=f"row 1: the prompt has {n} tokens.* for 2"):
        prompt_rows(rows, tokenizer, max_prompt_length=2)


def test_long_prompts_can_be_dropped_or_cut_on_the_left(tokenizer: Any) -> None:
    rows = [{"prompt": "a"}, {"prompt": "The sky is blue"}]
    dropped = prompt_rows(rows, tokenizer, max_prompt_length=2, overlong="drop")
    assert [row["prompt"] for row in dropped] == ["a"]
    assert sum(dropped.counts.values()) == 1
    cut = prompt_rows(rows, tokenizer, max_prompt_length=2, overlong="truncate")
    assert tokenizer.decode(cut[1]["ids"]) == " is blue"


@pytest.mark.parametrize("prepare", [preference_rows, reward_rows])
def test_missing_pair_columns_are_named_with_a_suggestion(prepare: Any, tokenizer: Any) -> None:
    with pytest.raises(
        MissingColumnError, match=r"chosn.*needed: chosen.*Is \"chosn\" the column chosen\?"
    ):
        prepare([{"chosn": "a", "rejected": "b"}], tokenizer, max_length=None)


def test_other_missing_columns_are_named(tokenizer: Any) -> None:
    with pytest.raises(MissingColumnError, match="messages"):
        sft_rows([{"txt": "a"}], tokenizer, max_length=None)
    with pytest.raises(MissingColumnError, match="prompt"):
        prompt_rows([{"question": "a"}], tokenizer)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": None}, "row 1.*text.*NoneType"),
        ({"text": 3}, "row 1.*text.*int: 3"),
        ({"text": b"x" * 200}, r"row 1.*\.\.\."),
    ],
)
def test_cells_that_are_no_text_are_named_with_their_row(
    row: dict, words: str, tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=words):
        sft_rows([{"text": "a"}, row], tokenizer, max_length=None)


@pytest.mark.parametrize(
    "messages",
    [[], "text", [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 3}], [3]],
)
def test_broken_messages_are_named_with_their_row(messages: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1"):
        sft_rows([{"messages": TALK}, {"messages": messages}], tokenizer, max_length=None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries for 2"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "unshifted"),
        ({"input_ids": ["a"]}, "list of integers"),
        ({"input_ids": [[1]]}, "list of integers"),
        ({"input_ids": None}, "list of integers"),
    ],
)
def test_broken_tokenized_rows_are_named(row: dict, words: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=words):
        sft_rows([row], tokenizer, max_length=None)


@pytest.mark.parametrize(
    "options",
    [
        {"completion_only_loss": True},
        {"assistant_only_loss": True},
        {"packing": True},
        {"packing": True, "packing_strategy": "best", "max_length": 8},
    ],
)
def test_options_that_cannot_act_are_errors(options: dict, tokenizer: Any) -> None:
    with pytest.raises(ConfigError):
        sft_rows([{"text": "The sky"}], tokenizer, **{"max_length": None, **options})


def test_an_unknown_policy_for_long_prompts_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="overlong"):
        prompt_rows([{"prompt": "a"}], tokenizer, overlong="keep")  # type: ignore[arg-type]


def test_a_conversation_without_an_assistant_turn_is_an_error_under_assistant_only_loss(
    tokenizer: Any,
) -> None:
    rows = [{"messages": TALK}, {"messages": TALK[:1]}]
    with pytest.raises(DataError, match="row 1"):
        sft_rows(rows, tokenizer, max_length=None, assistant_only_loss=True)


def test_a_tokenizer_without_eos_cannot_end_texts(fresh_tokenizer: Any) -> None:
    fresh_tokenizer.eos_token = None
    with pytest.raises(TokenizerError, match="EOS"):
        sft_rows([{"text": "a"}], fresh_tokenizer, max_length=None)


def test_an_empty_prompt_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row 0.*empty"):
        prompt_rows([{"prompt": ""}], tokenizer)


def test_streams_give_the_same_rows_as_maps_again_and_again(tokenizer: Any) -> None:
    rows = [{"text": f"The sky {i}"} for i in range(1203)]  # more than one chunk
    stream = sft_rows(
        datasets.Dataset.from_list(rows).to_iterable_dataset(), tokenizer, max_length=9
    )
    expected = sft_rows(rows, tokenizer, max_length=9)
    for _ in range(2):
        got = Rows(list(stream))
        assert got.fingerprint() == expected.fingerprint()
        assert len(got) == len(rows)


def test_the_fingerprint_tells_datasets_apart() -> None:
    datasets_ = ([[1, 2], [3]], [[3], [1, 2]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2]])
    made = [Rows([{"ids": np.array(ids)} for ids in rows]).fingerprint() for rows in datasets_]
    assert len(set(made)) == len(made)
