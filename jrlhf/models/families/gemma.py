"""Gemma 1: scaled embeddings, norms that store their scale less one, a gated MLP of gelu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.families.keys import (
    activation,
    classes,
    read_keys,
    refuse,
    with_defaults,
    write_keys,
)
from jrlhf.models.families.llama import COMMON
from jrlhf.models.families.rope_config import read_rope, write_rope
from jrlhf.models.spec import DecoderSpec

KEYS = with_defaults(
    COMMON,
    vocab_size=256000,
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
    max_position_embeddings=8192,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
) | {"attention_bias": ("attention_bias", False)}


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with GemmaConfig's defaults.

    Raises:
        UnsupportedModelError: `hidden_activation` says another function than `hidden_act`.
    """
    # Its first release said "gelu" and meant the approximation; a later key put that right, and
    # transformers 5 reads the first again.
    acts = [config.get(key) for key in ("hidden_act", "hidden_activation")]
    act, later = ("gelu_pytorch_tanh" if name == "gelu" else name for name in acts)
    if act and later and activation("hidden_act", act) != activation("hidden_activation", later):
        raise UnsupportedModelError(
            f"hidden_act={acts[0]!r} and hidden_activation={acts[1]!r} disagree: leave one out."
        )
    fields = read_keys({**config, "hidden_act": act or later}, KEYS)
    return DecoderSpec(
        model_type="gemma", rope=read_rope(config), **fields, **common(config, fields)
    )


def common(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What all Gemmas share.

    Raises:
        UnsupportedModelError: attention in both directions (EmbeddingGemma).
    """
    refuse(config, "use_bidirectional_attention", (None, False), "decoders read backwards only")
    return {"norm_plus_one": True, "embedding_scale": fields["hidden_size"] ** 0.5}


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    return write_keys(spec, KEYS, classes("Gemma")) | {"rope_parameters": write_rope(spec.rope)}
