"""The model families that jrlhf reads: one file each, one line each in a table below."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jrlhf.errors import JrlhfError, ModelError, UnsupportedModelError, suggest
from jrlhf.models.encoder_spec import AnySpec, EncoderSpec
from jrlhf.models.families import (
    bert,
    cohere,
    deberta_v2,
    distilbert,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    mistral,
    mixtral,
    modernbert,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from jrlhf.models.families.weights import Weight

__all__ = [
    "DECODERS",
    "ENCODERS",
    "FAMILIES",
    "Family",
    "Weight",
    "config_from_spec",
    "family_of",
    "spec_from_config",
]


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
        aliases: other names of a config's keys -> their own; they win, as in transformers.
    """

    read: Callable[[Mapping[str, Any]], AnySpec]
    write: Callable[[Any], dict[str, Any]]
    weights: Callable[[Any], tuple[Weight, ...]] = llama.weights
    ignored: tuple[str, ...] = llama.IGNORED
    prefix: str = "model."
    renames: tuple[tuple[str, str], ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


DECODERS: dict[str, Family] = {
    "cohere": Family(read=cohere.read, write=cohere.write),
    "gemma": Family(read=gemma.read, write=gemma.write),
    "gemma2": Family(read=gemma2.read, write=gemma2.write, weights=gemma2.weights),
    "gemma3_text": Family(read=gemma3.read, write=gemma3.write, weights=gemma2.weights),
    "gpt2": Family(
        read=gpt2.read,
        write=gpt2.write,
        weights=gpt2.weights,
        ignored=gpt2.IGNORED,
        prefix="transformer.",
        aliases=gpt2.ALIASES,
    ),
    "gpt_neox": Family(
        read=gpt_neox.read,
        write=gpt_neox.write,
        weights=gpt_neox.weights,
        ignored=gpt_neox.IGNORED,
        prefix="gpt_neox.",
        renames=gpt_neox.RENAMES,
    ),
    "gpt_oss": Family(
        read=gpt_oss.read,
        write=gpt_oss.write,
        weights=gpt_oss.weights,
        aliases=mixtral.ALIASES,
    ),
    "gptj": Family(
        read=gptj.read,
        write=gptj.write,
        weights=gptj.weights,
        ignored=gptj.IGNORED,
        prefix="transformer.",
        aliases=gpt2.ALIASES,
    ),
    "granite": Family(read=granite.read, write=granite.write),
    "llama": Family(read=llama.read, write=llama.write),
    "mistral": Family(read=mistral.read, write=mistral.write),
    "mixtral": Family(
        read=mixtral.read,
        write=mixtral.write,
        weights=mixtral.weights,
        aliases=mixtral.ALIASES,
    ),
    "olmo2": Family(read=olmo2.read, write=olmo2.write, weights=olmo2.weights),
    "opt": Family(read=opt.read, write=opt.write, weights=opt.weights),
    "phi3": Family(read=phi3.read, write=phi3.write, weights=phi3.weights),
    "qwen2": Family(read=qwen2.read, write=qwen2.write),
    "qwen3": Family(read=qwen3.read, write=qwen3.write),
    "qwen3_moe": Family(
        read=qwen3_moe.read,
        write=qwen3_moe.write,
        weights=qwen3_moe.weights,
        aliases=mixtral.ALIASES,
    ),
    "smollm3": Family(read=smollm3.read, write=smollm3.write),
}
ENCODERS: dict[str, Family] = {
    "bert": Family(
        read=bert.read_bert,
        write=bert.write,
        weights=bert.weights,
        ignored=bert.IGNORED,
        prefix="bert.",
        renames=bert.RENAMES,
    ),
    "roberta": Family(
        read=bert.read_roberta,
        write=bert.write,
        weights=bert.weights,
        ignored=bert.IGNORED,
        prefix="roberta.",
    ),
    "xlm-roberta": Family(
        read=bert.read_xlm_roberta,
        write=bert.write,
        weights=bert.weights,
        ignored=bert.IGNORED,
        prefix="roberta.",
    ),
    "distilbert": Family(
        read=distilbert.read,
        write=distilbert.write,
        weights=distilbert.weights,
        ignored=distilbert.IGNORED,
        prefix="distilbert.",
        aliases=distilbert.ALIASES,
    ),
    "modernbert": Family(
        read=modernbert.read,
        write=modernbert.write,
        weights=modernbert.weights,
        ignored=modernbert.IGNORED,
    ),
    "deberta-v2": Family(
        read=deberta_v2.read,
        write=deberta_v2.write,
        weights=deberta_v2.weights,
        ignored=deberta_v2.IGNORED,
        prefix="deberta.",
        renames=bert.RENAMES,
    ),
}
FAMILIES = {**DECODERS, **ENCODERS}
# Fields that the caller chooses, whatever the config says.
CHOICES = ("head", "num_labels", "value_head", "vocab_padding", "trunk_layers", "dtype", "remat",
           "attention")  # fmt: skip


def _family(model_type: Any) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
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
            trunk_layers, dtype, remat, attention.

    Raises:
        UnsupportedModelError: a model type, rope type, activation or flag that is not implemented.
        ModelError: a value of another kind than its key wants.
    """
    family = _family(config.get("model_type"))
    others = {key: config[other] for other, key in family.aliases.items() if other in config}
    given = {key: value for key, value in others.items() if value is not None}
    return _read(family, {**config, **given}).replace(**choices)


def _read(family: Family, config: Mapping[str, Any]) -> AnySpec:
    try:
        return family.read(config)
    except JrlhfError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        guilty = [f"{key}={value!r}" for key, value in config.items() if _fine(family, config, key)]
        what = f": {', '.join(guilty)}" if guilty else ""
        raise ModelError(f"config.json cannot be read{what} ({error}).") from error


def _fine(family: Family, config: Mapping[str, Any], key: str) -> bool:
    """Whether a config could be read if it had not this key."""
    try:
        family.read({name: value for name, value in config.items() if name != key})
    except Exception:  # whatever it is, the key alone is not at fault
        return False
    return True


def config_from_spec(spec: AnySpec) -> dict[str, Any]:
    """The config.json that transformers needs to load a model of this spec.

    Raises:
        UnsupportedModelError: the spec has a flag that no config of its family can say.
    """
    family = family_of(spec)
    config = family.write(spec)
    if isinstance(spec, EncoderSpec):
        return config
    again = family.read(config)
    for field in dataclasses.fields(spec):
        if field.name in CHOICES:
            continue
        wanted, got = getattr(spec, field.name), getattr(again, field.name)
        close = isinstance(wanted, float) and isinstance(got, float) and math.isclose(wanted, got)
        if wanted != got and not close:
            raise UnsupportedModelError(
                f"{field.name}={wanted!r} cannot be written as a {spec.model_type} config, which"
                f" says {got!r}."
            )
    return config
