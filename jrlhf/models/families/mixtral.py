"""Mixtral: Mistral with routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.keys import classes, read_keys, window_of, with_defaults, write_keys
from jrlhf.models.families.mistral import KEYS as MISTRAL_KEYS
from jrlhf.models.families.mistral import same_windows
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.families.table import LLAMA_MODULES, Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec, MoeSpec

KEYS = with_defaults(MISTRAL_KEYS, norm_eps=1e-5)
ALIASES = {"num_experts": "num_local_experts"}
NAMES = Names(
    modules=LLAMA_MODULES
    | {
        "mlp.router": "block_sparse_moe.gate",
        "mlp.gate": "block_sparse_moe.experts.{expert}.w1",
        "mlp.up": "block_sparse_moe.experts.{expert}.w3",
        "mlp.down": "block_sparse_moe.experts.{expert}.w2",
    }
)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with MixtralConfig's defaults."""
    return DecoderSpec(
        model_type="mixtral",
        rope=read_rope(config, default_theta=1e6),
        windows=same_windows(config),
        moe=MoeSpec(
            num_experts=experts(config, 8),
            experts_per_token=int(config.get("num_experts_per_tok", 2)),
            router_aux_loss_coef=balance(config),
        ),
        **read_keys(config, KEYS),
    )


def experts(config: Mapping[str, Any], default: int) -> int:
    """How many there are."""
    count = config.get("num_local_experts")
    return int(default if count is None else count)


def balance(config: Mapping[str, Any]) -> float:
    """The weight of the load-balancing loss; transformers' default where the config is silent."""
    return float(config.get("router_aux_loss_coef", 0.001))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    assert spec.moe is not None
    return write_keys(spec, KEYS, classes("Mixtral")) | {
        "rope_parameters": write_rope(spec.rope),
        "sliding_window": window_of(spec),
        "num_local_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.experts_per_token,
        "router_aux_loss_coef": spec.moe.router_aux_loss_coef,
    }


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a Mixtral checkpoint."""
    return table(spec, NAMES)
