"""Command lines and YAML files as configs: `--config FILE` gives defaults, `--field value` wins."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any, TypeVar

from jrlhf.commands.adapters import AdapterArguments
from jrlhf.commands.words import parse_text, read_yaml
from jrlhf.config import aliases, config, foreign_names
from jrlhf.errors import ConfigError, UnsupportedFieldError, suggest
from jrlhf.foreign import REFUSED

T = TypeVar("T")
_ANY = bool | int | float | str | None  # what a name that is no field may be given


@config
class ScriptArguments(AdapterArguments):
    """What a training verb needs beside the trainer's config, by TRL's names.

    Attributes:
        model_name_or_path: hub name, checkpoint directory or GGUF file of the model to train.
        dtype: type in which the model's weights are loaded.
        attn_implementation: attention's kernel: auto (the platform's), xla, cudnn or splash.
        dataset_name: hub name, local file (.jsonl, .json, .parquet, .csv) or directory.
        dataset_config: configuration of a hub dataset.
        dataset_train_split: split to train on.
        dataset_test_split: split to evaluate on when eval_strategy is not "no".
        dataset_streaming: read the dataset as a stream.
        eval_dataset_name: separate evaluation set; None: `dataset_name`'s test split.
    """

    model_name_or_path: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_streaming: bool = False
    eval_dataset_name: str | None = None

    SYNONYMS = {"model": "model_name_or_path", "dataset": "dataset_name", "torch_dtype": "dtype"}


def parse(argv: list[str], *classes: type, verb: str) -> list[Any]:
    """Builds each config class from the command line and its `--config` file.

    Raises:
        ConfigError: an unknown or repeated flag, a wrong type, a missing value.
        SystemExit: after printing the help that `--help` asks for.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(verb, classes))
        raise SystemExit(0)
    owner: dict[str, type] = {}
    for cls in classes:
        for name in [*(f.name for f in dataclasses.fields(cls)), *aliases(cls)]:
            owner.setdefault(name, cls)
    for cls in classes:  # also the names that are no fields: the class says what to do instead
        for name in foreign_names(cls):
            owner.setdefault(name, cls)
    flags = _flags(argv, owner)
    path = flags.pop("config", None)
    values: dict[str, Any] = read_yaml(path) if path else {}
    for name in values:
        if name not in owner:
            _refuse(name, owner, where=str(path))
    for name in flags:  # a flag wins over the file, by whatever name the file has the field
        for other in [n for n in values if _field(n, owner) == _field(name, owner)]:
            del values[other]
    values.update(flags)
    return [cls(**{k: v for k, v in values.items() if owner[k] is cls}) for cls in classes]


def _field(name: str, owner: dict[str, type]) -> tuple[type, str]:
    """The class and the field that a name, old or short, means."""
    cls = owner[name]
    known = {f.name for f in dataclasses.fields(cls)}
    return cls, name if name in known else aliases(cls).get(name, name)


def _refuse(name: str, owner: dict[str, type], *, where: str) -> None:
    if name in REFUSED:  # of a verb that does not train
        raise UnsupportedFieldError(f"{where}: {name} is not supported: {REFUSED[name]}.")
    raise ConfigError(f"{where}: unknown field {name!r}.{suggest(name, [*owner, 'config'])}")


def _flags(argv: list[str], owner: dict[str, type]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"Unexpected word {word!r}: fields are written --name value.")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name != "config" and name not in owner:
            _refuse(name, owner, where="command line")
        if name in out:
            raise ConfigError(f"--{name} is given twice.")
        given = [value] if equals else []
        if name == "config" and given == [""]:
            raise ConfigError("--config needs a value.")
        if not equals:
            while words and not words[0].startswith("--"):
                given.append(words.pop(0))
        out[name] = given[0] if name == "config" and given else _value(name, given, owner)
    return out


def _value(name: str, given: list[str], owner: dict[str, type]) -> Any:
    cls = owner.get(name)
    if cls is None:
        raise ConfigError(f"--{name} needs a value.")
    kind = typing.get_type_hints(cls).get(aliases(cls).get(name, name), _ANY)
    members = typing.get_args(kind) or (kind,)
    if not given:
        if bool in members:
            return True
        raise ConfigError(f"--{name} needs a value.")
    if len(given) > 1:
        if any(typing.get_origin(m) is list for m in members):
            return given
        raise ConfigError(f"--{name} takes one value, got {given}.")
    return parse_text(kind, given[0])


def help_text(verb: str, classes: tuple[type, ...]) -> str:
    lines = [f"usage: jrlhf {verb} [--config FILE.yaml] [--field value ...]", ""]
    for cls in classes:
        lines.append(f"{cls.__name__}:")
        about = describe(cls)
        for field in dataclasses.fields(cls):
            default = "" if field.default is dataclasses.MISSING else f" (default: {field.default})"
            lines.append(f"  --{field.name}{default}")
            if field.name in about:
                lines.append(f"        {about[field.name]}")
        lines.append("")
    return "\n".join(lines)


def describe(cls: type) -> dict[str, str]:
    """Field descriptions, read from the `Attributes:` sections of a class and its parents."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        doc = inspect.getdoc(base) if base.__doc__ else None
        section = (doc or "").partition("Attributes:\n")[2]
        for match in re.finditer(r"^    (\w+): ((?:.+\n?(?!    \w+: ))*)", section, re.MULTILINE):
            found[match[1]] = " ".join(match[2].split())
    return found
