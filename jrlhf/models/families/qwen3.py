"""Qwen3: Qwen2 with normed queries and keys, and biases on all projections or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families import qwen2
from jrlhf.models.families.keys import classes, read_keys, with_defaults, write_keys
from jrlhf.models.families.rope_config import read_rope
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(qwen2.KEYS, head_dim=128) | {"attention_bias": ("attention_bias", False)}


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with Qwen3Config's defaults."""
    fields = read_keys(config, KEYS)
    return DecoderSpec(
        model_type="qwen3",
        rope=read_rope(config),
        qk_norm="head",
        windows=qwen2.upper_windows(config, fields["num_hidden_layers"]),
        **fields,
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("Qwen3")) | qwen2.shared(spec)
