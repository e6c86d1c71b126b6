"""ModernBERT: norms in front, rotary positions, local layers between full ones, gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.families import encoder_config as configs
from jrlhf.models.families.encoder_weights import encoder_weights
from jrlhf.models.families.rope_config import by_layer_type, one_rope, write_rope
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import RopeSpec

_SIZES = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "max_position_embeddings": 8192,
}
_FLAGS = {"norm_bias": "norm_bias", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias",
          "classifier_bias": "pooler_bias"}  # fmt: skip
_KINDS = {False: "full_attention", True: "sliding_attention"}
_THETAS = {"full_attention": ("global_rope_theta", 160000.0),
           "sliding_attention": ("local_rope_theta", 10000.0)}  # fmt: skip
_LAYER = "model.layers.{layer}."
_NAMES = {
    "embed.table": "model.embeddings.tok_embeddings",
    "embed.norm": "model.embeddings.norm",
    "layers.attn.qkv": _LAYER + "attn.Wqkv",
    "layers.attn.o": _LAYER + "attn.Wo",
    "layers.attn_norm": _LAYER + "attn_norm",
    "layers.mlp.up": _LAYER + "mlp.Wi",
    "layers.mlp.down": _LAYER + "mlp.Wo",
    "layers.mlp_norm": _LAYER + "mlp_norm",
    "norm": "model.final_norm",
    "pooler.dense": "head.dense",
    "pooler.norm": "head.norm",
    "score": "classifier",
}
IGNORED = (r"decoder\..*",)


def read(config: Mapping[str, Any]) -> EncoderSpec:
    """config.json -> spec, with ModernBertConfig's defaults where a key is absent.

    Raises:
        UnsupportedModelError: a flag whose meaning is not implemented.
    """
    configs.refuse(config)
    sizes = configs.sizes(config, _SIZES)
    layers = sizes["num_hidden_layers"]
    every = int(config.get("global_attn_every_n_layers") or 3)
    kinds = config.get("layer_types") or [_KINDS[i % every > 0] for i in range(layers)]
    if unknown := set(kinds) - set(_KINDS.values()):
        raise UnsupportedModelError(f"layer_types has {sorted(unknown)}; known: {[*_THETAS]}.")
    pooling = config.get("classifier_pooling", "cls")
    flags: dict[str, Any] = {field: bool(config.get(key)) for key, field in _FLAGS.items()}
    full, local = (_rope(config, kind) for kind in _THETAS)
    side = config.get("sliding_window")  # wins, as in transformers
    return EncoderSpec(
        model_type="modernbert",
        **sizes,
        **configs.heads(sizes["hidden_size"], int(config.get("num_attention_heads", 12))),
        embedding_size=sizes["hidden_size"],
        learned_positions=False,
        norm_eps=float(config.get("norm_eps", 1e-5)),
        **flags,
        pre_norm=True,
        gated_mlp=True,
        hidden_act=configs.activation(config, "hidden_activation"),
        rope=full,
        local_rope=local,
        local=tuple(kind == _KINDS[True] for kind in kinds),
        window=int(config.get("local_attention", 128)) // 2 if side is None else int(side),
        pooling={"cls": "first"}.get(pooling, pooling),
        pooler_act=configs.activation(config, "classifier_activation"),
        pooler_norm=True,
        **configs.common(config),
    )


def _rope(config: Mapping[str, Any], kind: str) -> RopeSpec:
    """transformers 5 has `rope_parameters` per kind of layer, 4 a base per kind or one for both."""
    given, scaling = by_layer_type(config)
    base, first = config.get(*_THETAS[kind]), config.get(*_THETAS["full_attention"])
    rest = {key: value for key, value in config.items() if key != "rope_theta"}
    raw = {**(given.get(kind) or {}), **scaling}
    return one_rope(raw, rest, default_theta=float(base or first))


def write(spec: EncoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides; `read` of it gives the spec back."""
    assert spec.rope is not None and spec.local_rope is not None  # noqa: PT018
    ropes = dict(zip(_THETAS, (spec.rope, spec.local_rope), strict=True))
    config = configs.shared(spec, "ModernBertForSequenceClassification")
    config |= {key: getattr(spec, key) for key in _SIZES}
    config |= {key: getattr(spec, field) for key, field in _FLAGS.items()}
    config |= {_THETAS[kind][0]: rope.rope_theta for kind, rope in ropes.items()}
    # transformers 4 knows a full layer every so many only.
    config["global_attn_every_n_layers"] = [*spec.local[1:], False].index(False) + 1
    return config | {
        "layer_types": [_KINDS[local] for local in spec.local],
        "rope_parameters": {kind: write_rope(rope) for kind, rope in ropes.items()},
        "num_attention_heads": spec.num_attention_heads,
        "local_attention": 2 * spec.window,
        "norm_eps": spec.norm_eps,
        "hidden_activation": configs.activation_name(spec.hidden_act),
        "classifier_activation": configs.activation_name(spec.pooler_act),
        "classifier_pooling": "cls" if spec.pooling == "first" else spec.pooling,
    }


def weights(spec: EncoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a checkpoint with this spec."""
    return encoder_weights(spec, _NAMES)
