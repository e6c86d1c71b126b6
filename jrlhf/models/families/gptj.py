"""GPT-J: attention and MLP side by side on one norm, neighbours turned, a bias on the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.families import gpt2
from jrlhf.models.families.keys import classes, with_defaults, write_keys
from jrlhf.models.families.table import Names, table
from jrlhf.models.families.weights import Weight
from jrlhf.models.spec import DecoderSpec, RopeSpec

KEYS = with_defaults(
    {k: v for k, v in gpt2.KEYS.items() if k != "attention_scale_by_layer"},
    vocab_size=50400,
    hidden_size=4096,
    num_hidden_layers=28,
    num_attention_heads=16,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
NAMES = Names(
    embed="transformer.wte",
    norm="transformer.ln_f",
    layer="transformer.h.{layer}.",
    modules={
        "attn_norm": "ln_1",
        "attn.q": "attn.q_proj",
        "attn.k": "attn.k_proj",
        "attn.v": "attn.v_proj",
        "attn.o": "attn.out_proj",
        "mlp.up": "mlp.fc_in",
        "mlp.down": "mlp.fc_out",
    },
)
IGNORED = gpt2.IGNORED


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json -> spec, with GPTJConfig's defaults.

    Raises:
        UnsupportedModelError: `rotary_dim` is null, odd, or wider than a head.
    """
    fields = gpt2.read_inner(config, KEYS)
    turned = config.get("rotary_dim", 64)
    if not turned or turned % 2 or turned > fields["head_dim"]:
        raise UnsupportedModelError(
            f"rotary_dim={turned} must be an even number up to a head's {fields['head_dim']}."
        )
    return DecoderSpec(
        model_type="gptj",
        rope=RopeSpec(partial_rotary_factor=turned / fields["head_dim"]),
        rope_interleaved=True,
        norm="layer",
        mlp="plain",
        mlp_bias=True,
        block="shared",
        head_bias=True,
        **fields,
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of config.json that the spec decides."""
    turned = spec.rope.turned(spec.head_dim)
    return write_keys(spec, KEYS, classes("GPTJ")) | {"rotary_dim": turned}


def weights(spec: DecoderSpec) -> tuple[Weight, ...]:
    """Every tensor of a GPT-J checkpoint."""
    return table(spec, NAMES)
