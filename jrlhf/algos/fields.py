"""Checks of hyperparameters, with errors that name the field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jrlhf.errors import ConfigError, suggest
from jrlhf.types import Array


def require(ok: bool, owner: Any, field: str, rule: str) -> None:
    """Raises ConfigError("GRPO.beta must not be negative, got -1") unless `ok`."""
    if not ok:
        raise ConfigError(f"{type(owner).__name__}.{field} {rule}, got {getattr(owner, field)!r}.")


def require_choice(owner: Any, field: str, choices: Iterable[str]) -> None:
    """Raises ConfigError with a suggestion unless the field is one of the choices."""
    known = list(choices)
    value = getattr(owner, field)
    if value not in known:
        raise ConfigError(
            f"{type(owner).__name__}.{field} must be one of {known}, got {value!r}."
            f"{suggest(str(value), known)}"
        )


def given(array: Array | None, name: str) -> Array:
    """An optional field of `Outputs` that a loss cannot do without."""
    if array is None:
        raise TypeError(f"This loss needs Outputs.{name}, which the model did not give.")
    return array
