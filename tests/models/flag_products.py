"""Every combination of flags that a family's config allows, on the tiny models of the cases.

A family has flags, a flag has settings, a setting changes keys of the config. `python -m
tests.models.table` measures the whole product of each family and writes the worst of it; a test
measures some.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tests.models import encoder_cases
from tests.models.decoder_cases import (
    BASE,
    DYNAMIC,
    EXPERTS,
    GPT,
    LINEAR,
    LLAMA3,
    LONG,
    MIXED,
    QWEN_EXPERTS,
    WIDE,
    YARN,
)

# What changes in a config.
Changes = Mapping[str, Any]
Flags = Mapping[str, tuple[Changes, ...]]


def switch(key: str, *values: Any) -> tuple[Changes, ...]:
    """The settings of one key; off and on where none are named."""
    return tuple({key: value} for value in values or (False, True))


def ropes(*kinds: Changes) -> tuple[Changes, ...]:
    return tuple({"rope_parameters": dict(kind)} for kind in kinds)


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = LONG | {"original_max_position_embeddings": 12}
TYPES = (PLAIN, LINEAR, DYNAMIC, YARN, LLAMA3, LONGROPE)


def partly(share: float, *kinds: Changes) -> tuple[Changes, ...]:
    return ropes(*({**kind, "partial_rotary_factor": share} for kind in kinds))


def by_layer_type(full: Changes, sliding: Changes) -> Changes:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


# Each type in full layers, and each in windowed ones.
TWO_ROPES = (
    *(by_layer_type(kind, {**PLAIN, "rope_theta": 1e3}) for kind in TYPES),
    *(by_layer_type({**PLAIN, "rope_theta": 1e6}, kind) for kind in TYPES[1:]),
)
TIED = {"tied": switch("tie_word_embeddings")}
BIAS = {"attention_bias": switch("attention_bias")}
MLP_BIAS = {"mlp_bias": switch("mlp_bias")}
GROUPS = {"key-value heads": switch("num_key_value_heads", 2, 1)}
HEADS = {"head_dim": ({}, WIDE)}
ROPE = {"rope": ropes(*TYPES)}
WINDOW = {"window": switch("sliding_window", None, 5)}
TOP = {"experts per token": switch("num_experts_per_tok", 1, 2)}
ACTS = ("gelu_new", "gelu", "relu", "silu")
# A family's own activation, and others.
ACT = {"activation": ({}, *switch("hidden_act", "gelu"))}
GEMMA_ACT = {"activation": ({}, *switch("hidden_activation", "gelu"))}
ALL_ACTS = {"activation": ({}, *switch("hidden_act", "gelu", "gelu_pytorch_tanh", "relu"))}

DECODERS: dict[str, Flags] = {
    "llama": {
        **ROPE, **TIED, **BIAS, **MLP_BIAS, **GROUPS, **HEADS, **ALL_ACTS,
    },
    "mistral": {**WINDOW, **ROPE, **TIED, **GROUPS, **HEADS, **ACT},
    "qwen2": {
        "windows": (
            {},
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
            {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
        ),
        **ROPE, **TIED, **GROUPS, **ACT,
    },
    "qwen3": {
        "windows": (
            {},
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
            {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
        ),
        "head_dim": ({"head_dim": 8}, WIDE),
        **ROPE, **TIED, **BIAS, **ACT,
    },
    "gemma": {
        "activation": switch("hidden_act", "gelu_pytorch_tanh", "gelu"),
        "head_dim": ({"head_dim": 8}, WIDE),
        **ROPE, **TIED, **BIAS,
    },
    "gemma2": {
        "score cap": switch("attn_logit_softcapping", None, 2.0),
        "final cap": switch("final_logit_softcapping", None, 3.0),
        "windows": ({"sliding_window": 5}, {"sliding_window": 5, "layer_types": MIXED}),
        "score scale": switch("query_pre_attn_scalar", 256, 10),
        "head_dim": ({"head_dim": 8},),
        **ROPE, **TIED, **BIAS, **GEMMA_ACT,
    },
    "gemma3_text": {
        "ropes": TWO_ROPES,
        "windows": tuple(
            {"sliding_window": 5, "layer_types": types}
            for types in (MIXED, ["full_attention"] * 4, ["sliding_attention"] * 4)
        ),
        "final cap": switch("final_logit_softcapping", None, 3.0),
        "head_dim": ({"head_dim": 8},),
        **TIED, **BIAS, **GEMMA_ACT,
    },
    "phi3": {
        "rope": tuple(
            rope | {"original_max_position_embeddings": 12}
            for rope in (*ropes(PLAIN, LONG), *partly(0.5, PLAIN, LONG))
        ),
        **WINDOW, **TIED, **GROUPS, **ACT,
    },
    "olmo2": {**ROPE, **TIED, **BIAS, **GROUPS, **ACT},
    "smollm3": {
        "layers without rope": switch(
            "no_rope_layers", [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]
        ),
        "windows": ({}, {"use_sliding_window": True, "sliding_window": 5}),
        **ROPE, **TIED, **BIAS, **MLP_BIAS, **ACT,
    },
    "granite": {
        "score scale": switch("attention_multiplier", 1.0, 0.2),
        "embedding scale": switch("embedding_multiplier", 1.0, 3.0),
        "residual scale": switch("residual_multiplier", 1.0, 0.3),
        "logits scale": switch("logits_scaling", 1.0, 7.0),
        **ROPE, **TIED, **BIAS, **MLP_BIAS, **ACT,
    },
    "cohere": {
        "q/k norm": switch("use_qk_norm"),
        "logit scale": switch("logit_scale", 0.0625, 0.25),
        **ROPE, **TIED, **BIAS, **GROUPS, **ACT,
    },
    "gpt2": {
        "activation": switch("activation_function", *ACTS),
        "scores by layer": switch("scale_attn_by_inverse_layer_idx"),
        "scaled scores": switch("scale_attn_weights"),
        "inner width": switch("n_inner", None, 44),
        "sizes": (GPT,),
        **TIED,
    },
    "gpt_neox": {
        "parallel": switch("use_parallel_residual"),
        "rope": (*partly(0.25, PLAIN), *partly(0.5, *TYPES), *partly(1.0, *TYPES)),
        "activation": switch("hidden_act", "gelu", "gelu_new"),
        **TIED, **BIAS,
    },
    "gptj": {
        "turned": switch("rotary_dim", 2, 4, 8),
        "activation": switch("activation_function", *ACTS),
        "inner width": switch("n_inner", None, 44),
        "sizes": (GPT,),
        **TIED,
    },
    "opt": {
        "norms before": switch("do_layer_norm_before"),
        "final norm": switch("_remove_final_layer_norm"),
        "embeddings": switch("word_embed_proj_dim", 32, 20, 40),
        "biases": switch("enable_bias"),
        "norm parameters": switch("layer_norm_elementwise_affine"),
        "activation": switch("activation_function", "relu", "gelu"),
        "sizes": ({"ffn_dim": 44},),
        **TIED,
    },
    "mixtral": {
        "experts": (EXPERTS | {"head_dim": 8},),
        **TOP, **WINDOW, **ROPE, **TIED, **GROUPS, **ACT,
    },
    "qwen3_moe": {
        "experts": (QWEN_EXPERTS,),
        "normed weights": switch("norm_topk_prob"),
        "plain MLPs": ({}, {"mlp_only_layers": [0, 2]}),
        "windows": ({}, {"use_sliding_window": True, "sliding_window": 5}),
        "head_dim": ({"head_dim": 8}, WIDE),
        **TOP, **ROPE, **TIED, **BIAS, **ACT,
    },
    "gpt_oss": {
        "experts": (EXPERTS,),
        "windows": tuple(
            {"sliding_window": 5, "layer_types": types}
            for types in (MIXED, ["full_attention"] * 4, ["sliding_attention"] * 4)
        ),
        "rope": ({}, *ropes(*TYPES)),
        "gate": switch("swiglu_limit", 1.0, 7.0),
        "head_dim": ({"head_dim": 8}, WIDE),
        **TOP, **TIED, **BIAS,
    },
}  # fmt: skip

BERT = {"sizes": (encoder_cases.BASE,)}
LABELS = {"labels": switch("num_labels", 1, 3)}
PAD = {"padding id": switch("pad_token_id", 0, 1)}
TERMS = switch("pos_att_type", "c2p", "p2c", "p2c|c2p")
DEBERTA = {
    "normed positions": switch("norm_rel_ebd", "none", "layer_norm"),
    "absolute positions": switch("position_biased_input"),
    "token types": switch("type_vocab_size", 0, 2),
    "convolution": ({}, {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "embeddings": switch("embedding_size", 32, 20),
    "activations": ({}, {"hidden_act": "relu", "pooler_hidden_act": "tanh"}),
}
# By transformers' class; what follows it tells two products of one family apart.
ENCODERS: dict[str, Flags] = {
    "Bert": {
        **BERT,
        "activation": switch("hidden_act", *ACTS),
        "token types": switch("type_vocab_size", 1, 2),
        **LABELS,
    },
    "Roberta": {
        **BERT, **PAD,
        "activation": switch("hidden_act", *ACTS),
        "token types": switch("type_vocab_size", 1, 2),
        **LABELS,
    },
    "XLMRoberta": {
        **BERT, **PAD,
        "activation": switch("hidden_act", *ACTS),
        "token types": switch("type_vocab_size", 1, 2),
        **LABELS,
    },
    "DistilBert": {
        "sizes": (encoder_cases.DISTILBERT,),
        "activation": switch("activation", "gelu", "relu"),
        "sinusoidal positions": switch("sinusoidal_pos_embds"),
        **LABELS,
    },
    "ModernBert": {
        "sizes": (encoder_cases.MODERNBERT | {"num_labels": 3},),
        "pooling": switch("classifier_pooling", "cls", "mean"),
        "norm bias": switch("norm_bias"),
        "classifier bias": switch("classifier_bias"),
        "local layers": (
            {},
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        ),
        "activations": (
            *switch("hidden_activation", "gelu", "gelu_pytorch_tanh"),
            {"hidden_activation": "gelu", "classifier_activation": "silu"},
        ),
        "ropes": TWO_ROPES,
        **BIAS, **MLP_BIAS,
    },
    "DebertaV2": {
        "sizes": (encoder_cases.DEBERTA | {"attention_head_size": 8, "num_labels": 3},),
        "terms": TERMS,
        "shared keys": switch("share_att_key"),
        "buckets": switch("position_buckets", -1, 8),
        **DEBERTA,
    },
    # Of relative positions two things are left: the terms still count in the scores' divisor, and
    # the norm still has its weights. The rest is not read, whatever it is.
    "DebertaV2 without relative attention": {
        "sizes": (
            encoder_cases.DEBERTA
            | {"relative_attention": False, "share_att_key": False, "position_buckets": 200}
            | {"attention_head_size": 8, "num_labels": 3},
        ),
        "terms": TERMS,
        **DEBERTA,
    },
}  # fmt: skip

# Numbers that stand in no product; half of the combinations that tests draw change them too.
EPS = {"rms_norm_eps": 0.1}
BALANCE = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
NUMBERS: dict[str, Changes] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), EPS),
    **dict.fromkeys(("olmo2", "smollm3", "granite"), EPS),
    "phi3": EPS | {"original_max_position_embeddings": 14},
    "gemma2": EPS | {"sliding_window": 7},
    "gemma3_text": EPS | {"query_pre_attn_scalar": 10, "sliding_window": 7},
    "cohere": {"layer_norm_eps": 0.1},
    "gpt2": {"layer_norm_epsilon": 0.1},
    "gpt_neox": {"layer_norm_eps": 0.1},
    "gptj": {"layer_norm_epsilon": 0.1},
    "opt": {},
    "mixtral": EPS | BALANCE,
    "qwen3_moe": EPS | BALANCE,
    "gpt_oss": EPS | BALANCE | {"swiglu_alpha": 1.1, "sliding_window": 7},
    "Bert": {"layer_norm_eps": 0.1},
    "Roberta": {"layer_norm_eps": 0.1},
    "XLMRoberta": {"layer_norm_eps": 0.1},
    "DistilBert": {},
    "ModernBert": {"norm_eps": 0.1, "local_attention": 6, "num_labels": 1},
    "DebertaV2": {"layer_norm_eps": 0.1, "max_relative_positions": 6, "num_labels": 1},
}


def products(flags: Flags) -> Iterator[dict[str, Any]]:
    """Every combination of the flags' settings."""
    for settings in itertools.product(*flags.values()):
        changes: dict[str, Any] = {}
        for setting in settings:
            changes |= setting
        yield _fitted(changes)


