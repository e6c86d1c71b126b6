"""Tokenizers of every model we read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jrlhf.errors import TokenizerError
from jrlhf.models import gguf_tokenizer, glassllm, hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What tokenizer.json says, too: where it lies, nothing is read from them.
VOCABULARIES = (
    "tokenizer.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    *VOCABULARIES,
)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Loads the fast tokenizer of a model directory, hub id, GGUF file or glassllm model.

    Args:
        source: as in `load_pretrained`.

    Returns:
        A transformers fast tokenizer.

    Raises:
        MissingFileError: there is no such path and no such model on the hub.
        TokenizerError: the files hold no tokenizer, or one that is not implemented.
    """
    kind, path = hub.kind_of(hub.resolve(source, weights=False))
    if kind == "gguf":
        return _wrap(*gguf_tokenizer.tokenizer_backend(path))
    if kind == "glassllm":
        return _glassllm(path)
    return _from_directory(path)


def _wrap(backend: Any, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def _glassllm(path: Path) -> PreTrainedTokenizerBase:
    roles = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), glassllm.SPECIALS))
    config = glassllm.GlassLLMCheckpoint(path).config
    length = {"model_max_length": config["max_position_embeddings"]}
    settings = roles | length | {"clean_up_tokenization_spaces": False}
    return _wrap(glassllm.tokenizer_backend(path.with_suffix(".tokenizer.json")), settings)


def _from_directory(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # The base class reads tokenizer.json as it stands. The classes that AutoTokenizer picks by name
    # rebuild parts of it: its GPT2Tokenizer drops SmolLM2's splitting of digits.
    fast = (path / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if fast else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        found = [name for name in FILES if (path / name).is_file()]
        raise TokenizerError(
            f"{path} has no tokenizer that loads (files: {', '.join(found) or 'none'}): {error}"
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{path} has only a slow tokenizer; add a tokenizer.json.")
    return tokenizer


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every text the same ids."""
    return one is other or _rules(one) == _rules(other)


def _rules(tokenizer: Any) -> Any:
    """What decides a tokenizer's ids: its tokenizer.json without the batching options."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    rules = json.loads(backend.to_str())
    return {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
