"""GPT-OSS: routed experts with a clamped gate, attention sinks, a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.gemma2 import typed_windows
from jrlhf.models.families.keys import (
    FULL,
    SLIDING,
    classes,
    read_keys,
    read_windows,
    with_defaults,
    write_keys,
)
from jrlhf.models.families.llama import COMMON
from jrlhf.models.families.mixtral import balance, experts
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.families.table import LLAMA_MODULES, Names, table
from jrlhf.models.families.weights import Part, Weight, array
from jrlhf.models.spec import DecoderSpec, MoeSpec

KEYS = with_defaults(
    COMMON,
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_hidden_layers=36,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    norm_eps=1e-5,
) | {"attention_bias": ("attention_bias", True)}
NAMES = Names(
    modules={k: v for k, v in LLAMA_MODULES.items() if "mlp." not in k}
    | {
        "mlp.router": "mlp.router",
    }
)
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with GptOssConfig's defaults."""
    fields = read_keys(config, KEYS)
    layers = fields["num_hidden_layers"]
    given = config.get("rope_parameters") or config.get("rope_scaling") or ROPE
    return DecoderSpec(
        model_type="gpt_oss",
        rope=read_rope({**config, "rope_parameters": given}, default_theta=150000.0),
        attention_sinks=True,
        windows=read_windows(config, layers, [SLIDING, FULL] * layers, default=128),
        moe=MoeSpec(
            num_experts=experts(config, 128),
            experts_per_token=int(config.get("num_experts_per_tok", 4)),
            router_bias=True,
            expert_bias=True,
            clamp=float(config.get("swiglu_limit", 7.0)),
            alpha=float(config.get("swiglu_alpha", 1.702)),
            router_aux_loss_coef=balance(config),
        ),
        **fields,
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    assert spec.moe is not None
    return write_keys(spec, KEYS, classes("GptOss")) | {
        "rope_parameters": write_rope(spec.rope),
        **typed_windows(spec),
        "num_local_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.experts_per_token,
        "router_aux_loss_coef": spec.moe.router_aux_loss_coef,
        "swiglu_limit": spec.moe.clamp,
        "swiglu_alpha": spec.moe.alpha,
    }


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a GPT-OSS checkpoint: all experts in one, gate and up element by element."""
    assert spec.moe is not None
    x, d, f = spec.moe.num_experts, spec.hidden_size, spec.intermediate_size
    name = "model.layers.{layer}.mlp.experts."
    rows = []
    for i, ours in enumerate(("gate", "up")):
        path, part = ("layers", "mlp", ours), Part(2, f, i, 1, 2)
        bias = Part(1, f, i, 1, 2)
        rows.append(array((*path, "kernel"), name + "gate_up_proj", x, d, f, part=part))
        rows.append(array((*path, "bias"), name + "gate_up_proj_bias", x, f, part=bias))
    path = ("layers", "mlp", "down")
    rows.append(array((*path, "kernel"), name + "down_proj", x, f, d))
    rows.append(array((*path, "bias"), name + "down_proj_bias", x, d))
    return (*table(spec, NAMES), *rows)
