"""GPT-NeoX and Pythia: attention beside the MLP, a part of each head turned, q, k and v fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.keys import classes, read_keys, refuse, write_keys
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.families.table import Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec

KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50432),
    "hidden_size": ("hidden_size", 6144),
    "intermediate_size": ("intermediate_size", 24576),
    "num_hidden_layers": ("num_hidden_layers", 44),
    "num_attention_heads": ("num_attention_heads", 64),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "hidden_act": ("hidden_act", "gelu"),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
    "attention_bias": ("attention_bias", True),
}
NAMES = Names(
    embed="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
    head="embed_out",
    layer="gpt_neox.layers.{layer}.",
    modules={
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attn.o": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    fused={"attention.query_key_value": ("attn.q", "attn.k", "attn.v")},
    split="heads",
    tokens="classifier",
)
# transformers 5 calls the head so in memory, and in files by its old name.
RENAMES = ((r"^lm_head\.", "embed_out."),)
IGNORED = (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with GPTNeoXConfig's defaults.

    Raises:
        UnsupportedModelError: `head_dim` is not what the hidden size gives a head.
    """
    fields = read_keys(config, KEYS)
    width = fields["hidden_size"] // fields["num_attention_heads"]
    refuse(config, "head_dim", (None, width), "its heads share the hidden size")
    old = {
        "rope_theta": config.get("rotary_emb_base") or config.get("rope_theta"),
        "partial_rotary_factor": config.get("rotary_pct", config.get("partial_rotary_factor")),
    }
    parallel = config.get("use_parallel_residual", True)
    return DecoderSpec(
        model_type="gpt_neox",
        rope=read_rope({**config, **old}, default_partial=0.25),
        norm="layer",
        mlp="plain",
        mlp_bias=True,
        block="parallel" if parallel else "pre",
        **fields,
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    rope = write_rope(spec.rope)
    # Always: without it a quarter is turned.
    rope["partial_rotary_factor"] = spec.rope.partial_rotary_factor
    return write_keys(spec, KEYS, classes("GPTNeoX")) | {
        "rope_parameters": rope,
        "rotary_pct": spec.rope.partial_rotary_factor,
        "rotary_emb_base": spec.rope.rope_theta,
        "use_parallel_residual": spec.block == "parallel",
    }


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a GPT-NeoX checkpoint."""
    return table(spec, NAMES)
