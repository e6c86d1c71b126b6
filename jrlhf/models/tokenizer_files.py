"""The tokenizer in a saved model's directory: whose it is, and how another takes its place.

Three hands write there. `tokenizer=` is what the user gives now, and replaces what lies there. The
user's `tokenizer.save_pretrained(directory)` of before stays. What the save of a model put there
by itself is that model's, and goes when another is saved: a hidden file remembers its hashes,
{file: those that it may have}, "" for none; several while files take their places.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from jrlhf.errors import JrlhfError, ModelError, TokenizerError
from jrlhf.models.hf.reader import read_json
from jrlhf.models.hf.writer import write_json
from jrlhf.models.hub import TOKENIZER_RECORD
from jrlhf.models.tokenizer import FILES, VOCABULARIES, load_tokenizer, same_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATES = "additional_chat_templates"
# Any of them says that there is a tokenizer; of the others one alone makes none.
_WHOLE = ("tokenizer.json", "tokenizer_config.json", *VOCABULARIES[:4])


def is_home(directory: Path, source: str | Path | None) -> bool:
    """Whether a directory is the one that a model or tokenizer was loaded from."""
    return bool(source) and Path(str(source)).resolve() == directory.resolve()


def save_tokenizer(
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    own: PreTrainedTokenizerBase | None = None,
    source: Path | None,
) -> None:
    """Writes a tokenizer into a model directory, whole, in place of the one that lies there.

    Vocabularies in older formats are not taken from the directory that the tokenizer or the model
    was loaded from: nothing could make them again.

    Args:
        directory: exists already.
        tokenizer: replaces whatever lies there; None takes the model's own, and leaves one that no
            save of a model put there. It warns where that is another and lies beside a model.
        own: the model's tokenizer where it is held; None: that of `source`.
        source: the model's origin; its directory's files are copied as they are.
    """
    if tokenizer is None and own is None and is_home(directory, source) and _is_whole(directory):
        return
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tokenizer.") as made:
        new = Path(made)
        found = tokenizer if tokenizer is not None else own
        if found is not None:
            _write(new, found)
        elif source is not None:
            _ = _copy(new, source) or _rebuild(new, source)
        if tokenizer is None and not _is_models(directory):
            if _is_whole(directory):
                _warn_of_another(directory, new)
                return
            if not any(new.iterdir()):
                return  # a model without a tokenizer is saved without one
        homes = (source, getattr(tokenizer, "name_or_path", None))
        spared = any(is_home(directory, home) for home in homes)
        _replace(directory, new, VOCABULARIES if spared else (), given=tokenizer is not None)


def _files(directory: Path) -> dict[str, str]:
    """{file of a tokenizer: its hash}."""
    found = [directory / name for name in FILES]
    found += sorted((directory / _TEMPLATES).glob("*.jinja"))
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in found
        if file.is_file()
    }


def _is_models(directory: Path) -> bool:
    """Whether every file of the directory's tokenizer is as the save of a model left it."""
    try:
        record = read_json(directory / TOKENIZER_RECORD)
    except (OSError, ModelError):
        return False
    found = _files(directory)
    return all(
        found.get(name, "") in (known if isinstance(known, list) else ())
        for name, known in ({name: [""] for name in found} | record).items()
    )


def _is_whole(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _WHOLE)


def _warn_of_another(directory: Path, new: Path) -> None:
    beside_model = (directory / "config.json").is_file()
    if beside_model and any(new.iterdir()) and not _same(directory, new):
        warnings.warn(
            f"{directory} keeps the tokenizer that lay there, which is not the saved model's:"
            " give tokenizer= to replace it.",
            stacklevel=2,
        )


def _same(one: Path, other: Path) -> bool:
    """Whether two directories' tokenizers give every text, and every chat, the same ids."""
    if _files(one) == _files(other):
        return True
    try:
        first, second = map(load_tokenizer, (one, other))
    except JrlhfError:  # what does not load is another
        return False
    return (
        same_tokenizer(first, second)
        and first.chat_template == second.chat_template
        and first.special_tokens_map == second.special_tokens_map
    )


def _replace(directory: Path, new: Path, spared: tuple[str, ...], *, given: bool) -> None:
    """Moves the new files into their places and removes what is none of them.

    Stopped in between, a model's files are still known for a model's.
    """
    before, after = _files(directory), _files(new)
    record = directory / TOKENIZER_RECORD
    if not given:
        names = {*before, *after}
        write_json(record, {n: [before.get(n, ""), after.get(n, "")] for n in sorted(names)})
    templates = directory / _TEMPLATES
    if templates.is_symlink() or templates.is_file():
        templates.unlink()  # what a link points at is another's
    shutil.rmtree(templates, ignore_errors=True)
    for path in new.iterdir():
        os.replace(path, directory / path.name)
    for name in set(FILES) - {*after, *spared}:
        # transformers would take a template or special tokens from it.
        (directory / name).unlink(missing_ok=True)
    if given or not after:
        record.unlink(missing_ok=True)
    else:
        write_json(record, {name: [found] for name, found in _files(directory).items()})


def _copy(new: Path, source: Path) -> bool:
    """Copies the files of a model directory, as they are; False: it has none."""
    names = [name for name in FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, new / name)
    if names and (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, new / _TEMPLATES)
    return bool(names)


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
