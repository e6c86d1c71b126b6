"""What an encoder with a classification head is: its sizes, flags and policies.

The counterpart of `spec.DecoderSpec`, frozen and hashable too. Families (`models/families/`) make
one from a `config.json`; nothing else decides a shape.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jrlhf.errors import ModelError, UnsupportedModelError, suggest
from jrlhf.models.spec import (
    DTYPES,
    REMAT_POLICIES,
    SIZES,
    DecoderSpec,
    RopeSpec,
    check_sizes,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "tanh")
POOLINGS = ("first", "mean")
POSITION_TERMS = ("c2p", "p2c")


def _known(field: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UnsupportedModelError(
            f"{field}={value!r} is not implemented; known: {', '.join(names)}."
            + suggest(str(value), names)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeSpec:
    """Relative positions of disentangled attention (DeBERTa).

    Attributes:
        attention: the scores use them; off: no table of positions, and only what a checkpoint holds
            all the same is kept.
        terms: which products with a position are added to content-to-content: "c2p", "p2c".
        buckets: distances on each side that have vectors of their own, farther ones sharing them
            logarithmically; 0: every distance has one.
        max_distance: distances beyond it are taken for it.
        share_keys: positions go through the projections of the content.
        norm: LayerNorm on the position vectors; its weights are there without these too.
    """

    attention: bool = True
    terms: tuple[str, ...] = ()
    buckets: int = 0
    max_distance: int = 512
    share_keys: bool = False
    norm: bool = False

    def __post_init__(self) -> None:
        if not self.attention:  # what nobody reads is right as it is
            return
        for term in self.terms:
            _known("pos_att_type", term, POSITION_TERMS)
        if self.buckets and not 2 <= self.buckets < 2 * (self.max_distance - 1):
            raise UnsupportedModelError(
                f"position_buckets={self.buckets} must be at least 2, and half of it less than "
                f"max_relative_positions - 1 = {self.max_distance - 1}."
            )

    @property
    def span(self) -> int:
        """Position vectors on each side: the table has twice as many rows."""
        return self.buckets or self.max_distance


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """A bidirectional transformer, a pooled token (or mean), a dense layer and a classifier.

    Attributes:
        model_type: the Hugging Face family that names its weights and writes its config.
        embedding_size: of the embedding table; other than hidden_size: a projection follows.
        max_position_embeddings: the longest text in tokens.
        learned_positions: adds a vector per absolute position to the embedding.
        position_offset: row of the position table that the first token takes.
        type_vocab_size: rows of the token type table, 0: no table.
        norm_bias: LayerNorms have a bias.
        pre_norm: norms stand before attention and MLP (not before the first attention, whose input
            is the normed embedding) and once at the end; else behind each residual sum.
        attention_bias: of q, k, v and o.
        mlp_bias: of the MLP.
        gated_mlp: down(act(gate) * up), both projections in one weight.
        score_terms: the scores are divided by sqrt(head_dim * score_terms).
        rope: rotary positions of full attention; None: no rotation at all.
        local_rope: rotary positions of local attention.
        local: per layer, whether its attention is local; () for none.
        window: farthest token, on either side, that local attention reads.
        relative: disentangled attention; None: the family has none.
        conv_kernel_size: width of the convolution beside the first layer, 0: none.
        pooling: "first" token or "mean" of all real ones.
        pooler_act: activation of the dense layer between pooled state and classifier.
        pooler_bias: of that layer.
        pooler_norm: a LayerNorm behind it.
        score_bias: of the classifier itself.
        head: always "classifier".
        trunk_layers: so many lower layers are frozen, and all that lies under them.
        vocab_padding, dtype, remat: as in DecoderSpec.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    embedding_size: int
    max_position_embeddings: int = 512
    learned_positions: bool = True
    position_offset: int = 0
    type_vocab_size: int = 0
    norm_eps: float = 1e-12
    norm_bias: bool = True
    pre_norm: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    gated_mlp: bool = False
    hidden_act: str = "gelu"
    score_terms: int = 1
    rope: RopeSpec | None = None
    local_rope: RopeSpec | None = None
    local: tuple[bool, ...] = ()
    window: int = 0
    relative: RelativeSpec | None = None
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    pooling: Literal["first", "mean"] = "first"
    pooler_act: str = "tanh"
    pooler_bias: bool = True
    pooler_norm: bool = False
    score_bias: bool = True
    initializer_range: float = 0.02
    head: str = "classifier"
    num_labels: int = 1
    value_head: bool = False
    vocab_padding: int = 0
    trunk_layers: int = 0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        check_sizes(self, (*SIZES, "embedding_size", "num_labels"))
        if self.head != "classifier" or self.value_head:
            wanted = "value head" if self.value_head else f"{self.head} head"
            raise ModelError(
                f"{self.model_type} is an encoder: it reads a text from both sides and has no "
                f"{wanted}. Load it with AutoModelForSequenceClassification, or take a decoder."
            )
        for field in ("hidden_act", "pooler_act", "conv_act"):
            _known(field, getattr(self, field), ACTIVATIONS)
        _known("classifier_pooling", self.pooling, POOLINGS)
        _known("dtype", self.dtype, DTYPES)
        _known("remat", self.remat, REMAT_POLICIES)
        for rope in filter(None, (self.rope, self.local_rope)):
            rope.check_pairs(self.head_dim)
        if self.local and len(self.local) != self.num_hidden_layers:
            raise UnsupportedModelError(
                f"layer_types names {len(self.local)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}."
            )
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
    def vocab_rows(self) -> int:
        """Rows of the embedding table, padding included."""
        return self.vocab_size + self.vocab_padding

    @property
    def position_rows(self) -> int:
        """Rows of the table of absolute positions."""
        return self.max_position_embeddings + self.position_offset

    def replace(self, **changes: object) -> EncoderSpec:
        """Returns a copy with the named fields changed and checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


AnySpec = DecoderSpec | EncoderSpec
