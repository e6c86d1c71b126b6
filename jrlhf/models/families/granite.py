"""Granite: Llama with four multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families import llama
from jrlhf.models.families.keys import classes, read_keys, with_defaults, write_keys
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(llama.KEYS) | {
    "attention_scale": ("attention_multiplier", 1.0),
    "embedding_scale": ("embedding_multiplier", 1.0),
    "residual_scale": ("residual_multiplier", 1.0),
}


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with GraniteConfig's defaults."""
    return DecoderSpec(
        model_type="granite",
        rope=read_rope(config),
        logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
        **read_keys(config, KEYS),
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("Granite")) | {
        "rope_parameters": write_rope(spec.rope),
        # Twelve digits: one over one over 49 shall be 49 again.
        "logits_scaling": float(f"{1.0 / spec.logit_scale:.12g}"),
    }
