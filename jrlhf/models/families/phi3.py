"""Phi-3 and 4: Llama with fused projections; long contexts by longrope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.keys import classes, read_keys, window_of, with_defaults, write_keys
from jrlhf.models.families.llama import COMMON
from jrlhf.models.families.mistral import same_windows
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.families.table import LLAMA_MODULES, Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(
    COMMON,
    vocab_size=32064,
    hidden_size=3072,
    intermediate_size=8192,
    max_position_embeddings=4096,
    norm_eps=1e-5,
)
NAMES = Names(
    modules={k: v for k, v in LLAMA_MODULES.items() if k not in ("attn.q", "attn.k", "attn.v")},
    fused={
        "self_attn.qkv_proj": ("attn.q", "attn.k", "attn.v"),
        "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
    },
)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with Phi3Config's defaults."""
    raw = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    # Old names of longrope, as in Phi3Config; "yarn" among them.
    if (raw.get("rope_type") or raw.get("type")) in ("su", "yarn"):
        raw["rope_type"] = "longrope"
    keys = {"original_max_position_embeddings": 4096, **config, "rope_scaling": raw}
    return DecoderSpec(
        model_type="phi3",
        rope=read_rope(keys, default_partial=1.0),
        windows=same_windows(config),
        **read_keys(config, KEYS),
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    config = write_keys(spec, KEYS, classes("Phi3")) | {
        "rope_parameters": write_rope(spec.rope),
        "sliding_window": window_of(spec),
    }
    if spec.rope.rope_type == "longrope":
        original = spec.rope.original_max_position_embeddings
        config["original_max_position_embeddings"] = original
    return config


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a Phi-3 checkpoint."""
    return table(spec, NAMES)
