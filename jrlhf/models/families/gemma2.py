"""Gemma 2: Gemma with norms on both sides, soft-caps, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families import gemma
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
from jrlhf.models.families.table import LLAMA_MODULES, Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(
    gemma.KEYS,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
) | {"hidden_act": ("hidden_activation", "gelu_pytorch_tanh")}
NAMES = Names(
    modules=LLAMA_MODULES
    | {
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with Gemma2Config's defaults."""
    fields = read_keys(config, KEYS)
    layers = fields["num_hidden_layers"]
    return DecoderSpec(
        model_type="gemma2",
        rope=read_rope(config),
        windows=read_windows(config, layers, [SLIDING, FULL] * layers, default=4096),
        attention_softcap=_number(config.get("attn_logit_softcapping", 50.0)),
        final_softcap=_number(config.get("final_logit_softcapping", 30.0)),
        **fields,
        **common(config, fields),
    )


def common(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    scalar = float(config.get("query_pre_attn_scalar", 256))
    own = {"block": "sandwich", "attention_scale": scalar**-0.5}
    return gemma.common(config, fields) | own


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("Gemma2")) | {
        "rope_parameters": write_rope(spec.rope),
        "attn_logit_softcapping": spec.attention_softcap,
        "final_logit_softcapping": spec.final_softcap,
        **shared(spec),
    }


def shared(spec: DecoderSpec) -> dict[str, Any]:
    """The scale of scores and the windows, written as Gemma 2 and 3 do."""
    scalar = (spec.attention_scale or spec.head_dim**-0.5) ** -2
    return {
        "query_pre_attn_scalar": round(scalar),
        "sliding_window": window_of(spec),
        "layer_types": layer_types(spec),
    }


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a Gemma 2 or 3 checkpoint."""
    return table(spec, NAMES)
