"""The model families that jrlhf reads: one file each, one line each in `FAMILIES`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError, suggest
from jrlhf.models.encoder_spec import AnySpec
from jrlhf.models.families import bert, deberta_v2, distilbert, llama, modernbert
from jrlhf.models.families.weights import Weight

__all__ = ["FAMILIES", "Family", "Weight", "config_from_spec", "family_of", "spec_from_config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` is read and written.

    Attributes:
        read: config.json as a dict -> spec (without the caller's choices: head, dtype, ...).
        write: spec -> the keys of config.json that the spec decides.
        weights: spec -> the rows of its weight table.
        ignored: names (regular expressions) that old checkpoints carry and nobody needs.
        prefix: what a bare trunk leaves off its names.
        renames: (regular expression, replacement): other names of the same tensors.
    """

    read: Callable[[Mapping[str, Any]], AnySpec]
    write: Callable[[Any], dict[str, Any]]
    weights: Callable[[Any], tuple[Weight, ...]]
    ignored: tuple[str, ...] = ()
    prefix: str = "model."
    renames: tuple[tuple[str, str], ...] = ()


FAMILIES: dict[str, Family] = {
    "llama": Family(
        read=llama.read, write=llama.write, weights=llama.weights, ignored=llama.IGNORED
    ),
    "bert": Family(
        read=bert.read_bert, write=bert.write, weights=bert.weights, ignored=bert.IGNORED,
        prefix="bert.", renames=bert.RENAMES,
    ),
    "roberta": Family(
        read=bert.read_roberta, write=bert.write, weights=bert.weights, ignored=bert.IGNORED,
        prefix="roberta.",
    ),
    "xlm-roberta": Family(
        read=bert.read_xlm_roberta, write=bert.write, weights=bert.weights, ignored=bert.IGNORED,
        prefix="roberta.",
    ),
    "distilbert": Family(
        read=distilbert.read, write=distilbert.write, weights=distilbert.weights,
        ignored=distilbert.IGNORED, prefix="distilbert.",
    ),
    "modernbert": Family(
        read=modernbert.read, write=modernbert.write, weights=modernbert.weights,
        ignored=modernbert.IGNORED,
    ),
    "deberta-v2": Family(
        read=deberta_v2.read, write=deberta_v2.write, weights=deberta_v2.weights,
        ignored=deberta_v2.IGNORED, prefix="deberta.", renames=bert.RENAMES,
    ),
}  # fmt: skip


def _family(model_type: str | None) -> Family:
    if model_type not in FAMILIES:
        known = sorted(FAMILIES)
        raise UnsupportedModelError(
            f"model_type={model_type!r} is not implemented; known: {', '.join(known)}."
            + suggest(str(model_type), known)
        )
    return FAMILIES[model_type]


def family_of(spec: AnySpec) -> Family:
    """The family that names a spec's weights."""
    return _family(spec.model_type)


def spec_from_config(config: Mapping[str, Any], **choices: object) -> AnySpec:
    """Makes a spec from a config.json.

    Args:
        config: config.json as a dict, of transformers 4 or 5.
        **choices: fields of the spec that a config does not decide: head, num_labels, value_head,
            trunk_layers, dtype, remat.

    Raises:
        UnsupportedModelError: a model type, rope type, activation or flag that is not implemented.
    """
    return _family(config.get("model_type")).read(config).replace(**choices)


def config_from_spec(spec: AnySpec) -> dict[str, Any]:
    """The config.json that transformers needs to load a model of this spec."""
    return family_of(spec).write(spec)
