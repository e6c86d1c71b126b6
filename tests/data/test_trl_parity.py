"""The same rows through TRL's own preparation and ours give the same ids and masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from jrlhf.data.encode import Encoder
from jrlhf.data.pack import best_fit_decreasing
from jrlhf.data.tokenize import preference_rows, prompt_rows, reward_rows, sft_rows

pytest.importorskip("trl")
pytestmark = pytest.mark.parity


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def ask(text: str) -> list[dict[str, str]]:
    return [message("system", "You are a helpful assistant."), message("user", text)]


def answer(text: str) -> list[dict[str, str]]:
    return [message("assistant", text)]


TEXT = [{"text": "The sky is blue", "label": 1}, {"text": "It is green.<|im_end|>", "label": 0}]
SPLIT = [
    {"prompt": "What color is", "completion": " the sky?"},
    {"prompt": "the wom", "completion": "an went"},  # the boundary falls inside a token
    {"prompt": "", "completion": "It is blue<|im_end|>"},
]
TALKS = [
    {"messages": [*ask("What color is the sky?"), *answer("It is blue.")]},
    {"messages": [*ask("How\n"), *answer("\n\nI am"), message("user", "?"), *answer("fine")]},
]
SHAREGPT = [
    {"conversations": [{"from": "user", "value": "How?"}, {"from": "assistant", "value": "so"}]}
]
SPLIT_TALKS = [{"prompt": ask("What?"), "completion": answer("the sky")}]
PAIRS = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": "the wom", "chosen": "an", "rejected": "en went to the market and the sea"},
    {"prompt": "the wom", "chosen": " is", "rejected": "an went"},  # only one side merges
]
PAIR_TALKS = [{"prompt": ask("What?"), "chosen": answer("blue"), "rejected": answer("the\n grass")}]
IMPLICIT_TALKS = [
    {"chosen": ask("What?") + answer("blue"), "rejected": ask("What?") + answer("green")}
]


def trl_sft(rows: list, tokenizer: Any, **options: Any) -> list[tuple[list, list]]:
    from trl.trainer.sft_trainer import SFTTrainer

    dataset = datasets.Dataset.from_list(rows)
    auto = "prompt" in rows[0] and "completion" in rows[0]
    # All that the method reads of its trainer and config.
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        max_length=options.get("max_length"),
        assistant_only_loss=options.get("assistant_only_loss", False),
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None,
        completion_only_loss=options.get("completion_only_loss", auto),
    )
    got = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in got]


def check_sft(rows: list, tokenizer: Any, **options: Any) -> None:
    # TRL parses special tokens anywhere; rows without them are the same with and without the guard.
    ours = sft_rows(rows, tokenizer, **{"max_length": None, **options})
    theirs = trl_sft(rows, tokenizer, **options)
    assert len(ours) == len(theirs)
    for row, (ids, labels) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(row["ids"], ids)
        np.testing.assert_array_equal(np.where(row["mask"], row["ids"], -100), labels)


@pytest.mark.parametrize("rows", [TEXT, SPLIT, TALKS, SHAREGPT, SPLIT_TALKS])
@pytest.mark.parametrize("kind", ["tokenizer", "bos_tokenizer"])
def test_sft_rows_equal_trl(rows: list, kind: str, request: pytest.FixtureRequest) -> None:
    check_sft(rows, request.getfixturevalue(kind))


@pytest.mark.parametrize("rows", [SPLIT, SPLIT_TALKS])
def test_whole_sequences_equal_trl_without_completion_only_loss(rows: list, tokenizer: Any) -> None:
    check_sft(rows, tokenizer, completion_only_loss=False)


@pytest.mark.parametrize("rows", [TALKS, SPLIT_TALKS])
def test_assistant_masks_equal_trl(rows: list, tokenizer: Any) -> None:
    check_sft(rows, tokenizer, assistant_only_loss=True)


@pytest.mark.parametrize("max_length", [3, 9, 14])
def test_truncated_rows_equal_trl(max_length: int, tokenizer: Any) -> None:
    check_sft(SPLIT, tokenizer, max_length=max_length)
    check_sft(TALKS, tokenizer, max_length=max_length)


def test_tokenized_rows_equal_trl(tokenizer: Any) -> None:
    rows = [
        {
            "input_ids": [5, 6, 7, 8],
            "assistant_masks": [0, 1, 0, 1],
            "completion_mask": [0, 0, 1, 1],
        }
    ]
    check_sft(rows, tokenizer, completion_only_loss=True)
    check_sft([{"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}], tokenizer)


def trl_dpo(rows: list, tokenizer: Any, max_length: int | None, mode: str) -> list[dict]:
    from trl.trainer.dpo_trainer import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    dataset = datasets.Dataset.from_list(rows)
    return list(DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train"))


@pytest.mark.parametrize("rows", [PAIRS, PAIR_TALKS, IMPLICIT_TALKS])
@pytest.mark.parametrize("max_length", [None, 8, 60])
@pytest.mark.parametrize("kind", ["tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_preference_rows_and_their_batch_equal_trl(
    rows: list, max_length: int | None, kind: str, mode: Any, request: pytest.FixtureRequest
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from jrlhf.data.collate import pair_batch
    from jrlhf.errors import EmptyDatasetError

    tokenizer = request.getfixturevalue(kind)
    theirs = trl_dpo(rows, tokenizer, max_length, mode)
    if not theirs:
        with pytest.raises(EmptyDatasetError):
            preference_rows(rows, tokenizer, max_length=max_length, truncation_mode=mode)
        return
    ours = preference_rows(rows, tokenizer, max_length=max_length, truncation_mode=mode)
    collate = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    batch = collate(theirs)
    length = batch["input_ids"].shape[1]
    mine = pair_batch(ours, len(theirs), length=length)
    for side in (0, 1):
        part = slice(side * len(theirs), (side + 1) * len(theirs))
        np.testing.assert_array_equal(mine["ids"][:, side], batch["input_ids"][part])
        np.testing.assert_array_equal(
            mine["lengths"][:, side], batch["attention_mask"][part].sum(1)
        )
        mask = batch["completion_mask"][part].numpy().copy()
        mask[:, 0] = 0  # TRL shifts it away
        np.testing.assert_array_equal(mine["mask"][:, side], mask)


@pytest.mark.parametrize(
    "rows",
    [
        PAIRS,
        PAIR_TALKS,
        IMPLICIT_TALKS,
        [{"chosen": "It is blue", "rejected": "no", "margin": 0.5}],
    ],
)
@pytest.mark.parametrize("max_length", [None, 10, 40])
def test_reward_rows_equal_trl(rows: list, max_length: int | None, tokenizer: Any) -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    from jrlhf.errors import EmptyDatasetError

    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    dataset = datasets.Dataset.from_list(rows)
    theirs = list(RewardTrainer._prepare_dataset(None, dataset, tokenizer, args, "train"))
    if not theirs:
        with pytest.raises(EmptyDatasetError):
            reward_rows(rows, tokenizer, max_length=max_length)
        return
    ours = reward_rows(rows, tokenizer, max_length=max_length)
    for mine, row in zip(ours, theirs, strict=True):
        assert mine["chosen"].tolist() == row["chosen_ids"]
        assert mine["rejected"].tolist() == row["rejected_ids"]
        assert mine.get("margin") == row.get("margin")


def test_prompts_equal_what_grpo_samples_from(tokenizer: Any) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(processing_class=tokenizer, _is_vlm=False, environment_factories=None,
                              tools=None, chat_template=None, chat_template_kwargs={})  # fmt: skip
    for prompts in (["The sky is", "What color"], [ask("What?"), ask("How?\n")]):
        theirs = GRPOTrainer._tokenize_prompts(trainer, prompts)[0]
        ours = prompt_rows([{"prompt": p} for p in prompts], tokenizer)
        assert [row["ids"].tolist() for row in ours] == theirs


def test_trusted_text_with_special_tokens_equals_trl(tokenizer: Any) -> None:
    rows = [{"text": "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>"}]
    (ours,) = sft_rows(rows, Encoder(tokenizer, parse_special_tokens=True), max_length=None)
    ((ids, _),) = trl_sft(rows, tokenizer)
    assert ours["ids"].tolist() == ids


def test_extracted_prompts_equal_trl_where_trl_is_right() -> None:
    from trl.data_utils import extract_prompt as theirs

    from jrlhf.data.formats import extract_prompt

    pairs = [
        ("The sky is blue.", "The sky is green."),
        (ask("a") + answer("b"), ask("a") + answer("c")),
    ]
    for chosen, rejected in pairs:
        got = theirs({"chosen": chosen, "rejected": rejected})
        assert extract_prompt(chosen, rejected) == (got["prompt"], got["chosen"], got["rejected"])


def test_packing_fills_the_same_bins_as_trl() -> None:
    from trl import pack_dataset

    lengths = np.random.default_rng(0).integers(1, 33, 300).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * n for i, n in enumerate(lengths)]})
    theirs = [sorted(row["seq_lengths"]) for row in pack_dataset(rows, 32)]
    ours = [sorted(lengths[i] for i in members) for members in best_fit_decreasing(lengths, 32)]
    assert sorted(ours) == sorted(theirs)
