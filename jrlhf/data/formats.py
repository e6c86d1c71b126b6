"""TRL's dataset types: what a row is, and conversions between them.

A row is *standard* (strings) or *conversational* (lists of messages with role and content). Nothing
here mutates its argument and nothing here tokenizes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jrlhf.errors import DataError

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]
Text = TypeVar("Text", str, list)

MESSAGE_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")

# Names that ShareGPT-style files give to the two sides. Templates know only user and assistant.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, in role/content or from/value spelling."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return "role" in value[0] or "from" in value[0]


def to_chatml(row: Row) -> dict[str, Any]:
    """Returns the row with from/value messages as role/content and `conversations` as `messages`.

    Differs from TRL's `maybe_convert_to_chatml` in that ShareGPT's "human" and "gpt" become "user"
    and "assistant", the only names chat templates know.
    """
    out = dict(row)
    if "conversations" in out:
        conversations = out.pop("conversations")
        if out.get("messages") is None:
            out["messages"] = conversations
    for column in MESSAGE_COLUMNS:
        if is_messages(out.get(column)):
            out[column] = [_chatml_message(message) for message in out[column]]
    return out


def _chatml_message(message: dict[str, Any]) -> dict[str, Any]:
    # `datasets` fills keys that a message lacks with None; templates would print "None".
    out = {key: value for key, value in message.items() if value is not None}
    if "role" not in out and "from" in out:
        role = out.pop("from")
        out["role"] = SHAREGPT_ROLES.get(role, role)
    if "content" not in out and "value" in out:
        out["content"] = out.pop("value")
    return out


def check_messages(value: Any, where: str) -> Messages:
    """Returns the messages of one cell after checking them.

    Raises:
        DataError: not a non-empty list of messages with a role and a content (or tool calls).
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must hold a non-empty list of messages, got {shown(value)}.")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}, message {number}: expected a dict with the keys role and content, "
                f"got {shown(message)}."
            )
        content = message.get("content")
        if not isinstance(content, (str, list)) and not message.get("tool_calls"):
            raise DataError(f"{where}, message {number}: content must be text: {shown(content)}.")
    return value


def shown(value: Any) -> str:
    """A value as error messages show it: its type and at most 80 characters."""
    text = repr(value)
    return f"{type(value).__name__}: {text if len(text) <= 80 else text[:77] + '...'}"


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Splits an implicit-prompt pair into (prompt, chosen rest, rejected rest).

    `prompt + rest` is exactly the original on both sides. Where TRL cuts at the first differing
    character, this cuts where a tokenizer would: never inside a word, the space before a word goes
    with the word, and in HH-RLHF dialogues after the last shared "\\n\\nAssistant:". Neither side
    is left empty when it was not empty before. (TRL's version wraps around to index -1 when the
    first characters differ, and raises UnboundLocalError when a side is empty.)

    Args:
        chosen: the whole preferred text, or its messages.
        rejected: the whole other text, or its messages.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _string_cut(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        # Identical conversations keep their last message as the answer.
        cut = min(_shared(chosen, rejected), max(min(len(chosen), len(rejected)) - 1, 0))
    else:
        raise DataError(
            "chosen and rejected must both be text or both be messages, got "
            f"{shown(chosen)} and {shown(rejected)}."
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common prefix, by bisection: slices compare faster than a loop over them."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _string_cut(chosen: str, rejected: str) -> int:
    shared = _shared(chosen, rejected)
    if chosen.startswith(HH_HUMAN) and rejected.startswith(HH_HUMAN):
        turn = chosen.rfind(HH_ASSISTANT, 0, shared)
        if turn >= 0:
            return turn + len(HH_ASSISTANT)
    cut = shared
    if cut and cut == min(len(chosen), len(rejected)):
        cut -= 1  # one side is a prefix of the other: something of it must stay an answer
        while cut and chosen[cut].isspace():
            cut -= 1
    while cut and (_inside_word(chosen, cut) or _inside_word(rejected, cut)):
        cut -= 1
    if cut and chosen[cut - 1] == " ":
        cut -= 1  # byte-level and sentencepiece tokens carry the space before the word
    return cut


def _inside_word(text: str, cut: int) -> bool:
    """Whether cutting here would part a word, or a letter from its accent."""
    if cut >= len(text):
        return False
    before, after = text[cut - 1], text[cut]
    if unicodedata.combining(after) or after in "\u200d\ufe0f" or before == "\u200d":
        return True
    return _joins(before) and _joins(after)


def _joins(char: str) -> bool:
    # Chinese and Japanese write no spaces: there every character is a boundary.
    return char.isalnum() and unicodedata.east_asian_width(char) not in "WF"


def split_preference(row: Row, where: str) -> dict[str, Any]:
    """Returns the row with an explicit prompt, extracting it where it is implicit.

    A text prompt beside conversational answers (as in UltraFeedback) is the first user message once
    more: the conversation's own shared prefix is used.
    """
    for column in ("chosen", "rejected"):
        if not isinstance(row.get(column), (str, list)):
            raise DataError(
                f"{where}: {column} must hold text or messages, got {shown(row.get(column))}."
            )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    same = type(chosen) is type(rejected)
    if same and (prompt is None or (isinstance(prompt, str) and isinstance(chosen, list))):
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
    if not same or type(prompt) is not type(chosen):
        raise DataError(
            f"{where}: prompt, chosen and rejected must all be text or all be messages, got "
            f"{shown(prompt)}; {shown(chosen)}; {shown(rejected)}."
        )
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}
