"""Tokenizers of every model we read, and what is written beside a saved one."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jrlhf.errors import ModelError, TokenizerError
from jrlhf.models import gguf_tokenizer, glassllm, hub
from jrlhf.models.hf.reader import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_TEMPLATES = "additional_chat_templates"


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
        found = [name for name in _FILES if (path / name).is_file()]
        raise TokenizerError(
            f"{path} has no tokenizer that loads (files: {', '.join(found) or 'none'}): {error}"
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{path} has only a slow tokenizer; add a tokenizer.json.")
    return tokenizer


def save_tokenizer(
    directory: Path, *, tokenizer: PreTrainedTokenizerBase | None, source: Path | None
) -> None:
    """Writes a tokenizer's files into a model directory.

    Args:
        directory: exists already.
        tokenizer: the one to write; None takes the files of `source`.
        source: the model's origin; its directory's files are copied as they are.
    """
    if tokenizer is None and source is not None and source.is_dir():
        names = [name for name in _FILES if (source / name).is_file()]
        if names and source.resolve() != directory.resolve():
            for name in names:
                shutil.copyfile(source / name, directory / name)
            if (source / _TEMPLATES).is_dir():
                shutil.copytree(source / _TEMPLATES, directory / _TEMPLATES, dirs_exist_ok=True)
        if names:
            return
    if tokenizer is None and source is not None:
        try:
            tokenizer = load_tokenizer(source)
        except (TokenizerError, ModelError) as error:
            if source.is_file():
                warnings.warn(f"{directory} is saved without a tokenizer: {error}", stacklevel=2)
            return  # a model without a tokenizer is saved without one
    if tokenizer is None:
        return
    tokenizer.save_pretrained(str(directory))
    _rename_class(directory / "tokenizer_config.json")


def _rename_class(file: Path) -> None:
    """transformers 5 writes a class name that 4 and the servers built on it do not know."""
    config = read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")
