"""BERT, and RoBERTa, which differs in its positions, its head and its names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.families import encoder_config as configs
from jrlhf.models.families.encoder_weights import encoder_weights
from jrlhf.models.families.weights import Weight

_SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
_LAYER = "encoder.layer.{layer}."
# Behind the prefix of the family.
NAMES = {
    "embed.table": "embeddings.word_embeddings",
    "embed.positions": "embeddings.position_embeddings",
    "embed.types": "embeddings.token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm",
    "layers.attn.q": _LAYER + "attention.self.query",
    "layers.attn.k": _LAYER + "attention.self.key",
    "layers.attn.v": _LAYER + "attention.self.value",
    "layers.attn.o": _LAYER + "attention.output.dense",
    "layers.attn_norm": _LAYER + "attention.output.LayerNorm",
    "layers.mlp.up": _LAYER + "intermediate.dense",
    "layers.mlp.down": _LAYER + "output.dense",
    "layers.mlp_norm": _LAYER + "output.LayerNorm",
}
_BERT = {path: f"bert.{name}" for path, name in NAMES.items()}
_BERT |= {"pooler.dense": "bert.pooler.dense", "score": "classifier"}
_ROBERTA = {path: f"roberta.{name}" for path, name in NAMES.items()}
_ROBERTA |= {"pooler.dense": "classifier.dense", "score": "classifier.out_proj"}
# Heads of pretraining, a pooler that RoBERTa's classifier does not use, and a buffer of positions.
IGNORED = (r"cls\..*", r"lm_head\..*", r"roberta\.pooler\..*", r".*embeddings\.position_ids")
# Checkpoints that were converted from TensorFlow.
RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def read(config: Mapping[str, Any], *, model_type: str) -> EncoderSpec:
    """config.json -> spec, with transformers' defaults where a key is absent.

    Raises:
        UnsupportedModelError: a flag whose meaning is not implemented.
    """
    configs.refuse(
        config,
        is_decoder=(False, "an encoder reads a text from both sides"),
        add_cross_attention=(False, "an encoder alone has nothing to cross to"),
        position_embedding_type=("absolute", "transformers 5 knows no other either"),
    )
    sizes = configs.sizes(config, _SIZES)
    # RoBERTa counts positions from the id of its padding token + 1.
    padding = config.get("pad_token_id")
    offset = 0 if model_type == "bert" else int(1 if padding is None else padding) + 1
    return EncoderSpec(
        model_type=model_type,
        vocab_size=int(config.get("vocab_size", 50265 if model_type == "roberta" else 30522)),
        **sizes,
        **configs.heads(sizes["hidden_size"], int(config.get("num_attention_heads", 12))),
        embedding_size=sizes["hidden_size"],
        max_position_embeddings=int(config.get("max_position_embeddings", 512)) - offset,
        position_offset=offset,
        type_vocab_size=int(config.get("type_vocab_size", 2)),
        norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        hidden_act=configs.activation(config, "hidden_act"),
        **configs.common(config),
    )


def write(spec: EncoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides; `read` of it gives the spec back."""
    config = configs.shared(spec, f"{_CLASSES[spec.model_type]}ForSequenceClassification")
    config |= {key: getattr(spec, key) for key in _SIZES}
    if spec.model_type != "bert":
        config["pad_token_id"] = spec.position_offset - 1
    return config | {
        "num_attention_heads": spec.num_attention_heads,
        "max_position_embeddings": spec.position_rows,
        "type_vocab_size": spec.type_vocab_size,
        "layer_norm_eps": spec.norm_eps,
        "hidden_act": configs.activation_name(spec.hidden_act),
    }


def weights(spec: EncoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a checkpoint with this spec."""
    return encoder_weights(spec, _BERT if spec.model_type == "bert" else _ROBERTA)


read_bert = functools.partial(read, model_type="bert")
read_roberta = functools.partial(read, model_type="roberta")
read_xlm_roberta = functools.partial(read, model_type="xlm-roberta")
