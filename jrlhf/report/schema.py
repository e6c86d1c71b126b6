"""`evaluation.json`: what one comparison of two policies on held-out prompts has measured.

The file holds raw numbers per prompt and per text, never means: every statistic of the page can be
recomputed from it. As JSON:

    {"version": 1,
     "title": "SmolLM2-135M on IMDB",
     "before": "sft", "after": "ppo",            names of the two policies
     "samples": [                                  one entry per held-out prompt
        {"prompt": "This film",
         "before": {"text": " was ...",           the completion alone, special tokens removed
                    "tokens": 40,                  its length in tokens, EOS included
                    "reward": 0.31,                the reward model's score of prompt + completion
                    "kl": 0.0,                     sum over its tokens of log policy - log reference
                    "judges": {"naive_bayes": 0.41, "vader": 0.2}},
         "after": {...}}],
     "texts": [                                    held-out texts, for perplexity
        {"tokens": 96, "before": 310.2, "after": 312.9}],     nats summed over these tokens
     "judges": {"naive_bayes": "P(positive) by ..."},         one line per judge
     "settings": {"seed": 0, "temperature": 1.0}}             shown as they are

The reference of `kl` is the first policy, so its own KL is exactly 0. Judges read prompt and
completion joined. All scores are finite floats.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jrlhf.errors import DataError, MissingFileError

VERSION = 1
Scalar = str | int | float | bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion and everything that was measured on it."""

    text: str
    tokens: int
    reward: float
    kl: float
    judges: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out prompt, continued by both policies."""

    prompt: str
    before: Completion
    after: Completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLoss:
    """Negative log-likelihood of one held-out text under both policies, in nats, summed."""

    tokens: int
    before: float
    after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A comparison of two policies; see the module's docstring for each field."""

    title: str
    before: str
    after: str
    samples: tuple[Sample, ...]
    texts: tuple[TextLoss, ...] = ()
    judges: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **dataclasses.asdict(self)}


def save(evaluation: Evaluation, path: str | Path) -> Path:
    """Writes `evaluation` as JSON; refuses numbers that are not finite."""
    path = Path(path)
    text = json.dumps(evaluation.to_json(), ensure_ascii=False, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")  # lone surrogates become "?"
    return path


def load(path: str | Path) -> Evaluation:
    """Reads an `evaluation.json` and checks every field.

    Raises:
        MissingFileError: there is no such file.
        DataError: it is not JSON, or a field is missing, unknown, of another type or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"there is no evaluation at {path}; `jrlhf evaluate` writes it.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    return from_json(raw, where=str(path))


def from_json(raw: Any, *, where: str = "evaluation") -> Evaluation:
    """Builds an Evaluation from parsed JSON, naming the field that does not fit."""
    fields = dict(_object(raw, where))
    version = fields.pop("version", None)
    if version != VERSION:
        raise DataError(f"{where}: version is {version!r}, this jrlhf reads version {VERSION}.")
    _check_keys(fields, Evaluation, where)
    samples = tuple(
        _sample(item, f"{where}: samples[{i}]")
        for i, item in enumerate(_array(fields["samples"], f"{where}: samples"))
    )
    if not samples:
        raise DataError(f"{where}: samples is empty; there is nothing to compare.")
    texts = tuple(
        _text_loss(item, f"{where}: texts[{i}]")
        for i, item in enumerate(_array(fields.get("texts", []), f"{where}: texts"))
    )
    names = {frozenset(arm.judges) for s in samples for arm in (s.before, s.after)}
    if len(names) > 1:
        raise DataError(f"{where}: not every completion was scored by the same judges.")
    return Evaluation(
        title=_string(fields["title"], f"{where}: title"),
        before=_string(fields["before"], f"{where}: before"),
        after=_string(fields["after"], f"{where}: after"),
        samples=samples,
        texts=texts,
        judges={
            name: _string(line, f"{where}: judges.{name}")
            for name, line in _object(fields.get("judges", {}), f"{where}: judges").items()
        },
        settings=dict(_object(fields.get("settings", {}), f"{where}: settings")),
    )


def _sample(raw: Any, where: str) -> Sample:
    fields = _object(raw, where)
    _check_keys(fields, Sample, where)
    return Sample(
        prompt=_string(fields["prompt"], f"{where}.prompt"),
        before=_completion(fields["before"], f"{where}.before"),
        after=_completion(fields["after"], f"{where}.after"),
    )


def _completion(raw: Any, where: str) -> Completion:
    fields = _object(raw, where)
    _check_keys(fields, Completion, where)
    judges = _object(fields["judges"], f"{where}.judges")
    return Completion(
        text=_string(fields["text"], f"{where}.text"),
        tokens=_count(fields["tokens"], f"{where}.tokens"),
        reward=_number(fields["reward"], f"{where}.reward"),
        kl=_number(fields["kl"], f"{where}.kl"),
        judges={name: _number(value, f"{where}.judges.{name}") for name, value in judges.items()},
    )


def _text_loss(raw: Any, where: str) -> TextLoss:
    fields = _object(raw, where)
    _check_keys(fields, TextLoss, where)
    return TextLoss(
        tokens=_count(fields["tokens"], f"{where}.tokens"),
        before=_number(fields["before"], f"{where}.before"),
        after=_number(fields["after"], f"{where}.after"),
    )


def _check_keys(fields: Mapping[str, Any], kind: type, where: str) -> None:
    declared = dataclasses.fields(kind)
    known = {field.name for field in declared}
    needed = {
        field.name
        for field in declared
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(needed - set(fields)):
        raise DataError(f"{where} lacks {', '.join(missing)}.")
    if unknown := sorted(set(fields) - known):
        raise DataError(f"{where} has unknown keys: {', '.join(unknown)}.")


def _object(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise DataError(f"{where} is a {type(raw).__name__}, not an object.")
    return raw


def _array(raw: Any, where: str) -> list[Any]:
    if not isinstance(raw, list):
        raise DataError(f"{where} is a {type(raw).__name__}, not an array.")
    return raw


def _string(raw: Any, where: str) -> str:
    if not isinstance(raw, str):
        raise DataError(f"{where} is {raw!r}, not a string.")
    return raw


def _number(raw: Any, where: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        raise DataError(f"{where} is {raw!r}, not a finite number.")
    return float(raw)


def _count(raw: Any, where: str) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < 0:
        raise DataError(f"{where} is {raw!r}, not a count.")
    return raw
