"""What YAML files and the words of a command line say, as values; `jrlhf.config` judges them."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from jrlhf.errors import ConfigError, MissingFileError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping with the safe loader; a key given twice is an error."""
    import yaml

    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"There is no configuration file {str(file)!r}.")

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any, deep: bool = False) -> dict:
        keys = [loader.construct_object(k, deep=deep) for k, _ in node.value]
        for key in keys:
            if not isinstance(key, str):  # also yes, no, on and off, which YAML reads as bools
                raise ConfigError(
                    f"{file}: the name {key!r} (line {node.start_mark.line + 1}) is a "
                    f"{type(key).__name__}; names are text."
                )
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            raise ConfigError(
                f"{file}: {twice[0]!r} is given twice (line {node.start_mark.line + 1})."
            )
        return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        loaded = Loader(file.read_text(encoding="utf-8")).get_single_data()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{file} must hold a mapping of names to values, got {type(loaded).__name__}."
        )
    return loaded


def parse_text(kind: Any, text: str) -> Any:
    """A command-line word as a value of the annotated type; `_convert` judges the result."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    lowered = text.strip().lower()
    if lowered in ("none", "null") and type(None) in members:
        return None
    if bool in members and lowered in ("true", "false", "yes", "no", "on", "off"):
        return lowered in ("true", "yes", "on")
    if int in members or float in members:
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
    if any(get_origin(m) in (dict, list) for m in members) and text[:1] in "[{":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{text!r} is not valid JSON: {error}") from None
    if str not in members and any(get_origin(m) is list for m in members):
        return [part for part in text.split(",") if part] or [text]  # a comma can be the entry
    return text
