"""What a decoder is: every size, flag and policy that decides its arrays and its maths.

A spec is frozen and hashable, so that it can be a static argument of a jitted function and the key
of a cache. Families (`models/families/`) make one from a `config.json`; nothing else decides a
shape.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jrlhf.errors import UnsupportedModelError, suggest

ROPE_TYPES = ("default", "linear", "llama3")
NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES = ("float32", "bfloat16")
HEADS = ("causal", "classifier")
REMAT_POLICIES = ("none", "full", "dots", "attention")


def _known(field: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UnsupportedModelError(
            f"{field}={value!r} is not implemented; known: {', '.join(names)}."
            + suggest(str(value), names)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: `rope_parameters` of transformers 5, one field per key.

    `factor` acts in types linear and llama3, the last three fields in type llama3 only.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        _known("rope_type", self.rope_type, ROPE_TYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer and the head on it.

    Attributes:
        model_type: the Hugging Face family that names its weights and writes its config.
        norm: "rms" (a scale) or "layer" (LayerNorm: a scale and a bias).
        attention_bias: biases on q, k, v and o, as in Llama.
        head: "causal" (next-token logits) or "classifier" (`num_labels` scores of the last token).
        value_head: adds a linear map d -> 1 with bias on the final hidden state.
        trunk_layers: so many lower layers are frozen: they and the embedding (with a tied head) lie
            outside the trainable subtree, and no gradient is computed through them.
        dtype: type of the operands of every dot. Parameters are kept in their own type (float32
            masters when training); dot results, norms, softmax and the residual stream are float32.
        remat: what the backward pass recomputes: "none" keeps everything, "full" only the layer
            inputs, "dots" also the results of weight matmuls, "attention" also q, k, v and the
            attention output.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    rope: RopeSpec = RopeSpec()
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    head: Literal["causal", "classifier"] = "causal"
    num_labels: int = 1
    value_head: bool = False
    trunk_layers: int = 0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        _known("norm", self.norm, NORMS)
        _known("hidden_act", self.hidden_act, ACTIVATIONS)
        _known("head", self.head, HEADS)
        _known("dtype", self.dtype, DTYPES)
        _known("remat", self.remat, REMAT_POLICIES)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModelError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim={self.head_dim} is odd; rotary needs pairs.")
        if not 0 <= self.trunk_layers <= self.num_hidden_layers:
            raise UnsupportedModelError(
                f"trunk_layers={self.trunk_layers} must lie between 0 and "
                f"num_hidden_layers={self.num_hidden_layers}."
            )

    @property
    def trainable_layers(self) -> int:
        """Layers above the frozen trunk."""
        return self.num_hidden_layers - self.trunk_layers

    @property
    def groups(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def replace(self, **changes: object) -> DecoderSpec:
        """Returns a copy with the named fields changed and checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
