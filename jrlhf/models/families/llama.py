"""Llama and every checkpoint whose config.json says `model_type: llama`: SmolLM2, TinyLlama, ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.families.weights import Weight, matrix, vector
from jrlhf.models.spec import DecoderSpec

# transformers' names -> ours. The exact gelu and its tanh approximation differ; keep them apart.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
# Buffers that old checkpoints carry; they are computed from the config.
IGNORED = (r".*rotary_emb\.inv_freq$", r".*self_attn\.masked_bias$")


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with LlamaConfig's defaults where a key is absent.

    Raises:
        UnsupportedModelError: a flag whose meaning is not implemented.
    """
    if config.get("quantization_config"):
        raise UnsupportedModelError("quantization_config: quantized weights are not implemented.")
    act = config.get("hidden_act", "silu")
    if act not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise UnsupportedModelError(f"hidden_act={act!r} is not implemented; known: {known}.")
    hidden = int(config.get("hidden_size", 4096))
    heads = int(config.get("num_attention_heads", 32))
    labels = config.get("id2label")
    return DecoderSpec(
        model_type="llama",
        vocab_size=int(config.get("vocab_size", 32000)),
        hidden_size=hidden,
        intermediate_size=int(config.get("intermediate_size", 11008)),
        num_hidden_layers=int(config.get("num_hidden_layers", 32)),
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
        norm="rms",
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=read_rope(config),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        hidden_act=ACTIVATIONS[act],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        initializer_range=float(config.get("initializer_range", 0.02)),
        num_labels=len(labels) if labels else int(config.get("num_labels", 2)),
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides; `read` of it gives the spec back."""
    if spec.norm != "rms":
        raise UnsupportedModelError(f"norm={spec.norm!r} cannot be written as a Llama config.")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": [
            "LlamaForSequenceClassification" if spec.head == "classifier" else "LlamaForCausalLM"
        ],
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": write_rope(spec.rope),
        "attention_bias": spec.attention_bias,
        "mlp_bias": spec.mlp_bias,
        "hidden_act": _ACTIVATION_NAMES[spec.hidden_act],
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
    }
    if spec.head == "classifier":
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(spec.num_labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(spec.num_labels)}
    return config


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a Llama checkpoint with this spec's heads (value head: TRL's names)."""
    v, d, f, e = spec.vocab_size, spec.hidden_size, spec.intermediate_size, spec.head_dim
    h, k = spec.num_attention_heads, spec.num_key_value_heads
    rows = [
        Weight(
            path=("embed", "table"),
            name="model.embed_tokens.weight",
            shape=(v, d),
            groups=((0,), (1,)),
        ),
        vector(("norm", "scale"), "model.norm.weight", d),
        *_layer(d, f, e, h, k, attention_bias=spec.attention_bias, mlp_bias=spec.mlp_bias),
    ]
    if spec.head == "classifier":
        rows.append(matrix(("score", "kernel"), "score.weight", d, spec.num_labels, optional=True))
    elif not spec.tie_word_embeddings:
        rows.append(matrix(("head", "kernel"), "lm_head.weight", d, v))
    if spec.value_head:
        rows.append(matrix(("value", "kernel"), "v_head.summary.weight", d, 1, optional=True))
        rows.append(vector(("value", "bias"), "v_head.summary.bias", 1, optional=True))
    return tuple(rows)


def _layer(
    d: int, f: int, e: int, h: int, k: int, *, attention_bias: bool, mlp_bias: bool
) -> list[Weight]:
    """The tensors of one layer."""
    own, theirs = ("layers",), "model.layers.{layer}."
    rows = [
        vector((*own, "attn_norm", "scale"), theirs + "input_layernorm.weight", d),
        vector((*own, "mlp_norm", "scale"), theirs + "post_attention_layernorm.weight", d),
    ]
    for name, n in (("q", h), ("k", k), ("v", k)):
        path, hf = (*own, "attn", name), f"{theirs}self_attn.{name}_proj."
        rows.append(matrix((*path, "kernel"), hf + "weight", d, n, e))
        if attention_bias:
            rows.append(vector((*path, "bias"), hf + "bias", n, e))
    path, hf = (*own, "attn", "o"), f"{theirs}self_attn.o_proj."
    rows.append(matrix((*path, "kernel"), hf + "weight", h, e, d, inputs=2))
    if attention_bias:
        rows.append(vector((*path, "bias"), hf + "bias", d))
    for name, n_in, n_out in (("gate", d, f), ("up", d, f), ("down", f, d)):
        path, hf = (*own, "mlp", name), f"{theirs}mlp.{name}_proj."
        rows.append(matrix((*path, "kernel"), hf + "weight", n_in, n_out))
        if mlp_bias:
            rows.append(vector((*path, "bias"), hf + "bias", n_out))
    return rows
