"""The decoder as an NNX module: one forward definition for training, scoring, prefill and decode.

The residual stream, norms and softmax are float32 also under bfloat16 compute: a dot gives float32
anyway, so the sum costs nothing, and no rounding piles up over the layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jrlhf.models.attention import attend_cache, attend_causal
from jrlhf.models.axes import Axes, constrain
from jrlhf.models.cache import Cache, LayerCache, filled
from jrlhf.models.heads import CausalHead, Readout
from jrlhf.models.layers import Keys, Linear, Mlp, Norm, Shape, normal
from jrlhf.models.rope import Rotation, rotate
from jrlhf.models.spec import DecoderSpec

KeyValue = tuple[Array, Array]


class Context(NamedTuple):
    """What every layer of one forward shares, made once outside the scan.

    Attributes:
        rotation: RoPE's cos and sin of each token.
        segments: document of each token, 0 for padding; None where rows are right-padded.
        valid: decoding only, which cache slots each row may read [b t].
        slot: decoding only, the cache slot of the first token.
    """

    rotation: Rotation
    segments: Array | None = None
    valid: Array | None = None
    slot: Array | None = None


class Attention(nnx.Module):
    """Projections and rotary attention, on the tokens themselves or on a cache."""

    def __init__(self, spec: DecoderSpec, keys: Keys, *, lead: Shape = ()) -> None:
        d, e = spec.hidden_size, spec.head_dim
        h, k = spec.num_attention_heads, spec.num_key_value_heads

        def linear(inputs: Shape, outputs: Shape, axes: Axes) -> Linear:
            return Linear(
                keys,
                inputs,
                outputs,
                axes=axes,
                bias=spec.attention_bias,
                scale=spec.initializer_range,
                dtype=spec.dtype,
                lead=lead,
            )

        self.dtype = spec.dtype
        self.q = linear((d,), (h, e), ("embed", "heads", None))
        self.k = linear((d,), (k, e), ("embed", "kv_heads", None))
        self.v = linear((d,), (k, e), ("embed", "kv_heads", None))
        self.o = linear((h, e), (d,), ("heads", None, "embed"))

    def __call__(
        self, x: Float[Array, "b s d"], context: Context, cache: LayerCache | None
    ) -> tuple[Array, KeyValue | LayerCache]:
        q = constrain(self.q(x), ("batch", "sequence", "heads", None))
        k = constrain(self.k(x), ("batch", "sequence", "kv_heads", None))
        v = constrain(self.v(x), ("batch", "sequence", "kv_heads", None))
        q = checkpoint_name(rotate(q, context.rotation), "qkv")
        k = checkpoint_name(rotate(k, context.rotation), "qkv")
        v = checkpoint_name(v, "qkv")
        memory: KeyValue | LayerCache = (k, v)
        if cache is None:
            out = attend_causal(q, k, v, context.segments, self.dtype)
        else:
            assert context.slot is not None
            assert context.valid is not None
            memory = cache = cache.write(k, v, context.slot)
            out = attend_cache(q, cache.k, cache.v, context.valid, dtype=self.dtype)
        return self.o(out), memory


class Layer(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, spec: DecoderSpec, keys: Keys, *, lead: Shape = ()) -> None:
        self.attn_norm = Norm(spec, lead=lead)
        self.attn = Attention(spec, keys, lead=lead)
        self.mlp_norm = Norm(spec, lead=lead)
        self.mlp = Mlp(spec, keys, lead=lead)

    def __call__(
        self, x: Float[Array, "b s d"], context: Context, cache: LayerCache | None = None
    ) -> tuple[Array, KeyValue | LayerCache]:
        mixed, memory = self.attn(self.attn_norm(x), context, cache)
        x = x + mixed
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, ("batch", "sequence", None)), memory


# What the backward pass may keep of a layer; "none" is no checkpoint at all.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("qkv", "attention"),
}


class Embedding(nnx.Module):
    """The table of token vectors, also the head of a tied model."""

    def __init__(self, keys: Keys, *, vocab: int, embed: int, scale: float) -> None:
        self.table = normal(keys, (vocab, embed), lead=(), axes=("vocab", "embed"), scale=scale)


class Decoder(nnx.Module):
    """Embedding, layers, final norm and heads.

    Args:
        spec: what to build.
        key: typed PRNG key of the initial weights.
        unrolled: layers as a list of single layers (for decoding) instead of stacks [l ...].
    """

    def __init__(self, spec: DecoderSpec, key: Array, *, unrolled: bool = False) -> None:
        keys = Keys(key)
        scale = spec.initializer_range
        self.spec = spec
        self.embed = Embedding(keys, vocab=spec.vocab_size, embed=spec.hidden_size, scale=scale)
        if unrolled:
            self.layers = nnx.List([Layer(spec, keys) for _ in range(spec.num_hidden_layers)])
        else:
            if spec.trunk_layers:
                self.trunk = Layer(spec, keys, lead=(spec.trunk_layers,))
            if spec.trainable_layers:
                self.layers = Layer(spec, keys, lead=(spec.trainable_layers,))
        self.norm = Norm(spec)
        if spec.head == "classifier":
            self.score = Readout(
                keys, embed=spec.hidden_size, outputs=spec.num_labels, bias=False, scale=scale
            )
        elif not spec.tie_word_embeddings:
            self.head = CausalHead(keys, embed=spec.hidden_size, vocab=spec.vocab_size, scale=scale)
        if spec.value_head:
            self.value = Readout(keys, embed=spec.hidden_size, outputs=1, bias=True, scale=scale)

    def hidden(
        self, ids: Int[Array, "b s"], context: Context, trunk: Array | None = None
    ) -> Float[Array, "b s d"]:
        """Hidden states after the final norm, in the compute dtype; `trunk`: of `below`."""
        x = self.below(ids, context) if trunk is None else trunk
        x, _ = self._run(x, context, ("layers",), remat=self.spec.remat, keep=False)
        return self.norm(x)

    def below(self, ids: Int[Array, "b s"], context: Context) -> Float[Array, "b s d"]:
        """The residual stream where the frozen trunk ends: the embeddings if there is none."""
        return self._run(self._embed(ids), context, ("trunk",), remat="none", keep=False)[0]

    def prefill(
        self, ids: Int[Array, "b s"], context: Context, *, cache_size: int
    ) -> tuple[Float[Array, "b s d"], Cache]:
        """The same forward, keeping every layer's keys and values in a cache."""
        stacks = ("trunk", "layers")
        x, memories = self._run(self._embed(ids), context, stacks, remat="none", keep=True)
        cache = tuple(filled(k, v, size=cache_size, dtype=self.spec.dtype) for k, v in memories)
        return self.norm(x), cache

    def decode(
        self, ids: Int[Array, "b s"], context: Context, cache: Cache
    ) -> tuple[Float[Array, "b s d"], Cache]:
        """The same layers, reading the cache and writing it at `context.slot`."""
        x = self._embed(ids)
        grown: list[Any] = []
        for layer, memory in zip(self._single_layers(), cache, strict=True):
            x, written = layer(x, context, memory)
            grown.append(written)
        return self.norm(x), tuple(grown)

    def head_kernel(self) -> Float[Array, "d v"]:
        """The map to logits (the embedding's transpose when tied), in the compute dtype."""
        if self.spec.tie_word_embeddings:
            return self.embed.table[...].astype(self.spec.dtype).T
        return self.head.kernel[...].astype(self.spec.dtype)

    def _embed(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        # Rounded as `unstack` rounds the table, so that decoding starts from the same vectors.
        x = self.embed.table[...][ids].astype(self.spec.dtype).astype(jnp.float32)
        return constrain(x, ("batch", "sequence", None))

    def _run(
        self, x: Array, context: Context, stacks: tuple[str, ...], *, remat: str, keep: bool
    ) -> tuple[Array, list[KeyValue]]:
        """Runs these stacks' layers; with `keep` also returns each layer's keys and values."""
        if "layers" in stacks and isinstance(getattr(self, "layers", None), nnx.List):
            memories = []
            for layer in self.layers:
                x, memory = layer(x, context)
                memories.append(memory)
            return x, memories if keep else []

        def body(x: Array, layer: Layer) -> tuple[Array, KeyValue | None]:
            x, memory = layer(x, context)
            return x, memory if keep else None

        memories = []
        for name in stacks:
            if (stack := getattr(self, name, None)) is None:
                continue
            frozen = name == "trunk"
            # No gradient passes below the trunk's top, so there is nothing to recompute there.
            step = body if frozen or remat == "none" else jax.checkpoint(body, policy=REMAT[remat])
            x, kept = lax.scan(step, x, stack)
            x = lax.stop_gradient(x) if frozen else x
            if keep:
                memories += list(zip(*kept, strict=True))
        return x, memories

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
