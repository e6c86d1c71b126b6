"""Dataset rows to token rows, as TRL's trainers prepare them.

Where the EOS token is appended, where the completion begins, what is cut and what is dropped follow
TRL 1.16; the tests compare with its own functions. Differences, all deliberate: user text never
turns into special tokens (unless `parse_special_tokens`), a tokenizer that adds EOS itself does not
add two, a sampled prompt that ends in an assistant message is continued, and what is dropped is
counted aloud.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np

from jrlhf.data.cells import Row, common_prefix, encode_columns, ids_cell, joined_prompt, places
from jrlhf.data.encode import Encoder, Ids, as_encoder
from jrlhf.data.formats import is_messages, shown, split_preference, to_chatml
from jrlhf.data.pack import pack
from jrlhf.data.rows import Rows, RowStream, TokenRow, first_row, prepare
from jrlhf.data.sources import require_columns
from jrlhf.errors import ConfigError, DataError, PromptTooLongError

NO_TARGET = "dropped: nothing to train on within max_length"
PROMPT_FILLS = "dropped: the prompt alone fills max_length"
TOO_LONG = "dropped: a side is longer than max_length"
MERGED = "have a prompt that is tokenized differently when its answer follows"
GUARDED = "texts hold special tokens, read as ordinary text (parse_special_tokens=False)"
LONG_PROMPT = {"drop": "dropped: prompt too long", "truncate": "prompts cut on the left"}


def sft_rows(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    packing: bool = False,
    packing_strategy: str = "bfd",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    dataset_text_field: str = "text",
    formatting_func: Callable[[Row], str] | None = None,
    name: str = "train",
) -> Rows | RowStream:
    """Tokenizes for supervised fine-tuning.

    Args:
        dataset: rows of text | messages | prompt + completion | input_ids (+ labels,
            completion_mask or assistant_masks).
        tokenizer: a transformers tokenizer, or an `Encoder` with options.
        max_length: rows are cut there; those left without a target are dropped.
        packing: put several documents into rows of `max_length`.
        packing_strategy: see `pack`.
        completion_only_loss: train on the completion alone; None: where the dataset has one.
        assistant_only_loss: train on the assistant's turns alone.
        dataset_text_field: the column of text.
        formatting_func: makes the text from a row.
        name: the dataset's name in messages.

    Returns:
        Rows of ids and mask (packed: and seq_lengths).
    """
    if packing and max_length is None:
        raise ConfigError("packing=True needs max_length.")
    first = to_chatml(first_row(dataset, name))
    kind = "text" if formatting_func else _sft_kind(first, dataset_text_field, name)
    completion = _completion_only(completion_only_loss, kind, first)
    _check_assistant_only(assistant_only_loss, kind, first)
    encoder = as_encoder(tokenizer)

    def chunk(rows: list[Row], where: list[str], counts: Counter[str]) -> Iterator[TokenRow]:
        if formatting_func:
            rows = [{dataset_text_field: formatting_func(row)} for row in rows]
        rows = [to_chatml(row) for row in rows]
        made: Iterable[TokenRow]
        if kind == "tokenized":
            made = [_tokenized(row, completion, at) for row, at in zip(rows, where, strict=True)]
        elif kind == "prompt-completion":
            made = _prompt_completion(encoder, rows, where, completion, assistant_only_loss, counts)
        else:
            column = dataset_text_field if kind == "text" else "messages"
            made = encode_columns(encoder, rows, (column,), where, assistant=assistant_only_loss)
        yield from made if packing else _cut(made, max_length, counts)

    def then(rows: Iterable[TokenRow]) -> Iterator[TokenRow]:
        return pack(rows, max_length=max_length or 0, strategy=packing_strategy)

    return _run(dataset, encoder, chunk, name=name, then=then if packing else None)


def _run(dataset: Any, encoder: Encoder, chunk: Any, *, name: str, then: Any = None) -> Any:
    """`prepare` with rows named and guarded texts counted."""
    counts: Counter[str] = Counter()

    def named(rows: list[Row], start: int) -> Iterator[TokenRow]:
        before = encoder.guarded
        yield from chunk(rows, places(name, start, rows), counts)
        counts[GUARDED] += encoder.guarded - before

    return prepare(dataset, named, name=name, counts=counts, then=then)


def _cut(
    rows: Iterable[TokenRow], max_length: int | None, counts: Counter[str]
) -> Iterator[TokenRow]:
    for row in rows:
        row = {key: value[:max_length] for key, value in row.items()}
        if row["mask"][1:].any():  # the first token has nothing to be predicted from
            yield row
        else:
            counts[NO_TARGET] += 1


def _check_assistant_only(asked: bool, kind: str, row: Row) -> None:
    if asked and not (kind == "messages" or is_messages(row.get("prompt"))):
        raise ConfigError(
            "assistant_only_loss=True needs a conversational dataset: messages, or prompt + "
            "completion as messages. (Tokenized rows carry assistant_masks, which always apply.)"
        )


def _sft_kind(
    row: Row, text: str, name: str
) -> Literal["tokenized", "prompt-completion", "messages", "text"]:
    wanted = [(text,), ("messages",), ("prompt", "completion"), ("input_ids",)]
    require_columns(row, wanted, name=name)
    if "input_ids" in row:
        return "tokenized"
    if "prompt" in row and "completion" in row:
        return "prompt-completion"
    return "messages" if is_messages(row.get("messages")) or text not in row else "text"


def _completion_only(asked: bool | None, kind: str, row: Row) -> bool:
    has = kind == "prompt-completion" or (kind == "tokenized" and "completion_mask" in row)
    if asked and not has and "labels" not in row:
        raise ConfigError(
            "completion_only_loss=True needs a dataset that says what the completion is: the "
            "columns prompt + completion, or input_ids + completion_mask."
        )
    return has if asked is None else asked


def _tokenized(row: Row, completion_only: bool, where: str) -> TokenRow:
    ids = ids_cell(row, "input_ids", where)
    mask = np.ones(len(ids), np.uint8)
    if row.get("labels") is not None:
        labels = ids_cell(row, "labels", where, length=len(ids))
        mask = (labels != -100).astype(np.uint8)
        if not (labels == ids)[mask > 0].all():
            raise DataError(
                f"{where}: labels must repeat input_ids (unshifted) or be -100, and they differ."
            )
        return {"ids": ids, "mask": mask}
    columns = ["completion_mask"] * completion_only + ["assistant_masks"]
    for column in columns:
        if row.get(column) is not None:
            mask &= ids_cell(row, column, where, length=len(ids)) > 0
    return {"ids": ids, "mask": mask}


def _prompt_completion(
    encoder: Encoder,
    rows: list[Row],
    where: list[str],
    completion_only: bool,
    assistant_only: bool,
    counts: Counter[str],
) -> Iterator[TokenRow]:
    prompts = encode_columns(encoder, rows, ("prompt",), where)
    whole = encode_columns(encoder, rows, ("prompt", "completion"), where, assistant=assistant_only)
    for prompt, row in zip(prompts, whole, strict=True):
        begin = common_prefix(prompt["ids"], row["ids"])
        counts[MERGED] += begin < len(prompt["ids"])
        if completion_only:
            row["mask"][:begin] = 0
        yield row


def preference_rows(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start",
    name: str = "train",
) -> Rows | RowStream:
    """Tokenizes preference pairs with a prompt, given or extracted (DPO).

    Args:
        dataset: rows of (prompt,) chosen, rejected; text or messages.
        tokenizer: a transformers tokenizer, or an `Encoder` with options.
        max_length: prompt and answer together are cut to this.
        truncation_mode: "keep_start" cuts at the end, and drops pairs whose prompt alone fills
            `max_length`; "keep_end" cuts at the beginning, each side by what it is too long.
        name: the dataset's name in messages.

    Returns:
        Rows of chosen and rejected (each prompt and answer), prompt_length (of both, or of each).
    """
    require_columns(first_row(dataset, name), [("chosen", "rejected")], name=name)
    encoder = as_encoder(tokenizer)

    def chunk(rows: list[Row], where: list[str], counts: Counter[str]) -> Iterator[TokenRow]:
        rows = [split_preference(to_chatml(row), at) for row, at in zip(rows, where, strict=True)]
        texts = [("prompt",), ("prompt", "chosen"), ("prompt", "rejected")]
        parts = [_ids_of(encode_columns(encoder, rows, columns, where)) for columns in texts]
        for prompt, good, bad in zip(*parts, strict=True):
            begin = min(common_prefix(prompt, good), common_prefix(prompt, bad))
            counts[MERGED] += begin < len(prompt)
            if max_length is not None and truncation_mode == "keep_end":
                left = [max(0, begin - max(0, len(ids) - max_length)) for ids in (good, bad)]
                good, bad = good[-max_length:], bad[-max_length:]
                yield {"chosen": good, "rejected": bad, "prompt_length": left}
            elif max_length is not None and begin >= max_length:
                counts[PROMPT_FILLS] += 1
            else:
                good, bad = good[:max_length], bad[:max_length]
                yield {"chosen": good, "rejected": bad, "prompt_length": begin}

    return _run(dataset, encoder, chunk, name=name)


def reward_rows(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    append_eos: bool = True,
    name: str = "train",
) -> Rows | RowStream:
    """Tokenizes pairs for a reward model: each side whole, with its prompt if there is one.

    Args:
        dataset: rows of chosen, rejected (, prompt, margin), or chosen_ids and rejected_ids.
        tokenizer: a transformers tokenizer, or an `Encoder` with options.
        max_length: pairs with a longer side are dropped, never cut: the score is read at the end.
        append_eos: end plain text with EOS, if the tokenizer has one.
        name: the dataset's name in messages.

    Returns:
        Rows of chosen, rejected, prompt_length (always 0) and margin where given.
    """
    first = first_row(dataset, name)
    require_columns(first, [("chosen", "rejected"), ("chosen_ids", "rejected_ids")], name=name)
    encoder = as_encoder(tokenizer)

    def side(rows: list[Row], which: str, where: list[str]) -> list[Ids]:
        if "chosen_ids" in first:
            return [ids_cell(r, f"{which}_ids", at) for r, at in zip(rows, where, strict=True)]
        whole = [joined_prompt(to_chatml(r), which, at) for r, at in zip(rows, where, strict=True)]
        eos: Literal["if known", "never"] = "if known" if append_eos else "never"
        return _ids_of(encode_columns(encoder, whole, (which,), where, eos=eos))

    def chunk(rows: list[Row], where: list[str], counts: Counter[str]) -> Iterator[TokenRow]:
        sides = [side(rows, which, where) for which in ("chosen", "rejected")]
        for row, at, good, bad in zip(rows, where, *sides, strict=True):
            if max_length is not None and max(len(good), len(bad)) > max_length:
                counts[TOO_LONG] += 1
                continue
            given = row.get("margin")
            if given is not None and not isinstance(given, int | float):
                raise DataError(f"{at}: margin must be a number, got {shown(given)}.")
            margin = {} if given is None else {"margin": float(given)}
            yield {"chosen": good, "rejected": bad, "prompt_length": 0, **margin}

    return _run(dataset, encoder, chunk, name=name)


def prompt_rows(
    dataset: Any,
    tokenizer: Any,
    *,
    max_prompt_length: int | None = None,
    overlong: Literal["error", "drop", "truncate"] = "error",
    name: str = "train",
) -> Rows | RowStream:
    """Tokenizes prompts to sample from (PPO, GRPO).

    Args:
        dataset: rows of prompt (text or messages), of input_ids, or of chosen and rejected, whose
            shared prefix is the prompt. Conversational prompts end with the header of an assistant
            turn, or stay open where their last message is the assistant's.
        tokenizer: a transformers tokenizer, or an `Encoder` with options.
        max_prompt_length: most tokens of a prompt.
        overlong: what becomes of a longer one; "truncate" keeps its last tokens.
        name: the dataset's name in messages.

    Returns:
        Rows of ids, prompt (as in the dataset) and columns, a dict of all other columns.

    Raises:
        PromptTooLongError: a prompt is too long and `overlong` is "error".
    """
    if overlong not in ("error", *LONG_PROMPT):
        raise ConfigError(f"overlong must be error, drop or truncate, got {overlong!r}.")
    first = first_row(dataset, name)
    require_columns(first, [("prompt",), ("input_ids",), ("chosen", "rejected")], name=name)
    encoder = as_encoder(tokenizer)

    def chunk(rows: list[Row], where: list[str], counts: Counter[str]) -> Iterator[TokenRow]:
        prompts = _prompts(encoder, [to_chatml(row) for row in rows], where)
        for row, at, (ids, prompt) in zip(rows, where, prompts, strict=True):
            if not len(ids):
                raise DataError(f"{at}: the prompt is empty; nothing can be sampled from it.")
            if max_prompt_length is not None and len(ids) > max_prompt_length:
                if overlong == "error":
                    raise PromptTooLongError(_too_long(at, len(ids), max_prompt_length))
                counts[LONG_PROMPT[overlong]] += 1
                if overlong == "drop":
                    continue
                ids = ids[-max_prompt_length:]
            taken = ("prompt", "input_ids", "attention_mask")
            columns = {key: value for key, value in row.items() if key not in taken}
            yield {"ids": ids, "prompt": prompt, "columns": columns}

    return _run(dataset, encoder, chunk, name=name)


def _prompts(encoder: Encoder, rows: list[Row], where: list[str]) -> list[tuple[Ids, Any]]:
    """Ids of each prompt, and the prompt itself."""
    if rows and rows[0].get("input_ids") is not None:
        decode = encoder.tokenizer.decode
        made = [ids_cell(row, "input_ids", at) for row, at in zip(rows, where, strict=True)]
        return [
            (ids, decode(ids.tolist()) if row.get("prompt") is None else row["prompt"])
            for ids, row in zip(made, rows, strict=True)
        ]
    if rows and rows[0].get("prompt") is None:
        rows = [split_preference(row, at) for row, at in zip(rows, where, strict=True)]
    made = _ids_of(encode_columns(encoder, rows, ("prompt",), where, continue_assistant=True))
    return [(ids, row["prompt"]) for ids, row in zip(made, rows, strict=True)]


def _ids_of(rows: Iterable[TokenRow]) -> list[Ids]:
    return [row["ids"] for row in rows]


def _too_long(where: str, length: int, limit: int) -> str:
    return (
        f"{where}: the prompt has {length} tokens, but there is room for {limit}. Raise "
        'max_prompt_length (or shorten the completions), or set overlong_prompts to "drop" or '
        '"truncate".'
    )
