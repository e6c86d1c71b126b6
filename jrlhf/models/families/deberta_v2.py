"""DeBERTa-v2 and v3: BERT with disentangled attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.encoder_spec import POSITION_TERMS, EncoderSpec, RelativeSpec
from jrlhf.models.families import encoder_config as configs
from jrlhf.models.families.bert import NAMES
from jrlhf.models.families.encoder_weights import encoder_weights
from jrlhf.models.families.weights import Weight

_SIZES = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
}
_SELF = "deberta.encoder.layer.{layer}.attention.self."
_NAMES = {path: f"deberta.{name}" for path, name in NAMES.items()} | {
    "embed.proj": "deberta.embeddings.embed_proj",
    "embed.relative": "deberta.encoder.rel_embeddings",
    "embed.relative_norm": "deberta.encoder.LayerNorm",
    "embed.conv.taps": "deberta.encoder.conv.conv",
    "embed.conv.norm": "deberta.encoder.conv.LayerNorm",
    "layers.attn.q": _SELF + "query_proj",
    "layers.attn.k": _SELF + "key_proj",
    "layers.attn.v": _SELF + "value_proj",
    "layers.attn.position_k": _SELF + "pos_key_proj",
    "layers.attn.position_q": _SELF + "pos_query_proj",
    "pooler.dense": "pooler.dense",
    "score": "classifier",
}
# Heads of pretraining, a position table that v3's files carry unused, a buffer of positions.
IGNORED = (
    r"(lm_predictions|mask_predictions|cls)\..*",
    r"deberta\.embeddings\.position_(embeddings\.weight|ids)",
)


def read(config: Mapping[str, Any]) -> EncoderSpec:
    """config.json -> spec, with DebertaV2Config's defaults where a key is absent.

    Raises:
        UnsupportedModelError: a flag whose meaning is not implemented.
    """
    sizes = configs.sizes(config, _SIZES)
    hidden, width = sizes["hidden_size"], int(config.get("conv_kernel_size") or 0)
    heads = configs.heads(hidden, int(config.get("num_attention_heads", 24)))
    configs.refuse(
        config,
        attention_head_size=(heads["head_dim"], "its heads share the hidden size"),
        pooler_hidden_size=(hidden, "the classifier's dense layer has the hidden size"),
        **({"conv_groups": (1, "each channel of the convolution reads all")} if width else {}),
    )
    if width and width % 2 == 0:
        raise UnsupportedModelError(f"conv_kernel_size={width} must be odd: texts keep their size.")
    terms = config.get("pos_att_type") or ()
    terms = terms.lower().split("|") if isinstance(terms, str) else terms
    terms = tuple(sorted({str(term).strip() for term in terms}))
    farthest = int(config.get("max_relative_positions", -1))
    relative = RelativeSpec(
        attention=bool(config.get("relative_attention", False)),
        terms=terms,
        buckets=max(int(config.get("position_buckets", -1)), 0),
        max_distance=farthest if farthest >= 1 else sizes["max_position_embeddings"],
        share_keys=bool(config.get("share_att_key", False)),
        norm="layer_norm" in str(config.get("norm_rel_ebd")).lower().replace(" ", "").split("|"),
    )
    return EncoderSpec(
        model_type="deberta-v2",
        **sizes,
        **heads,
        embedding_size=int(config.get("embedding_size") or hidden),
        learned_positions=bool(config.get("position_biased_input", True)),
        norm_eps=float(config.get("layer_norm_eps", 1e-7)),
        hidden_act=configs.activation(config, "hidden_act"),
        # The divisor counts the terms even where relative attention is off.
        score_terms=1 + len(set(terms) & set(POSITION_TERMS)),
        relative=relative,
        conv_kernel_size=width,
        conv_act=configs.activation(config, "conv_act", "tanh"),
        pooler_act=configs.activation(config, "pooler_hidden_act"),
        **configs.common(config),
    )


def write(spec: EncoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides; `read` of it gives the spec back."""
    config = configs.shared(spec, "DebertaV2ForSequenceClassification")
    config |= {key: getattr(spec, key) for key in _SIZES}
    relative = spec.relative or RelativeSpec(attention=False)
    return config | {
        "relative_attention": relative.attention,
        "pos_att_type": list(relative.terms),
        "position_buckets": relative.buckets or -1,
        "max_relative_positions": relative.max_distance,
        "share_att_key": relative.share_keys,
        "norm_rel_ebd": "layer_norm" if relative.norm else "none",
        "position_biased_input": spec.learned_positions,
        "num_attention_heads": spec.num_attention_heads,
        "attention_head_size": spec.head_dim,
        "embedding_size": spec.embedding_size,
        "layer_norm_eps": spec.norm_eps,
        "conv_kernel_size": spec.conv_kernel_size,
        "conv_act": configs.activation_name(spec.conv_act),
        "hidden_act": configs.activation_name(spec.hidden_act),
        "pooler_hidden_act": configs.activation_name(spec.pooler_act),
        "pooler_hidden_size": spec.hidden_size,
    }


def weights(spec: EncoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a checkpoint with this spec."""
    return encoder_weights(spec, _NAMES)
