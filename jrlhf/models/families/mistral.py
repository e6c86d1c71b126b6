"""Mistral: Llama without biases, with one window in all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.keys import (
    classes,
    read_keys,
    refuse,
    window_of,
    with_defaults,
    write_keys,
)
from jrlhf.models.families.llama import COMMON
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(
    COMMON,
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=131072,
)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with MistralConfig's defaults."""
    refuse(config, "layer_types", (None,), "a Mistral has the same window in all its layers")
    return DecoderSpec(
        model_type="mistral",
        rope=read_rope(config),
        windows=same_windows(config, default=4096),
        **read_keys(config, KEYS),
    )


def same_windows(config: Mapping[str, Any], *, default: int | None = None) -> tuple[int, ...]:
    """`sliding_window` (null: none) in every layer."""
    window = config.get("sliding_window", default)
    return (int(window),) * int(config.get("num_hidden_layers") or 32) if window else ()


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("Mistral")) | {
        "rope_parameters": write_rope(spec.rope),
        "sliding_window": window_of(spec),
    }
