"""Checked access to the cells of dataset rows, and their encoding column by column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jrlhf.data.encode import Encoder, Ids
from jrlhf.data.formats import check_messages, shown
from jrlhf.data.rows import TokenRow
from jrlhf.data.templates import Chat
from jrlhf.errors import DataError

Row = dict[str, Any]


def places(name: str, start: int, rows: Sequence[Row]) -> list[str]:
    """How error messages name each row."""
    return [f"{name} dataset, row {start + number}" for number in range(len(rows))]


def ids_cell(row: Row, column: str, where: str, *, length: int | None = None) -> Ids:
    """A cell of integers.

    Raises:
        DataError: it holds something else, or not `length` of them.
    """
    value = row.get(column)
    array = np.asarray(value if value is not None else [""])
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise DataError(f"{where}: {column} must be a list of integers, got {shown(value)}.")
    if length is not None and len(array) != length:
        raise DataError(f"{where}: {column} has {len(array)} entries for {length} input_ids.")
    return array.astype(np.int32)


def text_cell(row: Row, column: str, where: str) -> str:
    """A cell of text.

    Raises:
        DataError: it holds something else.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} must be text, got {shown(value)}.")
    return value


def common_prefix(a: Ids, b: Ids) -> int:
    """Tokens that two sequences share at the start."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def joined_prompt(row: Row, column: str, where: str) -> Row:
    """The row with its prompt, if it has one, put before the answer in `column`.

    A text prompt beside a conversational answer repeats the first message and is left out.
    """
    prompt: Any = row.get("prompt")
    answer: Any = row.get(column)
    if prompt is None or (isinstance(prompt, str) and isinstance(answer, list)):
        return row
    if not any(isinstance(prompt, kind) and isinstance(answer, kind) for kind in (str, list)):
        raise DataError(
            f"{where}: prompt and {column} must both be text or both be messages, got "
            f"{shown(prompt)}; {shown(answer)}."
        )
    return {**row, column: prompt + answer}


def encode_columns(
    encoder: Encoder,
    rows: Sequence[Row],
    columns: Sequence[str],
    where: Sequence[str],
    *,
    assistant: bool = False,
    continue_assistant: bool = False,
    eos: Literal["always", "if known", "never"] = "always",
) -> list[TokenRow]:
    """Encodes the joined columns of each row: ids, and the mask of what may be trained on.

    Text that does not end with the prompt gets EOS, as in TRL; conversations end as their template
    ends them, and a conversational prompt ends with the header of an assistant turn.

    Args:
        encoder: the tokenizer.
        rows: dataset rows.
        columns: to be joined, e.g. prompt and completion.
        where: the rows' names.
        assistant: mask everything but the assistant's turns.
        continue_assistant: leave a prompt open whose last message is the assistant's.
        eos: how plain text ends; "always" makes a tokenizer without EOS token an error.
    """
    if not rows:
        return []
    if not isinstance(rows[0].get(columns[-1]), list):
        texts = ["".join(text_cell(row, column, at) for column in columns)
                 for row, at in zip(rows, where, strict=True)]  # fmt: skip
        known = eos == "if known" and encoder.tokenizer.eos_token is not None
        ends = columns[-1] != "prompt" and (eos == "always" or known)
        return _unmasked(encoder.texts(texts, eos=ends))
    chats = [_chat(row, columns, at) for row, at in zip(rows, where, strict=True)]
    if assistant:
        made = encoder.assistant_chats(chats, where=where)
        for (_, mask), at in zip(made, where, strict=True):
            if not mask.any():
                raise DataError(f"{at}: assistant_only_loss=True, but no assistant turn is marked.")
        return [{"ids": ids, "mask": mask} for ids, mask in made]
    prompts = columns[-1] == "prompt"
    going_on = [prompts and continue_assistant and chat.messages[-1]["role"] == "assistant"
                for chat in chats]  # fmt: skip
    header = [prompts and not open_ for open_ in going_on]
    return _unmasked(
        encoder.chats(
            chats, add_generation_prompt=header, continue_final_message=going_on, where=where
        )
    )


def _unmasked(sequences: Sequence[Ids]) -> list[TokenRow]:
    return [{"ids": ids, "mask": np.ones(len(ids), np.uint8)} for ids in sequences]


def _chat(row: Row, columns: Sequence[str], where: str) -> Chat:
    messages = []
    for column in columns:
        messages += check_messages(row.get(column), f"{where}, {column}")
    return Chat(messages, _tools(row, where), row.get("chat_template_kwargs"))


def _tools(row: Row, where: str) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: tools is not valid JSON: {error}") from error
    return _without_none(tools) or None


def _without_none(value: Any) -> Any:
    """Drops the None entries that `datasets` puts where a row lacks another row's key."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value
