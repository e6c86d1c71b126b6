"""Qwen3-MoE: Qwen3 with routed experts, mostly in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.families import qwen3
from jrlhf.models.families.keys import (
    classes,
    read_keys,
    window_of,
    with_defaults,
    write_keys,
)
from jrlhf.models.families.mistral import same_windows
from jrlhf.models.families.mixtral import balance, experts
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.families.table import LLAMA_MODULES, Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec, MoeSpec

KEYS = with_defaults(
    qwen3.KEYS,
    hidden_size=2048,
    num_hidden_layers=24,
    num_key_value_heads=4,
    head_dim=None,
) | {"intermediate_size": ("moe_intermediate_size", 768)}
NAMES = Names(
    modules=LLAMA_MODULES
    | {
        "mlp.router": "mlp.gate",
        "mlp.gate": "mlp.experts.{expert}.gate_proj",
        "mlp.up": "mlp.experts.{expert}.up_proj",
        "mlp.down": "mlp.experts.{expert}.down_proj",
    }
)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with Qwen3MoeConfig's defaults.

    Raises:
        UnsupportedModelError: no layer has experts.
    """
    windowed = config.get("use_sliding_window")
    fields = read_keys(config, KEYS)
    dense = _dense_layers(config, fields["num_hidden_layers"])
    return DecoderSpec(
        model_type="qwen3_moe",
        rope=read_rope(config),
        qk_norm="head",
        # Unlike Qwen3, in all layers.
        windows=same_windows(config, default=4096) if windowed else (),
        moe=MoeSpec(
            num_experts=experts(config, 128),
            experts_per_token=int(config.get("num_experts_per_tok", 8)),
            normalize=bool(config.get("norm_topk_prob", False)),
            router_aux_loss_coef=balance(config),
            dense_layers=dense,
            dense_size=int(config.get("intermediate_size", 6144)) if dense else 0,
        ),
        **fields,
    )


def _dense_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The layers with a plain MLP: those named, and all but every so many."""
    named, step = config.get("mlp_only_layers"), config.get("decoder_sparse_step", 1)
    named = [] if named is None else named
    if not isinstance(named, list | tuple) or not all(type(i) is int for i in named):
        raise UnsupportedModelError(f"mlp_only_layers={named!r} must be numbers of layers.")
    if type(step) is not int or step < 1:
        raise UnsupportedModelError(
            f"decoder_sparse_step={step!r} must be a whole number of at least 1."
        )
    # As in transformers, which does not mind names of layers that there are not.
    dense = tuple(i for i in range(layers) if i in named or (i + 1) % step)
    if len(dense) == layers:
        raise UnsupportedModelError(
            f"mlp_only_layers={list(named)} and decoder_sparse_step={step} leave none of {layers}"
            " layers with experts: such a model is of model_type 'qwen3'."
        )
    return dense


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    assert spec.moe is not None
    return write_keys(spec, KEYS, classes("Qwen3Moe")) | {
        "rope_parameters": write_rope(spec.rope),
        "use_sliding_window": any(spec.windows),
        "sliding_window": window_of(spec),
        "num_experts": spec.moe.num_experts,
        "num_local_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.experts_per_token,
        "router_aux_loss_coef": spec.moe.router_aux_loss_coef,
        "norm_topk_prob": spec.moe.normalize,
        "mlp_only_layers": list(spec.moe.dense_layers),
        "decoder_sparse_step": 1,
        **({"intermediate_size": spec.moe.dense_size} if spec.moe.dense_layers else {}),
    }


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a Qwen3-MoE checkpoint."""
    return table(spec, NAMES)
