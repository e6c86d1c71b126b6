"""Tokenizers of every model we read, and what is written beside a saved one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jrlhf.errors import ModelError, TokenizerError
from jrlhf.models import gguf_tokenizer, glassllm, hub
from jrlhf.models.hf.reader import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What tokenizer.json says, too: where it lies, nothing is read from them.
_VOCABULARIES = (
    "tokenizer.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    *_VOCABULARIES,
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


def is_home(directory: Path, source: str | Path | None) -> bool:
    """Whether a directory is the one that a model or tokenizer was loaded from."""
    return source is not None and Path(source).resolve() == directory.resolve()


def is_of_model(directory: Path) -> bool:
    """Whether a directory's tokenizer, if there is one, was put there by the save of a model.

    One that was not is the user's, who wrote `tokenizer.save_pretrained(d)` and then
    `model.save_pretrained(d)`.
    """
    files = [directory / name for name in (*_names(directory), "config.json")]
    return not _names(directory) or len({_time(file) for file in files}) == 1


def mark_as_models(directory: Path) -> None:
    """Gives the tokenizer's files and the config one time: no two writes would have it."""
    now = time.time_ns()
    for name in (*_names(directory), "config.json"):
        with contextlib.suppress(PermissionError):  # another user's file that was not written here
            os.utime(directory / name, ns=(now, now))


def _time(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.is_file() else None


def save_tokenizer(
    directory: Path, *, tokenizer: PreTrainedTokenizerBase | None, source: Path | None
) -> None:
    """Writes a tokenizer into a model directory, in place of the one that lies there.

    Vocabularies in older formats are not taken from the directory that the tokenizer or the model
    was loaded from: nothing could make them again.

    Args:
        directory: exists already.
        tokenizer: the one to write; None takes that of `source`.
        source: the model's origin; its directory's files are copied as they are.
    """
    if tokenizer is None and (source is None or (is_home(directory, source) and _names(source))):
        return
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tokenizer.") as made:
        new = Path(made)
        if tokenizer is not None:
            _write(new, tokenizer)
        elif source is not None and not (_copy(new, source) or _rebuild(new, source)):
            return  # a model without a tokenizer is saved without one
        spared = any(
            is_home(directory, home) for home in (source, getattr(tokenizer, "name_or_path", None))
        )
        if (directory / _TEMPLATES).is_symlink():
            (directory / _TEMPLATES).unlink()  # what it points at is another's
        shutil.rmtree(directory / _TEMPLATES, ignore_errors=True)
        kept = {path.name for path in new.iterdir()} | set(_VOCABULARIES if spared else ())
        for path in new.iterdir():
            os.replace(path, directory / path.name)
        for name in set(_FILES) - kept:
            # transformers would take a template or special tokens from it.
            (directory / name).unlink(missing_ok=True)


def _names(source: Path) -> list[str]:
    return [name for name in _FILES if (source / name).is_file()]


def _copy(new: Path, source: Path) -> bool:
    """Copies the files of a model directory, as they are; False: it has none."""
    for name in _names(source):
        shutil.copyfile(source / name, new / name)
    if _names(source) and (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, new / _TEMPLATES)
    return bool(_names(source))


def _rebuild(new: Path, source: Path) -> bool:
    """Writes the tokenizer of a file that holds model and all; False: it has none that loads."""
    try:
        tokenizer = load_tokenizer(source)
    except (TokenizerError, ModelError) as error:
        if source.is_file():
            warnings.warn(f"{source} is saved without a tokenizer: {error}", stacklevel=2)
        return False
    _write(new, tokenizer)
    return True


def _write(new: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(str(new))
    _rename_class(new / "tokenizer_config.json")


def _rename_class(file: Path) -> None:
    """transformers 5 writes a class name that 4 and the servers built on it do not know."""
    config = read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")
