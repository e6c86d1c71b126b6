"""OLMo 2: Llama with norms after attention and MLP, and over all of the queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.models.families.keys import classes, read_keys, with_defaults, write_keys
from jrlhf.models.families.llama import COMMON
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.families.table import LLAMA_MODULES, Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(COMMON, vocab_size=50304, norm_eps=1e-5) | {
    "attention_bias": ("attention_bias", False)
}
NAMES = Names(
    modules=LLAMA_MODULES
    | {
        "attn_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
)


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with Olmo2Config's defaults."""
    return DecoderSpec(
        model_type="olmo2",
        rope=read_rope(config),
        block="post",
        qk_norm="full",
        **read_keys(config, KEYS),
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("Olmo2")) | {"rope_parameters": write_rope(spec.rope)}


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of an OLMo 2 checkpoint."""
    return table(spec, NAMES)
