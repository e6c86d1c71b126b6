"""Gemma 3, text: Gemma 2 with normed queries and keys, and another rotation in windowed layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families import gemma2
from jrlhf.models.families.keys import (
    FULL,
    SLIDING,
    classes,
    layer_types,
    read_keys,
    read_windows,
    refuse,
    with_defaults,
    write_keys,
)
from jrlhf.models.families.rope_config import by_layer_type, one_rope, write_rope
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(gemma2.KEYS, vocab_size=262208, max_position_embeddings=131072)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with Gemma3TextConfig's defaults.

    Raises:
        UnsupportedModelError: a soft-cap of scores, which transformers reads and does not apply;
            attention in both directions.
    """
    refuse(config, "attn_logit_softcapping", (None,), "no Gemma 3 was trained with it")
    fields = read_keys(config, KEYS)
    layers = fields["num_hidden_layers"]
    pattern = int(
        config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    )
    types = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
    types = config.get("layer_types") or types
    rope, local = _ropes(config)
    return DecoderSpec(
        model_type="gemma3_text",
        rope=rope,
        local_rope=local,
        layer_ropes=tuple(int(kind == SLIDING) for kind in types),
        windows=read_windows(config, layers, types, default=4096),
        qk_norm="head",
        final_softcap=config.get("final_logit_softcapping"),
        **fields,
        **gemma2.common(config, fields),
    )


def _ropes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The rotations of full and of windowed layers, from the keys of transformers 5 or 4."""
    given, scaling = by_layer_type(config)
    theta = config.get("rope_theta") or 1e6
    local_theta = config.get("rope_local_base_freq") or 1e4
    full = {**(given.get(FULL) or {}), **scaling}
    rest = {k: v for k, v in config.items() if k != "rope_theta"}
    return (
        one_rope(full, rest, default_theta=theta),
        one_rope(given.get(SLIDING) or {}, rest, default_theta=local_theta),
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    architectures = classes("Gemma3Text", causal="Gemma3ForCausalLM")
    return write_keys(spec, KEYS, architectures) | {
        "rope_parameters": {
            FULL: write_rope(spec.rope),
            SLIDING: write_rope(spec.local_rope or spec.rope),
        },
        "final_logit_softcapping": spec.final_softcap,
        **gemma2.shared(spec),
        # By the rotation: a layer may turn as a windowed one and yet have no window.
        "layer_types": [SLIDING if i else FULL for i in spec.layer_ropes] or layer_types(spec),
    }
