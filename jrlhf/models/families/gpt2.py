"""GPT-2: learned positions, LayerNorm, a plain MLP; kernels stored as Conv1D, q, k and v fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.keys import classes, read_keys, refuse, write_keys
from jrlhf.models.families.table import Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec

KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50257),
    "hidden_size": ("n_embd", 768),
    "intermediate_size": ("n_inner", None),
    "num_hidden_layers": ("n_layer", 12),
    "num_attention_heads": ("n_head", 12),
    "max_position_embeddings": ("n_positions", 1024),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "hidden_act": ("activation_function", "gelu_new"),
    "tie_word_embeddings": ("tie_word_embeddings", True),
    "initializer_range": ("initializer_range", 0.02),
    "attention_scale_by_layer": ("scale_attn_by_inverse_layer_idx", False),
}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
NAMES = Names(
    embed="transformer.wte",
    positions="transformer.wpe",
    norm="transformer.ln_f",
    layer="transformer.h.{layer}.",
    modules={
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attn.o": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    fused={"attn.c_attn": ("attn.q", "attn.k", "attn.v")},
    tokens="classifier",
    conv1d=True,
)
# Masks that old checkpoints carry.
IGNORED = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)
CLASSES = classes("GPT2", causal="GPT2LMHeadModel")


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with GPT2Config's defaults."""
    refuse(config, "add_cross_attention", (False, None), "a decoder alone has nothing to cross to")
    fields = read_inner(config, KEYS)
    scaled = config.get("scale_attn_weights", True)
    return DecoderSpec(
        model_type="gpt2",
        positions="learned",
        norm="layer",
        mlp="plain",
        attention_bias=True,
        mlp_bias=True,
        attention_scale=None if scaled else 1.0,
        **fields,
    )


def read_inner(config: Mapping[str, Any], keys: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """`read_keys`, where `n_inner` is four times the width unless the config says."""
    fields = read_keys(config, keys)
    fields["intermediate_size"] = int(fields["intermediate_size"] or 4 * fields["hidden_size"])
    return fields


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    config = write_keys(spec, KEYS, CLASSES)
    return config | {"scale_attn_weights": spec.attention_scale is None}


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a GPT-2 checkpoint."""
    return table(spec, NAMES)
