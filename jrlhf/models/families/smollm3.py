"""SmolLM3: Llama with no rotation in every fourth layer, where it may have a window instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families import llama
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
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(
    llama.KEYS,
    vocab_size=128256,
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with SmolLM3Config's defaults."""
    fields = read_keys(config, KEYS)
    if config.get("num_key_value_heads", 0) is None:  # absent: 4
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    layers = fields["num_hidden_layers"]
    every = int(config.get("no_rope_layer_interval", 4))
    turned = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    windows: tuple[int, ...] = ()
    if config.get("use_sliding_window"):
        types = [FULL if one else SLIDING for one in turned]
        windows = read_windows(config, layers, types)
    return DecoderSpec(
        model_type="smollm3",
        rope=read_rope(config, default_theta=2e6),
        # The list says where there IS a rotation, whatever its name.
        layer_ropes=tuple(0 if one else -1 for one in turned[:layers]),
        windows=windows,
        **fields,
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("SmolLM3")) | {
        "rope_parameters": write_rope(spec.rope),
        "no_rope_layers": [int(rope >= 0) for rope in spec.layer_ropes],
        "use_sliding_window": any(spec.windows),
        "sliding_window": window_of(spec),
        "layer_types": layer_types(spec),
    }
