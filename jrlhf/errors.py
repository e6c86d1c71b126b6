"""Every error that a user can cause, by name.

A message says what is wrong, where, the value seen and the nearest fix. The CLI prints it without
a traceback and exits with code 2. `ConfigError` and friends also derive from the builtin that a
caller would expect (ValueError, FileNotFoundError, ...), so ordinary `except` clauses work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JrlhfError(Exception):
    """Base of all errors that name a user's mistake and its fix."""


class ConfigError(JrlhfError, ValueError):
    """A configuration value, key or combination that cannot work."""


class UnsupportedFieldError(ConfigError):
    """A field that people know from elsewhere and that jrlhf refuses, with the reason."""


class MeshError(ConfigError):
    """A mesh that does not fit the devices, or a batch that does not divide over it."""


class DataError(JrlhfError, ValueError):
    """A dataset that cannot be trained on."""


class MissingColumnError(DataError):
    """A dataset lacks a column that the trainer needs."""


class EmptyDatasetError(DataError):
    """No row is left to train on."""


class PromptTooLongError(DataError):
    """A prompt leaves no room for a completion in the model's context."""


class MissingFileError(JrlhfError, FileNotFoundError):
    """A path that does not exist."""


class ModelError(JrlhfError, ValueError):
    """A model that cannot be built or loaded."""


class UnsupportedModelError(ModelError):
    """An architecture, rope type or flag that jrlhf does not implement."""


class MissingWeightError(ModelError):
    """A checkpoint lacks weights, has unexpected ones, or has them in other shapes."""


class TokenizerError(JrlhfError, ValueError):
    """A tokenizer or chat template that does not fit its use."""


class RewardError(JrlhfError, ValueError):
    """A reward function that raised, or returned the wrong length or type."""


class CheckpointError(JrlhfError, ValueError):
    """A training checkpoint that is missing, damaged or of another run."""


class HubError(JrlhfError, OSError):
    """The Hugging Face hub did not take what was to be uploaded."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the nearest known word, or ''."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
