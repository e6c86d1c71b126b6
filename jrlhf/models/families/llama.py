"""Llama and every checkpoint whose config.json says `model_type: llama`: SmolLM2, TinyLlama, ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.keys import classes, read_keys, write_keys
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.families.table import Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec

# What most families have in common: field of the spec -> key of config.json, default.
COMMON: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_hidden_layers": ("num_hidden_layers", 32),
    "num_attention_heads": ("num_attention_heads", 32),
    "num_key_value_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "hidden_act": ("hidden_act", "silu"),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
}
KEYS = COMMON | {
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
}
# Buffers that old checkpoints carry; they are computed from the config.
IGNORED = (r".*rotary_emb\.inv_freq$", r".*self_attn\.masked_bias$")


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with LlamaConfig's defaults where a key is absent."""
    return DecoderSpec(model_type="llama", rope=read_rope(config), **read_keys(config, KEYS))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("Llama")) | {"rope_parameters": write_rope(spec.rope)}


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a Llama checkpoint; the names that many families share."""
    return table(spec, Names())
