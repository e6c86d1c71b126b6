"""What a decoder is: every size, flag and policy that decides its arrays and its maths.

A spec is frozen and hashable, so that it can be a static argument of a jitted function and the key
of a cache. Families (`models/families/`) make one from a `config.json`; nothing else decides a
shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from jrlhf.errors import UnsupportedModelError, suggest

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
NORMS = ("rms", "layer")
BLOCKS = ("pre", "post", "sandwich", "after", "parallel", "shared")
QK_NORMS = ("none", "head", "full", "heads")
MLPS = ("gated", "plain")
POSITIONS = ("rotary", "learned")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES = ("float32", "bfloat16")
HEADS = ("causal", "classifier", "tokens")
REMAT_POLICIES = ("none", "full", "dots", "attention")
ATTENTIONS = ("auto", "xla", "cudnn", "splash", "splash_interpret")


# Of decoders and encoders; at least 1 each.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "head_dim", "max_position_embeddings")  # fmt: skip


def check_sizes(spec: object, fields: Sequence[str]) -> None:
    """Refuses models of nothing.

    Raises:
        UnsupportedModelError: a field is below 1, or no whole number.
    """
    for field in fields:
        size = getattr(spec, field)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UnsupportedModelError(f"{field}={size!r} must be at least 1, a whole number.")


def _known(field: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UnsupportedModelError(
            f"{field}={value!r} is not implemented; known: {', '.join(names)}."
            + suggest(str(value), names)
        )


_POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
             "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: `rope_parameters` of transformers 5, one field per key.

    Attributes:
        factor: acts in types linear, dynamic, yarn and llama3, and in longrope's attention factor.
        low_freq_factor, high_freq_factor: type llama3.
        original_max_position_embeddings: types dynamic, yarn, longrope and llama3.
        partial_rotary_factor: share of a head's channels, from the first on, that are turned.
        attention_factor: types yarn and longrope: scales cos and sin; None derives it.
        beta_fast, beta_slow, mscale, mscale_all_dim, truncate: type yarn.
        short_factor, long_factor: type longrope, one number per pair of channels.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    partial_rotary_factor: float = 1.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _known("rope_type", self.rope_type, ROPE_TYPES)
        if not 0 < self.partial_rotary_factor <= 1:
            raise UnsupportedModelError(
                f"partial_rotary_factor={self.partial_rotary_factor} must lie in (0, 1]."
            )
        positive = {name: getattr(self, name) for name in _POSITIVE}
        positive |= {"short_factor": min(self.short_factor, default=1.0)}
        positive |= {"long_factor": min(self.long_factor, default=1.0)}
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise UnsupportedModelError(f"rope_parameters: {name}={value} must be above 0.")

    def check_pairs(self, head_dim: int) -> None:
        """Refuses a longrope without a factor for every pair of channels of a head."""
        pairs = self.turned(head_dim) // 2
        for name in ("short_factor", "long_factor"):
            count = len(getattr(self, name))
            if self.rope_type == "longrope" and count != pairs:
                raise UnsupportedModelError(
                    f"rope_parameters: {name} has {count} entries, expected {pairs}: one for each"
                    f" pair of turned channels (head_dim={head_dim})."
                )

    def turned(self, head_dim: int) -> int:
        """Channels of a head that the frequencies are spread over (odd: one more is turned)."""
        # GPT-J gives a count of channels; the quotient must give it back.
        return int(head_dim * self.partial_rotary_factor + 1e-6)

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long the document is."""
        return self.rope_type in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """Routed experts in place of the MLP.

    Attributes:
        num_experts: experts of a layer, each a gated MLP of `intermediate_size` channels.
        dense_layers: numbers of the layers that have one MLP of `dense_size` channels instead.
        experts_per_token: how many of them a token visits.
        normalize: divides the chosen experts' weights by their sum.
        router_bias: a bias on the router's logits.
        expert_bias: biases on the experts' three maps.
        clamp: gpt-oss's gate: clamp(gate) * sigmoid(alpha * clamp(gate)) * (clamp(up) + 1) with
            clamps at this value; None is the gated MLP of `hidden_act`.
        alpha: acts with `clamp`.
        router_aux_loss_coef: weight of the load-balancing loss in training.
    """

    num_experts: int
    experts_per_token: int
    normalize: bool = True
    router_bias: bool = False
    expert_bias: bool = False
    clamp: float | None = None
    alpha: float = 1.702
    router_aux_loss_coef: float = 0.001
    dense_layers: tuple[int, ...] = ()
    dense_size: int = 0

    def __post_init__(self) -> None:
        if self.dense_layers and self.dense_size < 1:
            raise UnsupportedModelError(f"intermediate_size={self.dense_size} must be at least 1.")
        if self.num_experts < 1:
            raise UnsupportedModelError(f"num_experts={self.num_experts} must be at least 1.")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UnsupportedModelError(
                f"num_experts_per_tok={self.experts_per_token} must lie between 1 and "
                f"num_experts={self.num_experts}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer and the head on it.

    Attributes:
        model_type: the Hugging Face family that names its weights and writes its config.
        norm: "rms" (a scale) or "layer" (LayerNorm: a scale and, with `norm_bias`, a bias).
        norm_scale: False: norms have no parameters at all.
        norm_plus_one: the stored scale is one less than what multiplies (Gemma).
        block: where the norms stand. "pre": x + f(norm x); "post": x + norm f(x); "sandwich": both;
            "after": norm(x + f(x)); "parallel": x + attn(norm x) + mlp(norm' x); "shared": the same
            with one norm.
        final_norm: whether there is a norm after the last layer.
        embedding_size: width of token embeddings and of what the heads read, where linear maps lead
            from it to `hidden_size` and back; 0: `hidden_size`, without maps.
        rope: the rotation; acts where `positions` is "rotary".
        local_rope: a second one, for the layers that `layer_ropes` marks with 1.
        layer_ropes: per layer 0 (`rope`), 1 (`local_rope`) or -1 (none); () is all 0.
        rope_interleaved: turns channel pairs (2i, 2i+1) instead of (i, i + half).
        positions: "rotary", or "learned" vectors for position + `position_offset`.
        windows: per layer how many tokens back attention reads, its own included; 0 is no window,
            () is none anywhere.
        attention_bias: biases on q, k and v, and on o unless `output_bias` says otherwise.
        attention_scale: factor on q·k; None is 1/sqrt(head_dim).
        attention_scale_by_layer: also divides it by the layer's number, from 1 on.
        attention_softcap: c in c·tanh(scores / c), or None.
        attention_sinks: a learned score per head that takes weight and gives no value.
        qk_norm: of queries and keys: "none", "head" (one scale for all heads), "heads" (a scale
            per head) or "full" (over all heads together).
        mlp: "gated", or "plain" (no gate). `moe` replaces it by routed experts.
        embedding_scale, residual_scale, logit_scale: factors on embeddings, on what a layer adds
            to the residual stream, and on logits.
        final_softcap: c in c·tanh(logits / c), or None; whoever makes logits applies it.
        head_bias: a bias on the logits.
        head: "causal" (next-token logits), "classifier" (`num_labels` scores of the last token) or
            "tokens" (`num_labels` scores of every token).
        value_head: adds a linear map d -> 1 with bias on the final hidden state.
        vocab_padding: rows of the embedding (and columns of the head) beyond `vocab_size`, so that
            the vocabulary divides over a mesh. They are no tokens: their logits are -inf, and saved
            checkpoints do not have them.
        trunk_layers: so many lower layers are frozen: they and the embedding (with a tied head) lie
            outside the trainable subtree, and no gradient is computed through them.
        dtype: type of the operands of every dot. Parameters are kept in their own type (float32
            masters when training); dot results, norms, softmax and the residual stream are float32.
        remat: what the backward pass recomputes: "none" keeps everything, "full" only the layer
            inputs, "dots" also the results of weight matmuls, "attention" also q, k, v and the
            attention output.
        attention: the kernel, one of `ATTENTIONS`; see `models/attend.py`.
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
    norm_scale: bool = True
    norm_bias: bool = True
    norm_plus_one: bool = False
    block: str = "pre"
    final_norm: bool = True
    embedding_size: int = 0
    rope: RopeSpec = RopeSpec()
    local_rope: RopeSpec | None = None
    layer_ropes: tuple[int, ...] = ()
    rope_interleaved: bool = False
    positions: Literal["rotary", "learned"] = "rotary"
    position_offset: int = 0
    windows: tuple[int, ...] = ()
    attention_bias: bool = False
    output_bias: bool | None = None
    attention_scale: float | None = None
    attention_scale_by_layer: bool = False
    attention_softcap: float | None = None
    attention_sinks: bool = False
    qk_norm: str = "none"
    mlp: Literal["gated", "plain"] = "gated"
    mlp_bias: bool = False
    moe: MoeSpec | None = None
    hidden_act: str = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    final_softcap: float | None = None
    head_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    head: Literal["causal", "classifier", "tokens"] = "causal"
    num_labels: int = 1
    value_head: bool = False
    vocab_padding: int = 0
    trunk_layers: int = 0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self) -> None:
        check_sizes(self, (*SIZES, "num_key_value_heads", "num_labels"))
        _known("norm", self.norm, NORMS)
        _known("block", self.block, BLOCKS)
        _known("positions", self.positions, POSITIONS)
        _known("qk_norm", self.qk_norm, QK_NORMS)
        _known("mlp", self.mlp, MLPS)
        _known("hidden_act", self.hidden_act, ACTIVATIONS)
        _known("head", self.head, HEADS)
        _known("dtype", self.dtype, DTYPES)
        _known("remat", self.remat, REMAT_POLICIES)
        _known("attn_implementation", self.attention, ATTENTIONS)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModelError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        for rope in filter(None, (self.rope, self.local_rope)):
            rope.check_pairs(self.head_dim)
        turned = self.rope.turned(self.head_dim)
        if self.positions == "rotary" and self.head_dim % 2 and turned == self.head_dim:
            raise UnsupportedModelError(f"head_dim={self.head_dim} is odd; rotary needs pairs.")
        if self.embedding_size < 0:
            raise UnsupportedModelError(f"embedding_size={self.embedding_size} is below 0.")
        dense = self.moe.dense_layers if self.moe else ()
        if not set(dense) < set(range(self.num_hidden_layers)):
            raise UnsupportedModelError(
                f"layers {sorted(dense)} of {self.num_hidden_layers} have a plain MLP: they must be"
                " layers of the model, and one at least must have experts."
            )
        for field in ("windows", "layer_ropes"):
            count = len(getattr(self, field))
            if count not in (0, self.num_hidden_layers):
                raise UnsupportedModelError(
                    f"{field} has {count} entries for num_hidden_layers={self.num_hidden_layers}."
                )
        if not 0 <= self.trunk_layers <= self.num_hidden_layers:
            raise UnsupportedModelError(
                f"trunk_layers={self.trunk_layers} must lie between 0 and "
                f"num_hidden_layers={self.num_hidden_layers}."
            )

    @property
    def context(self) -> int | None:
        """Tokens of the longest text; None: the rotation grows with the text (type dynamic)."""
        dynamic = self.positions == "rotary" and self.rope.rope_type == "dynamic"
        return None if dynamic else self.max_position_embeddings

    @property
    def trainable_layers(self) -> int:
        """Layers above the frozen trunk."""
        return self.num_hidden_layers - self.trunk_layers

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table, padding included."""
        return self.vocab_size + self.vocab_padding

    @property
    def head_size(self) -> int:
        """Channels of a token's embedding, and of what the heads read."""
        return self.embedding_size or self.hidden_size

    @property
    def o_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.attention_bias if self.output_bias is None else self.output_bias

    @property
    def groups(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def replace(self, **changes: object) -> DecoderSpec:
        """Returns a copy with the named fields changed and checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
