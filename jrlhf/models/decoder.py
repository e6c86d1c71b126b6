"""The decoder as an NNX module: one forward definition for training, scoring, prefill and decode.

The residual stream, norms and softmax are float32 also under bfloat16 compute: a dot gives float32
anyway, so the sum costs nothing, and no rounding piles up over the layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jrlhf.models.attend import How, attend
from jrlhf.models.attention import attend_cache
from jrlhf.models.axes import Axes, constrain
from jrlhf.models.cache import Cache, LayerCache, filled
from jrlhf.models.context import UNIFORM, Context, LayerFlags, layer_flags
from jrlhf.models.heads import CausalHead, Readout
from jrlhf.models.layers import HeadNorm, Keys, Linear, Mlp, Norm, Shape, constant, normal
from jrlhf.models.moe import Moe, Routing
from jrlhf.models.rope import choose, rotate
from jrlhf.models.spec import DecoderSpec

KeyValue = tuple[Array, Array]


class Attention(nnx.Module):
    """Projections and rotary attention, on the tokens themselves or on a cache."""

    def __init__(self, spec: DecoderSpec, keys: Keys, *, lead: Shape = ()) -> None:
        d, e = spec.hidden_size, spec.head_dim
        h, k = spec.num_attention_heads, spec.num_key_value_heads

        def linear(inputs: Shape, outputs: Shape, axes: Axes, bias: bool) -> Linear:
            return Linear(
                keys,
                inputs,
                outputs,
                axes=axes,
                bias=bias,
                scale=spec.initializer_range,
                dtype=spec.dtype,
                lead=lead,
            )

        self.dtype, self.interleaved = spec.dtype, spec.rope_interleaved
        self.how = How.of(spec)
        self.q = linear((d,), (h, e), ("embed", "heads", None), spec.attention_bias)
        self.k = linear((d,), (k, e), ("embed", "kv_heads", None), spec.attention_bias)
        self.v = linear((d,), (k, e), ("embed", "kv_heads", None), spec.attention_bias)
        self.o = linear((h, e), (d,), ("heads", None, "embed"), spec.o_bias)
        self.normed, self.has_sinks = spec.qk_norm != "none", spec.attention_sinks
        if self.normed:
            self.q_norm = HeadNorm(spec, h, "heads", lead=lead)
            self.k_norm = HeadNorm(spec, k, "kv_heads", lead=lead)
        if self.has_sinks:
            self.sinks = constant(0.0, (h,), lead=lead, axes=("heads",))

    def __call__(
        self,
        x: Float[Array, "b s d"],
        context: Context,
        cache: LayerCache | None,
        flags: LayerFlags,
    ) -> tuple[Array, KeyValue | LayerCache]:
        q = constrain(self.q(x), ("batch", "sequence", "heads", None))
        k = constrain(self.k(x), ("batch", "sequence", "kv_heads", None))
        v = constrain(self.v(x), ("batch", "sequence", "kv_heads", None))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._positioned(q, k, context, flags)
        q = q if flags.scale is None else q * flags.scale
        q, k = checkpoint_name(q, "qkv"), checkpoint_name(k, "qkv")
        v = checkpoint_name(v, "qkv")
        sinks = self.sinks[...] if self.has_sinks else None
        memory: KeyValue | LayerCache = (k, v)
        if cache is None:
            out = attend(q, k, v, context.segments, flags.window, sinks, how=self.how)
        else:
            assert context.slot is not None
            assert context.valid is not None
            memory = cache = cache.write(k, v, context.slot, dtype=self.dtype)
            valid = context.valid
            if flags.window is not None:
                valid = valid & (context.behind < flags.window)
            out = attend_cache(
                q, cache.k, cache.v, valid, sinks, dtype=self.dtype, scoring=self.how.scoring
            )
        return self.o(out), memory

    def _positioned(
        self, q: Array, k: Array, context: Context, flags: LayerFlags
    ) -> tuple[Array, Array]:
        """Rotates queries and keys as this layer does."""
        r = context.rotation
        if r is None:
            return q, k
        if flags.rope is not None:
            r = choose(flags.rope, r, context.local)
        return rotate(q, r, interleaved=self.interleaved), rotate(
            k, r, interleaved=self.interleaved
        )


class Layer(nnx.Module):
    """One transformer block; `spec.block` says where its norms stand."""

    def __init__(self, spec: DecoderSpec, keys: Keys, *, lead: Shape = ()) -> None:
        self.block, self.residual_scale = spec.block, spec.residual_scale
        before = spec.block not in ("post", "after")
        after = spec.block in ("post", "sandwich", "after")
        if before:
            self.attn_norm = Norm(spec, lead=lead)
        self.attn = Attention(spec, keys, lead=lead)
        if after:
            self.attn_post_norm = Norm(spec, lead=lead, dtype="float32")
        if before and spec.block != "shared":
            self.mlp_norm = Norm(spec, lead=lead)
        kind: type[Moe | Mlp] = Mlp if spec.moe is None else Moe
        self.mlp = kind(spec, keys, lead=lead)
        if spec.moe is not None and spec.moe.dense_layers:
            # Layers are alike in a scan: each has both, and runs one.
            self.dense = Mlp(spec.replace(intermediate_size=spec.moe.dense_size), keys, lead=lead)
        if after:
            self.mlp_post_norm = Norm(spec, lead=lead, dtype="float32")

    def __call__(
        self,
        x: Float[Array, "b s d"],
        context: Context,
        cache: LayerCache | None = None,
        flags: LayerFlags = UNIFORM,
    ) -> tuple[Array, KeyValue | LayerCache, Routing | None]:
        """The residual stream after this layer, its keys and values, and where tokens went."""
        after, before = self.block in ("post", "sandwich"), self.block not in ("post", "after")
        h = self.attn_norm(x) if before else x
        mixed, memory = self.attn(h, context, cache, flags)
        mixed = self.attn_post_norm(mixed) if after else mixed
        start = x
        if self.block not in ("parallel", "shared"):
            x = x + self._scaled(mixed)
            x = start = self.attn_post_norm(x) if self.block == "after" else x
        if self.block != "shared":
            h = self.mlp_norm(x) if before else x
        y, routing = self._mlp(h, context, flags)
        y = self.mlp_post_norm(y) if after else y
        if self.block in ("parallel", "shared"):
            y = mixed + y
        x = start + self._scaled(y)
        x = self.mlp_post_norm(x) if self.block == "after" else x
        return constrain(x, ("batch", "sequence", None)), memory, routing

    def _mlp(self, h: Array, context: Context, flags: LayerFlags) -> tuple[Array, Routing | None]:
        """The experts, or one MLP, and where tokens went."""
        if not isinstance(self.mlp, Moe):
            return self.mlp(h), None
        if flags.dense is None:
            return self.mlp(h, context.real)
        experts, none = self.mlp, None if context.real is None else self.mlp.nowhere()
        return lax.cond(
            flags.dense, lambda h: (self.dense(h), none), lambda h: experts(h, context.real), h
        )

    def _scaled(self, y: Array) -> Array:
        return y if self.residual_scale == 1.0 else y * self.residual_scale


# What the backward pass may keep of a layer; "none" is no checkpoint at all.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("qkv", "attention"),
}


class Embedding(nnx.Module):
    """A table of vectors: of tokens (also the head of a tied model), or of positions."""

    def __init__(
        self, keys: Keys, *, rows: int, embed: int, axis: str | None, scale: float
    ) -> None:
        self.table = normal(keys, (rows, embed), lead=(), axes=(axis, "embed"), scale=scale)


class Decoder(nnx.Module):
    """Embedding, layers, final norm and heads.

    Args:
        spec: what to build.
        key: typed PRNG key of the initial weights.
        unrolled: layers as a list of single layers (for decoding) instead of stacks [l ...].
    """

    def __init__(self, spec: DecoderSpec, key: Array, *, unrolled: bool = False) -> None:
        keys = Keys(key)
        scale, d, e = spec.initializer_range, spec.hidden_size, spec.head_size
        self.spec = spec
        self.embed = Embedding(keys, rows=spec.vocab_rows, embed=e, axis="vocab", scale=scale)
        if unrolled:
            self.layers = nnx.List([Layer(spec, keys) for _ in range(spec.num_hidden_layers)])
        else:
            if spec.trunk_layers:
                self.trunk = Layer(spec, keys, lead=(spec.trunk_layers,))
            if spec.trainable_layers:
                self.layers = Layer(spec, keys, lead=(spec.trainable_layers,))
        if spec.final_norm:
            self.norm = Norm(spec)
        if spec.embedding_size:

            def between(inputs: int, outputs: int, axes: Axes) -> Linear:
                return Linear(
                    keys,
                    (inputs,),
                    (outputs,),
                    axes=axes,
                    bias=False,
                    scale=scale,
                    dtype=spec.dtype,
                )

            self.project_in = between(e, d, (None, "embed"))
            self.project_out = between(d, e, ("embed", None))
        if spec.head != "causal":
            bias = spec.head == "tokens"
            self.score = Readout(keys, embed=e, outputs=spec.num_labels, bias=bias, scale=scale)
        elif spec.head_bias or not spec.tie_word_embeddings:
            self.head = CausalHead(
                keys,
                embed=e,
                vocab=spec.vocab_rows,
                scale=scale,
                kernel=not spec.tie_word_embeddings,
                bias=spec.head_bias,
            )
        if spec.value_head:
            self.value = Readout(keys, embed=e, outputs=1, bias=True, scale=scale)
        if spec.positions == "learned":
            rows = spec.max_position_embeddings + spec.position_offset
            self.positions = Embedding(keys, rows=rows, embed=d, axis=None, scale=scale)

    def hidden(
        self, ids: Int[Array, "b s"], context: Context, trunk: Array | None = None
    ) -> tuple[Float[Array, "b s d"], Routing | None]:
        """What the heads read, in the compute dtype; and the routing if asked.

        With `trunk` (of `below`) the frozen layers are not run; their routing is never counted.
        """
        x = self.below(ids, context) if trunk is None else trunk
        x, _, routing = self._run(x, context, ("layers",), remat=self.spec.remat, keep=False)
        return self._finish(x), routing

    def below(self, ids: Int[Array, "b s"], context: Context) -> Float[Array, "b s d"]:
        """The residual stream where the frozen trunk ends: the embeddings if there is none."""
        x = self._embed(ids, context)
        return self._run(x, context, ("trunk",), remat="none", keep=False)[0]

    def prefill(
        self, ids: Int[Array, "b s"], context: Context, *, cache_size: int
    ) -> tuple[Float[Array, "b s d"], Cache]:
        """The same forward, keeping every layer's keys and values in a cache."""
        x, memories, _ = self._run(
            self._embed(ids, context), context, ("trunk", "layers"), remat="none", keep=True
        )
        cache = tuple(filled(k, v, size=cache_size, dtype=self.spec.dtype) for k, v in memories)
        return self._finish(x), cache

    def decode(
        self, ids: Int[Array, "b s"], context: Context, cache: Cache
    ) -> tuple[Float[Array, "b s d"], Cache]:
        """The same layers, reading the cache and writing it at `context.slot`."""
        x = self._embed(ids, context)
        grown: list[Any] = []
        flags = layer_flags(self.spec)
        for i, (layer, memory) in enumerate(zip(self._single_layers(), cache, strict=True)):
            x, written, _ = layer(x, context, memory, flags.of(i))
            grown.append(written)
        return self._finish(x), tuple(grown)

    def head_kernel(self) -> Float[Array, "d v"]:
        """The map to logits (the embedding's transpose when tied), in the compute dtype.

        With `spec.head_bias` one more row holds the bias: [d+1 v].
        """
        dtype = self.spec.dtype
        if self.spec.tie_word_embeddings:
            kernel = self.embed.table[...].astype(dtype).T
        else:
            kernel = self.head.kernel[...].astype(dtype)
        if self.spec.head_bias:
            kernel = jnp.concatenate((kernel, self.head.bias[...].astype(dtype)[None]))
        # After the cast, so that the sampler's weights, cast once, round alike.
        return kernel if self.spec.logit_scale == 1.0 else kernel * self.spec.logit_scale

    def _embed(self, ids: Int[Array, "b s"], context: Context) -> Float[Array, "b s d"]:
        # Rounded as `unstack` rounds the table, so that decoding starts from the same vectors.
        dtype = self.spec.dtype
        x = self.embed.table[...][ids].astype(dtype).astype(jnp.float32)
        if self.spec.embedding_scale != 1.0:
            # Rounded too: Gemma was trained with it in bfloat16.
            x = x * jnp.asarray(self.spec.embedding_scale, dtype).astype(jnp.float32)
        if self.spec.embedding_size:
            x = self.project_in(x)
        if context.positions is not None:
            at = context.positions + self.spec.position_offset
            x = x + self.positions.table[...][at].astype(dtype).astype(jnp.float32)
        return constrain(x, ("batch", "sequence", None))

    def _finish(self, x: Float[Array, "b s d"]) -> Float[Array, "b s e"]:
        """From the residual stream to what the heads read."""
        x = self.norm(x) if self.spec.final_norm else x
        x = self.project_out(x) if self.spec.embedding_size else x
        return x.astype(self.spec.dtype)

    def _run(
        self, x: Array, context: Context, stacks: tuple[str, ...], *, remat: str, keep: bool
    ) -> tuple[Array, list[KeyValue], Routing | None]:
        """Runs these stacks' layers; with `keep` also returns each layer's keys and values."""
        flags, memories = layer_flags(self.spec), []
        routings: list[Routing | None] = []
        if isinstance(getattr(self, "layers", None), nnx.List):
            unstacked = list(enumerate(self.layers)) if "layers" in stacks else []
            for i, layer in unstacked:
                x, memory, routing = layer(x, context, None, flags.of(i))
                memories.append(memory)
                routings.append(routing)
            return x, memories if keep else [], _total(routings)

        def body(
            x: Array, inputs: tuple[Layer, LayerFlags]
        ) -> tuple[Array, tuple[KeyValue | None, Routing | None]]:
            layer, own = inputs
            x, memory, routing = layer(x, context, None, own)
            return x, (memory if keep else None, routing)

        starts = {"trunk": 0, "layers": self.spec.trunk_layers}
        counts = {"trunk": self.spec.trunk_layers, "layers": self.spec.trainable_layers}
        for name in stacks:
            first, count = starts[name], counts[name]
            if not count:
                continue
            frozen = name == "trunk"
            # No gradient passes below the trunk's top, so there is nothing to recompute there.
            step = body if frozen or remat == "none" else jax.checkpoint(body, policy=REMAT[remat])
            own = jax.tree.map(jnp.asarray, flags.of(slice(first, first + count)))
            x, (kept, routing) = lax.scan(step, x, (getattr(self, name), own))
            x = lax.stop_gradient(x) if frozen else x
            if keep:
                memories += list(zip(*kept, strict=True))
            routings.append(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), routing))
        return x, memories, _total(routings)

    def _single_layers(self) -> list[Layer]:
        """Every layer alone; a view of the list, or slices of the stacks (slow: see unstack)."""
        if isinstance(getattr(self, "layers", None), nnx.List):
            return list(self.layers)
        stacks = [getattr(self, name, None) for name in ("trunk", "layers")]
        return [
            jax.tree.map(lambda leaf, i=i: leaf[i], stack)
            for stack in stacks
            if stack is not None
            for i in range(jax.tree.leaves(stack)[0].shape[0])
        ]


def _total(routings: list[Routing | None]) -> Routing | None:
    """The sum over layers."""
    counted = [routing for routing in routings if routing is not None]
    return jax.tree.map(lambda *parts: sum(parts), *counted) if counted else None
