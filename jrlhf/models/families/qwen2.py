"""Qwen2 and 2.5: Llama with biases on q, k and v, and perhaps a window in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.keys import (
    FULL,
    SLIDING,
    classes,
    layer_types,
    read_keys,
    read_windows,
    window_of,
    with_defaults,
    write_keys,
)
from jrlhf.models.families.llama import COMMON
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(
    COMMON,
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    max_position_embeddings=32768,
)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with Qwen2Config's defaults."""
    fields = read_keys(config, KEYS)
    return DecoderSpec(
        model_type="qwen2",
        rope=read_rope(config),
        attention_bias=True,
        output_bias=False,
        windows=upper_windows(config, fields["num_hidden_layers"]),
        **fields,
    )


def upper_windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Windows from `max_window_layers` on, where `use_sliding_window` says so."""
    if not config.get("use_sliding_window"):
        return ()
    first = int(config.get("max_window_layers", 28))
    types = [SLIDING if i >= first else FULL for i in range(layers)]
    return read_windows(config, layers, types, default=4096)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("Qwen2")) | shared(spec)


def shared(spec: DecoderSpec) -> dict[str, Any]:
    """The rotation and the windows, written as Qwen2 and 3 do."""
    return {
        "rope_parameters": write_rope(spec.rope),
        "use_sliding_window": any(spec.windows),
        "sliding_window": window_of(spec),
        "layer_types": layer_types(spec),
    }
