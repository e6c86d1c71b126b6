"""Cohere (Command R): attention and MLP side by side on one LayerNorm, scaled logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.keys import classes, read_keys, with_defaults, write_keys
from jrlhf.models.families.llama import COMMON
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(
    COMMON,
    vocab_size=256000,
    hidden_size=8192,
    intermediate_size=22528,
    num_hidden_layers=40,
    num_attention_heads=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
) | {
    "norm_eps": ("layer_norm_eps", 1e-5),
    "attention_bias": ("attention_bias", False),
    "logit_scale": ("logit_scale", 0.0625),
}


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with CohereConfig's defaults."""
    return DecoderSpec(
        model_type="cohere",
        rope=read_rope(config, default_theta=5e5),
        rope_interleaved=True,
        norm="layer",
        norm_bias=False,
        block="shared",
        qk_norm="heads" if config.get("use_qk_norm") else "none",
        **read_keys(config, KEYS),
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("Cohere")) | {
        "rope_parameters": write_rope(spec.rope),
        "use_qk_norm": spec.qk_norm == "heads",
    }
