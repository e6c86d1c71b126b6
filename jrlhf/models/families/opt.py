"""OPT: GPT-2 with relu, separate projections, and positions that start at 2.

opt-350m differs: its norms stand after the sums, none after the last layer, and its embeddings are
narrower than the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.families.keys import classes, read_keys, write_keys
from jrlhf.models.families.table import LLAMA_MODULES, Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec

KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50272),
    "hidden_size": ("hidden_size", 768),
    "intermediate_size": ("ffn_dim", 3072),
    "num_hidden_layers": ("num_hidden_layers", 12),
    "num_attention_heads": ("num_attention_heads", 12),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "hidden_act": ("activation_function", "relu"),
    "tie_word_embeddings": ("tie_word_embeddings", True),
    "initializer_range": ("init_std", 0.02),
    "attention_bias": ("enable_bias", True),
}
NAMES = Names(
    embed="model.decoder.embed_tokens",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    positions="model.decoder.embed_positions",
    norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{layer}.",
    modules=LLAMA_MODULES
    | {
        "attn_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
        "attn_post_norm": "self_attn_layer_norm",
        "mlp_post_norm": "final_layer_norm",
        "attn.o": "self_attn.out_proj",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    },
)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with OPTConfig's defaults."""
    fields = read_keys(config, KEYS)
    width = int(config.get("word_embed_proj_dim") or fields["hidden_size"])
    if width < 1:
        raise UnsupportedModelError(f"word_embed_proj_dim={width} must be at least 1.")
    before = bool(config.get("do_layer_norm_before", True))
    return DecoderSpec(
        model_type="opt",
        positions="learned",
        position_offset=2,
        norm="layer",
        norm_eps=1e-5,
        norm_scale=bool(config.get("layer_norm_elementwise_affine", True)),
        block="pre" if before else "after",
        final_norm=before and not config.get("_remove_final_layer_norm"),
        embedding_size=0 if width == fields["hidden_size"] else width,
        mlp="plain",
        mlp_bias=fields["attention_bias"],
        **fields,
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    config = write_keys(spec, KEYS, classes("OPT"))
    before = spec.block == "pre"
    return config | {
        "word_embed_proj_dim": spec.head_size,
        "do_layer_norm_before": before,
        "layer_norm_elementwise_affine": spec.norm_scale,
        "_remove_final_layer_norm": before and not spec.final_norm,
    }


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of an OPT checkpoint."""
    return table(spec, NAMES)