def _fitted(changes: dict[str, Any]) -> dict[str, Any]:
    """longrope has a factor for each pair of channels; dynamic acts beyond the longest position."""
    rope = changes.get("rope_parameters", {})
    layers = {key: value for key, value in rope.items() if isinstance(value, Mapping)}
    fitted = {key: _paired(value, changes) for key, value in layers.items()}
    fitted = fitted or _paired(rope, changes)
    if any(kind.get("rope_type") == "dynamic" for kind in layers.values() or (rope,)):
        changes = changes | {"max_position_embeddings": 16}
    return changes | {"rope_parameters": fitted} if rope else changes


def _paired(rope: Changes, changes: Changes) -> Changes:
    if rope.get("rope_type") != "longrope":
        return rope
    width = changes.get("head_dim", BASE["hidden_size"] // BASE["num_attention_heads"])
    pairs = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    more = {key: (2 * rope[key])[:pairs] for key in ("short_factor", "long_factor")}
    return {**rope, **more}


def prefix(name: str) -> str:
    """transformers' class of a product of encoders."""
    return name.split()[0]


def count(flags: Flags) -> int:
    return math.prod(len(settings) for settings in flags.values())


def say(flags: Flags) -> str:
    """The flags that have several settings, and how many."""
    several = ((name, len(settings)) for name, settings in flags.items())
    return ", ".join(name + (f" ({n})" if n > 2 else "") for name, n in several if n > 1)
