"""The encoder as an NNX module: BERT's shape and its descendants', by flags of the spec.

As in the decoder, layers are stacked and scanned, and the residual stream, norms and softmax are
float32 also under bfloat16 compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jrlhf.models.axes import Axes, constrain
from jrlhf.models.deberta import position_scores, table_rows
from jrlhf.models.decoder import REMAT
from jrlhf.models.encoder_attention import Reach, attend_both_ways
from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.heads import Readout
from jrlhf.models.layers import Keys, Linear, Shape, add_bias, constant, normal, rms_norm
from jrlhf.models.rope import Rotation, document_lengths, rotate, rotation

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


class Shared(NamedTuple):
    """What every layer of one forward shares, made once outside the scan.

    Attributes:
        segments: document of each token, 0 for padding.
        rotation: RoPE of full attention, None without.
        local_rotation: RoPE of local attention, None without.
        distances: position vectors of every distance [2s-1 d] (DeBERTa), None without.
        convolved: what the convolution adds to the first layer's output, None without.
    """

    segments: Int[Array, "b s"]
    rotation: Rotation | None = None
    local_rotation: Rotation | None = None
    distances: Float[Array, "t d"] | None = None
    convolved: Float[Array, "b s d"] | None = None


class LayerNorm(nnx.Module):
    """LayerNorm over `size` channels in float32, with or without a bias."""

    def __init__(self, spec: EncoderSpec, *, bias: bool = True, lead: Shape = ()) -> None:
        self.eps, self.has_bias = spec.norm_eps, bias
        self.scale = constant(1.0, (spec.hidden_size,), lead=lead, axes=(None,))
        if bias:
            self.bias = constant(0.0, (spec.hidden_size,), lead=lead, axes=(None,))

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = rms_norm(x, self.scale[...], self.eps, "float32")
        return add_bias(y, self.bias[...]) if self.has_bias else y


def _linear(
    spec: EncoderSpec,
    keys: Keys,
    inputs: Shape,
    outputs: Shape,
    axes: Axes,
    *,
    bias: bool,
    lead: Shape = (),
) -> Linear:
    scale = spec.initializer_range
    return Linear(
        keys, inputs, outputs, axes=axes, bias=bias, scale=scale, dtype=spec.dtype, lead=lead
    )


class Attention(nnx.Module):
    """Projections and attention both ways; with rotary, disentangled or no relative positions."""

    def __init__(self, spec: EncoderSpec, keys: Keys, *, lead: Shape = ()) -> None:
        d, h, e = spec.hidden_size, spec.num_attention_heads, spec.head_dim
        linear = functools.partial(_linear, spec, keys, lead=lead)
        into = functools.partial(linear, (d,), (h, e), ("embed", "heads", None))
        self.spec = spec
        bias = spec.attention_bias
        if spec.rope is not None:  # ModernBERT keeps the three in one weight
            self.qkv = linear((d,), (3, h, e), ("embed", None, "heads", None), bias=bias)
        else:
            self.q, self.k, self.v = into(bias=bias), into(bias=bias), into(bias=bias)
        relative = spec.relative
        if relative is not None and relative.attention and not relative.share_keys:
            if "c2p" in relative.terms:
                self.position_k = into(bias=True)
            if "p2c" in relative.terms:
                self.position_q = into(bias=True)
        self.o = linear((h, e), (d,), ("heads", None, "embed"), bias=bias)

    def __call__(
        self, x: Float[Array, "b s d"], shared: Shared, local: Array | bool
    ) -> Float[Array, "b s d"]:
        spec = self.spec
        q, k, v = self._project(x)
        if shared.rotation is not None:
            turn = _chosen(local, shared.rotation, shared.local_rotation)
            q, k = rotate(q, turn), rotate(k, turn)
        q = checkpoint_name(q * self._scale, "qkv")
        k, v = checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv")
        bias = None
        if spec.relative is not None and shared.distances is not None:
            keys, queries = self._positions(shared.distances)
            bias = position_scores(q, k, keys, queries, dtype=spec.dtype)
        reach = Reach(shared.segments, spec.window, local)
        out = attend_both_ways(q, k, v, reach, dtype=spec.dtype, bias=bias)
        return self.o(checkpoint_name(out, "attention"))

    @property
    def _scale(self) -> float:
        return (self.spec.head_dim * self.spec.score_terms) ** -0.5

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        axes: Axes = ("batch", "sequence", "heads", None)
        if self.spec.rope is None:
            return (
                constrain(self.q(x), axes),
                constrain(self.k(x), axes),
                constrain(self.v(x), axes),
            )
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        return constrain(q, axes), constrain(k, axes), constrain(v, axes)

    def _positions(self, distances: Array) -> tuple[Array | None, Array | None]:
        """Keys and (scaled) queries of every distance, None for a term that is off."""
        relative = self.spec.relative
        assert relative is not None
        keys = queries = None
        if "c2p" in relative.terms:
            keys = (self.k if relative.share_keys else self.position_k)(distances)
        if "p2c" in relative.terms:
            queries = (self.q if relative.share_keys else self.position_q)(distances) * self._scale
        return keys, queries


def _chosen(local: Array | bool, full: Rotation, near: Rotation | None) -> Rotation:
    if near is None:
        return full
    return jax.tree.map(lambda a, b: jnp.where(local, a, b), near, full)


class Mlp(nnx.Module):
    """down(act(up(x))), or down(act(gate) * up) with both in one weight [d 2 f]."""

    def __init__(self, spec: EncoderSpec, keys: Keys, *, lead: Shape = ()) -> None:
        d, f, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        self.act, self.gated = spec.hidden_act, spec.gated_mlp
        linear = functools.partial(_linear, spec, keys, bias=bias, lead=lead)
        if self.gated:
            self.up = linear((d,), (2, f), ("embed", None, "mlp"))
        else:
            self.up = linear((d,), (f,), ("embed", "mlp"))
        self.down = linear((f,), (d,), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        axes: Axes = ("batch", "sequence", "mlp")
        y = self.up(x)
        if self.gated:
            gate, up = constrain(y[:, :, 0], axes), constrain(y[:, :, 1], axes)
            return self.down(ACTIVATIONS[self.act](gate) * up)
        return self.down(ACTIVATIONS[self.act](constrain(y, axes)))


class Layer(nnx.Module):
    """One block; the norms stand before its halves or behind their sums."""

    def __init__(self, spec: EncoderSpec, keys: Keys, *, lead: Shape = ()) -> None:
        self.spec = spec
        self.attn = Attention(spec, keys, lead=lead)
        self.attn_norm = LayerNorm(spec, bias=spec.norm_bias, lead=lead)
        self.mlp = Mlp(spec, keys, lead=lead)
        self.mlp_norm = LayerNorm(spec, bias=spec.norm_bias, lead=lead)

    def __call__(
        self, x: Float[Array, "b s d"], shared: Shared, index: Int[Array, ""]
    ) -> Float[Array, "b s d"]:
        spec = self.spec
        local = jnp.asarray(spec.local)[index] if any(spec.local) else False
        if spec.pre_norm:
            # The embedding comes normed: the first attention has no norm (nor a weight for one).
            normed = jnp.where(index == 0, x, self.attn_norm(x))
            x = x + self.attn(normed, shared, local)
            x = x + self.mlp(self.mlp_norm(x))
        else:
            x = self.attn_norm(x + self.attn(x, shared, local))
            x = self.mlp_norm(x + self.mlp(x))
        return constrain(x, ("batch", "sequence", None))


class Convolution(nnx.Module):
    """DeBERTa-v2's convolution over the embedding, added to the first layer's output."""

    def __init__(self, spec: EncoderSpec, keys: Keys) -> None:
        d, width = spec.hidden_size, spec.conv_kernel_size
        self.width, self.act = width, spec.conv_act
        self.taps = _linear(spec, keys, (width, d), (d,), (None, "embed", None), bias=True)
        self.norm = LayerNorm(spec)

    def __call__(self, x: Array, real: Array) -> Float[Array, "b s d"]:
        side, length = self.width // 2, x.shape[1]
        padded = jnp.pad(x * real, ((0, 0), (side, side), (0, 0)))
        near = [padded[:, i : i + length] for i in range(self.width)]
        return ACTIVATIONS[self.act](self.taps(jnp.stack(near, axis=2)) * real)


class Embedding(nnx.Module):
    """All that lies under the layers or is shared by them: tables, norms, a convolution."""

    def __init__(self, spec: EncoderSpec, keys: Keys) -> None:
        self.spec = spec
        width = spec.embedding_size

        def table(rows: int, columns: int, name: str | None = None) -> nnx.Param:
            axes = (name, "embed")
            scale = spec.initializer_range
            return normal(keys, (rows, columns), lead=(), axes=axes, scale=scale)

        self.table = table(spec.vocab_rows, width, "vocab")
        if spec.learned_positions:
            self.positions = table(spec.position_rows, width)
        if spec.type_vocab_size:
            self.types = table(spec.type_vocab_size, width)
        if width != spec.hidden_size:
            self.proj = _linear(
                spec, keys, (width,), (spec.hidden_size,), (None, "embed"), bias=False
            )
        self.norm = LayerNorm(spec, bias=spec.norm_bias)
        if spec.relative is not None and spec.relative.attention:
            self.relative = table(2 * spec.relative.span, spec.hidden_size)
        if spec.relative is not None and spec.relative.norm:
            self.relative_norm = LayerNorm(spec)
        if spec.conv_kernel_size:
            self.conv = Convolution(spec, keys)

    def __call__(
        self, ids: Int[Array, "b s"], positions: Int[Array, "b s"], types: Int[Array, "b s"] | None
    ) -> Float[Array, "b s d"]:
        spec = self.spec
        x = self.table[...][ids].astype(jnp.float32)
        if spec.learned_positions:
            # Padding may run past the table; a real token never does.
            rows = jnp.minimum(positions, spec.max_position_embeddings - 1) + spec.position_offset
            x = x + self.positions[...][rows]
        if spec.type_vocab_size:
            x = x + self.types[...][jnp.zeros_like(ids) if types is None else types]
        if spec.embedding_size != spec.hidden_size:
            x = self.proj(x)
        return constrain(self.norm(x), ("batch", "sequence", None))

    def distances(self, length: int) -> Float[Array, "t d"] | None:
        """The vector of every distance in a text of so many tokens."""
        relative = self.spec.relative
        if relative is None or not (relative.attention and relative.terms):
            return None
        table = self.relative[...].astype(jnp.float32)
        table = self.relative_norm(table) if relative.norm else table
        return table[table_rows(relative, length)]


class Pooler(nnx.Module):
    """The dense layer between the pooled state and the classifier, float32."""

    def __init__(self, spec: EncoderSpec, keys: Keys) -> None:
        d = spec.hidden_size
        self.act, self.has_norm = spec.pooler_act, spec.pooler_norm
        self.dense = Readout(
            keys, embed=d, outputs=d, bias=spec.pooler_bias, scale=spec.initializer_range
        )
        if self.has_norm:
            self.norm = LayerNorm(spec, bias=spec.norm_bias)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        x = ACTIVATIONS[self.act](self.dense(x))
        return self.norm(x) if self.has_norm else x


class Encoder(nnx.Module):
    """Embedding, layers, pooler and classifier.

    Args:
        spec: what to build.
        key: typed PRNG key of the initial weights.
    """

    def __init__(self, spec: EncoderSpec, key: Array) -> None:
        keys = Keys(key)
        self.spec = spec
        self.embed = Embedding(spec, keys)
        if spec.trunk_layers:
            self.trunk = Layer(spec, keys, lead=(spec.trunk_layers,))
        if spec.trainable_layers:
            self.layers = Layer(spec, keys, lead=(spec.trainable_layers,))
        if spec.pre_norm:
            self.norm = LayerNorm(spec, bias=spec.norm_bias)
        self.pooler = Pooler(spec, keys)
        self.score = Readout(
            keys, embed=spec.hidden_size, outputs=spec.num_labels, bias=spec.score_bias,
            scale=spec.initializer_range,
        )  # fmt: skip

    def hidden(
        self,
        ids: Int[Array, "b s"],
        *,
        segments: Int[Array, "b s"],
        positions: Int[Array, "b s"],
        types: Int[Array, "b s"] | None,
    ) -> Float[Array, "b s d"]:
        """Hidden states of every token, float32."""
        spec = self.spec
        x = self.embed(ids, positions, types)
        lengths = None
        if any(rope is not None and rope.by_length for rope in (spec.rope, spec.local_rope)):
            lengths = document_lengths(positions, segments)
        turn = functools.partial(rotation, positions, head_dim=spec.head_dim, lengths=lengths)
        shared = Shared(
            segments,
            None if spec.rope is None else turn(rope=spec.rope),
            None if spec.local_rope is None else turn(rope=spec.local_rope),
            self.embed.distances(ids.shape[1]),
        )
        if spec.conv_kernel_size:
            real = (segments > 0).astype(jnp.float32)[..., None]
            shared = shared._replace(convolved=self.embed.conv(x, real))
        x = self._run(x, shared)
        return self.norm(x) if spec.pre_norm else x

    def pooled_score(
        self, hidden: Float[Array, "b s d"], lengths: Int[Array, " b"]
    ) -> Float[Array, "b n"]:
        """The classifier on the first token, or on the mean of each row's real ones."""
        state = hidden[:, 0].astype(jnp.float32)
        if self.spec.pooling == "mean":
            real = jnp.arange(hidden.shape[1])[None] < lengths[:, None]
            total = jnp.sum(jnp.where(real[..., None], hidden.astype(jnp.float32), 0.0), axis=1)
            state = total / jnp.maximum(lengths, 1)[:, None]
        return self.score(self.pooler(state))

    def _run(self, x: Array, shared: Shared) -> Array:
        spec, norm = self.spec, self.embed.conv.norm if self.spec.conv_kernel_size else None

        def body(x: Array, each: tuple[Layer, Array]) -> tuple[Array, None]:
            layer, index = each
            x = layer(x, shared, index)
            if shared.convolved is not None and norm is not None:
                x = jnp.where(index == 0, norm(x + shared.convolved), x)
            return x, None

        step = body if spec.remat == "none" else jax.checkpoint(body, policy=REMAT[spec.remat])
        if spec.trunk_layers:
            # No gradient passes below the trunk's top, so there is nothing to recompute there.
            x, _ = lax.scan(body, x, (self.trunk, jnp.arange(spec.trunk_layers)))
            x = lax.stop_gradient(x)
        if spec.trainable_layers:
            rest = jnp.arange(spec.trunk_layers, spec.num_hidden_layers)
            x, _ = lax.scan(step, x, (self.layers, rest))
        return x
