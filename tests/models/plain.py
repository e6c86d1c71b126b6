"""A text's tokens and nothing else."""

from __future__ import annotations

from typing import Any


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text: no special token is parsed in it, none is added around it."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(ids["input_ids"])
