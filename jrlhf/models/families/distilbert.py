"""DistilBERT: BERT without token types, under names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.families import encoder_config as configs
from jrlhf.models.families.encoder_weights import encoder_weights
from jrlhf.models.families.weights import Weight

# Our field: its key and its default.
_SIZES = {
    "hidden_size": ("dim", 768),
    "intermediate_size": ("hidden_dim", 3072),
    "num_hidden_layers": ("n_layers", 6),
    "max_position_embeddings": ("max_position_embeddings", 512),
    "vocab_size": ("vocab_size", 30522),
}
ALIASES = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
}
_LAYER = "distilbert.transformer.layer.{layer}."
_NAMES = {
    "embed.table": "distilbert.embeddings.word_embeddings",
    "embed.positions": "distilbert.embeddings.position_embeddings",
    "embed.norm": "distilbert.embeddings.LayerNorm",
    "layers.attn.q": _LAYER + "attention.q_lin",
    "layers.attn.k": _LAYER + "attention.k_lin",
    "layers.attn.v": _LAYER + "attention.v_lin",
    "layers.attn.o": _LAYER + "attention.out_lin",
    "layers.attn_norm": _LAYER + "sa_layer_norm",
    "layers.mlp.up": _LAYER + "ffn.lin1",
    "layers.mlp.down": _LAYER + "ffn.lin2",
    "layers.mlp_norm": _LAYER + "output_layer_norm",
    "pooler.dense": "pre_classifier",
    "score": "classifier",
}
IGNORED = (r"vocab_(transform|layer_norm|projector)\..*", r".*embeddings\.position_ids")


def read(config: Mapping[str, Any]) -> EncoderSpec:
    """config.json -> spec, with DistilBertConfig's defaults where a key is absent.

    Raises:
        UnsupportedModelError: a flag whose meaning is not implemented.
    """
    configs.refuse(config)
    sizes: dict[str, Any] = {field: int(config.get(*key)) for field, key in _SIZES.items()}
    return EncoderSpec(
        model_type="distilbert",
        **sizes,
        **configs.heads(sizes["hidden_size"], int(config.get("n_heads", 12))),
        embedding_size=sizes["hidden_size"],
        hidden_act=configs.activation(config, "activation"),
        pooler_act="relu",
        **configs.common(config),
    )


def write(spec: EncoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides; `read` of it gives the spec back."""
    config = configs.shared(spec, "DistilBertForSequenceClassification")
    config |= {key: getattr(spec, field) for field, (key, _) in _SIZES.items()}
    config["n_heads"] = spec.num_attention_heads
    config["activation"] = configs.activation_name(spec.hidden_act)
    return config


def weights(spec: EncoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a checkpoint with this spec."""
    return encoder_weights(spec, _NAMES)
