"""Which ids begin, end and pad a text, where a config and a tokenizer differ.

A checkpoint's config knows its model; its ids count beside the tokenizer's. A config alone may say
no more than its class's default (2 of every Llama), which is some word of another tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ends(ids: list[int], tokenizer: PreTrainedTokenizerBase, *, alone: bool) -> list[int]:
    """Every id that ends a text: the config's, then the tokenizer's.

    Args:
        ids: of the config.
        tokenizer: of the texts.
        alone: there is a config and no checkpoint: its ids count if the tokenizer's is among them.
    """
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    heard = not alone or bool(own and own[0] in ids)
    return list(dict.fromkeys([*(ids if heard else []), *own]))


def align(
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    alone: bool,
) -> None:
    """Tells a saved model's configs its tokenizer's special tokens, as transformers' Trainer does.

    A token that the tokenizer does not have is left as it is. An end is added to those of the
    generation config, and to a list in config.json; it replaces a single one there.

    Args:
        config: what config.json will say; changed.
        generation: what generation_config.json will say; changed. None: there is none.
        tokenizer: of the model.
        alone: as in `ends`.
    """
    for key in ("bos_token_id", "pad_token_id"):
        if (found := getattr(tokenizer, key)) is not None:
            for values in (config, generation):
                if values is not None:
                    values[key] = found
    end = tokenizer.eos_token_id
    if end is None:
        return
    several = isinstance(config.get("eos_token_id"), list)
    known = as_ids(config.get("eos_token_id"))
    if end not in known:
        config["eos_token_id"] = [end, *known] if several and not alone else end
    if generation is not None:
        listed = as_ids(generation.get("eos_token_id"))
        if end not in listed:
            ids = [end] if alone else [end, *listed]
            generation["eos_token_id"] = ids if len(ids) > 1 else end


def as_ids(found: Any) -> list[Any]:
    """A config's `eos_token_id` as a list: it says one, several or none."""
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]
