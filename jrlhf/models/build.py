"""A model as pure functions of a params pytree: the only place that splits and merges NNX modules.

`Net` is static and hashable (close over it, or pass it as a static argument); `params` is a nested
dict of arrays. Everything below is traceable and meant to be called inside `jax.jit`.

    net = Net(spec)
    params = jax.jit(net.init)(jax.random.key(0))
    hidden = net.hidden(params, ids, lengths=lengths)          # [b s d]
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from jrlhf.errors import ModelError
from jrlhf.models.axes import Axes
from jrlhf.models.cache import Cache
from jrlhf.models.context import Context
from jrlhf.models.decoder import Decoder
from jrlhf.models.encoder_spec import AnySpec
from jrlhf.models.halves import combine as combine
from jrlhf.models.halves import partition as partition
from jrlhf.models.halves import restack as restack
from jrlhf.models.heads import last_token
from jrlhf.models.layers import Linear
from jrlhf.models.lora import tree as lora
from jrlhf.models.lora.config import LoraConfig
from jrlhf.models.lora.layer import dropping
from jrlhf.models.lora.plan import Adapter, Linears, plan
from jrlhf.models.moe import Routing
from jrlhf.models.rope import Rotation, document_lengths, rotation
from jrlhf.models.spec import DecoderSpec, RopeSpec
from jrlhf.models.unstack import unstack
from jrlhf.ops.layout import platform
from jrlhf.ops.logps import head_logits

Params = dict[str, Any]


@functools.lru_cache(maxsize=64)
def _linears(spec: DecoderSpec) -> dict[str, int]:
    """The kernels of an unstacked decoder's linear maps, and how many of their axes are inputs."""
    modules = nnx.iter_modules(nnx.merge(*_graph(spec, (), True)))
    return {
        "/".join(map(str, (*path, "kernel"))): module.inputs
        for path, module in modules
        if isinstance(module, Linear)
    }


@functools.lru_cache(maxsize=64)
def _graph(
    spec: DecoderSpec, adapters: tuple[Adapter, ...], unrolled: bool
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """The static half of the module and its abstract state."""

    def make() -> Decoder:
        module = Decoder(spec, jax.random.key(0), unrolled=unrolled)
        lora.attach(module, adapters, unrolled=unrolled)
        return module

    return nnx.split(nnx.eval_shape(make))


@functools.lru_cache(maxsize=64)
def linear_maps(spec: DecoderSpec) -> tuple[Linears, ...]:
    """What adapters can adapt: every linear map of the layers, by its checkpoint's names."""
    return tuple(lora.linears(spec, nnx.eval_shape(lambda: Decoder(spec, jax.random.key(0)))))


@dataclasses.dataclass(frozen=True)
class Net:
    """A decoder and its heads.

    The params tree: `embed.table [v d]`, `layers.{attn_norm, attn.{q k v o}, mlp_norm, mlp.{gate up
    down}}` stacked [l ...], `norm.scale`, and as the spec says `trunk` (like `layers`),
    `head.kernel [d v]`, `score.kernel [d n]`, `value.{kernel [d 1], bias [1]}`, `positions.table`.
    Kernels are [inputs..., outputs...]: q [d h e], k and v [d k e], o [h e d], gate and up [d f],
    down [f d]; of routed experts `mlp.router [d x]` and gate, up and down with an axis x in front.
    With adapters there is also `adapters.{name}`, see `models/lora/tree.py`.

    Attributes:
        spec: the base.
        adapters: the active ones, in the order in which they are added. Trees of others may lie in
            params; they are left alone. Without any the net is the base.
    """

    spec: DecoderSpec
    adapters: tuple[Adapter, ...] = ()

    @property
    def base(self) -> Net:
        """The net with every adapter off; it takes the same params."""
        return Net(self.spec)

    @property
    def drops(self) -> bool:
        """Whether a training step drops inputs (of adapters), and so needs keys."""
        return any(adapter.dropout for adapter in self.adapters)

    def of(self, spec: AnySpec) -> Net:
        """The net of a changed spec, with the same adapters."""
        assert isinstance(spec, DecoderSpec)
        return dataclasses.replace(self, spec=spec)

    def adapter(self, config: LoraConfig, *, name: str = "default", strict: bool = True) -> Adapter:
        """Plans an adapter; see `lora.plan.plan` for the arguments and errors."""
        return plan(
            config,
            linear_maps(self.spec),
            lora.weights(self.spec),
            model_type=self.spec.model_type,
            tied=lora.tied_head(self.spec),
            name=name,
            strict=strict,
        )

    def init(self, key: Array) -> Params:
        """Draws float32 weights: N(0, initializer_range^2), norms 1, biases 0, as transformers."""
        params = nnx.to_pure_dict(nnx.split(Decoder(self.spec, key))[1])
        if not self.adapters:
            return params
        own = {adapter.name: lora.init(adapter, params, key) for adapter in self.adapters}
        return {**params, lora.KEY: own}

    def abstract(self) -> Params:
        """Shapes and dtypes of `init`, without computing anything."""
        state = nnx.to_pure_dict(_graph(self.spec, self.adapters, False)[1])
        return lora.unweave(state, self.adapters)

    def axes(self) -> dict[str, Any]:
        """Logical axis names, a tuple per parameter, in the structure of params."""
        state = _graph(self.spec, self.adapters, False)[1]

        def names(variable: nnx.Variable[Any]) -> Axes:
            return variable.get_metadata()["axes"]

        named = jax.tree.map(names, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return lora.unweave(nnx.to_pure_dict(named), self.adapters)

    def hidden(
        self,
        params: Params,
        ids: Int[Array, "b s"],
        *,
        segments: Int[Array, "b s"] | None = None,
        positions: Int[Array, "b s"] | None = None,
        lengths: Int[Array, " b"] | None = None,
        trunk: Float[Array, "b s d"] | None = None,
        dropout: UInt32[Array, "b 2"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Hidden states after the final norm, in the compute dtype: what the heads read.

        Args:
            params: stacked, or unstacked.
            ids: tokens. Their values at padding never matter for real positions.
            segments: document of each token, 0 for padding; tokens see their own document only.
                Needed for packed rows and for padding on the left. Without it rows are taken as
                right-padded, where causality alone keeps padding out.
            positions: of each token in its document; 0, 1, ... by default.
            lengths: real tokens per right-padded row. Causality makes it redundant but for the
                rope types whose angles depend on the document's length (dynamic, longrope).
            trunk: what `trunk` gave for these rows: the frozen layers are then not run again.
            dropout: raw data of one key per row, in training; None: adapters drop nothing.

        Returns:
            [b s d]; at padding the values are finite and mean nothing.
        """
        context = self._context(ids, segments, positions, lengths)
        with dropping(dropout):
            return self._module(params).hidden(ids, context, trunk)[0]

    def trunk(
        self,
        params: Params,
        ids: Int[Array, "b s"],
        *,
        segments: Int[Array, "b s"] | None = None,
        positions: Int[Array, "b s"] | None = None,
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b s d"]:
        """The float32 residual stream where the frozen layers end, for `hidden`.

        It depends on frozen parameters alone, so one pass serves every epoch over the same rows,
        and the policy and its reference alike. Not so with adapters, which reach into the trunk.
        """
        context = self._context(ids, segments, positions, lengths)
        return self._module(params).below(ids, context)

    def hidden_and_routing(
        self,
        params: Params,
        ids: Int[Array, "b s"],
        *,
        segments: Int[Array, "b s"] | None = None,
        positions: Int[Array, "b s"] | None = None,
        lengths: Int[Array, " b"] | None = None,
        trunk: Float[Array, "b s d"] | None = None,
        dropout: UInt32[Array, "b 2"] | None = None,
    ) -> tuple[Float[Array, "b s d"], Routing]:
        """`hidden` of a model with experts, and where real tokens went, summed over trained layers.

        `moe.balancing_loss` of the routing is transformers' auxiliary loss. Its arguments are those
        of `hidden`; tokens are real where `segments` is not 0, else before `lengths`, else all.
        """
        if self.spec.moe is None:
            raise ModelError(f"A {self.spec.model_type} model has no experts and no routing.")
        real = jnp.ones(ids.shape, bool)
        if segments is not None:
            real = segments > 0
        elif lengths is not None:
            real = jnp.arange(ids.shape[1])[None] < lengths[:, None]
        context = self._context(ids, segments, positions, lengths)._replace(real=real)
        with dropping(dropout):
            hidden, routing = self._module(params).hidden(ids, context, trunk)
        assert routing is not None
        return hidden, routing

    def head(self, params: Params) -> Float[Array, "d v"]:
        """The map from `head_states` to logits, in the compute dtype; [d+1 v] with a head bias.

        The logit scale is in it; `spec.final_softcap` is for whoever makes logits.
        """
        if self.spec.head != "causal":
            raise ModelError("A classifier has no causal head: load it with head='causal'.")
        return self._module(params).head_kernel()

    def head_states(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows e"]:
        """Hidden states as `head` takes them: a 1 is appended where the head has a bias row."""
        if not self.spec.head_bias:
            return hidden
        return jnp.concatenate((hidden, jnp.ones_like(hidden[..., :1])), axis=-1)

    def logits(self, params: Params, hidden: Float[Array, "b s d"]) -> Float[Array, "b s v"]:
        """All logits, float32; -inf for padding of the vocabulary.

        For a look at a model: training and sampling work in chunks.
        """
        head = self.head(params)
        rows = self.head_states(hidden).reshape(-1, head.shape[0])
        tied = self.spec.tie_word_embeddings
        logits = head_logits(rows, head, softcap=self.spec.final_softcap, tied=tied)
        if self.spec.vocab_padding:
            real = jnp.arange(head.shape[1]) < self.spec.vocab_size
            logits = jnp.where(real, logits, -jnp.inf)
        return logits.reshape(*hidden.shape[:-1], head.shape[1])

    def values(self, params: Params, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows"]:
        """Value estimates of hidden states, float32."""
        if not self.spec.value_head:
            raise ModelError("This model has no value head: load it with value_head=True.")
        return self._module(params).value(hidden)[..., 0]

    def scores(
        self, params: Params, hidden: Float[Array, "b s d"], lengths: Int[Array, " b"]
    ) -> Float[Array, "b n"]:
        """Classifier scores at each row's last real token, float32.

        transformers takes the last token that is not `pad_token_id` instead; the two differ where a
        text ends in the padding token itself, which here counts as text.
        """
        if self.spec.head != "classifier":
            raise ModelError("This model has no classifier: load it with head='classifier'.")
        return self._module(params).score(last_token(hidden, lengths))

    def token_scores(self, params: Params, hidden: Float[Array, "b s d"]) -> Float[Array, "b s n"]:
        """The token classifier's scores of every token, float32."""
        if self.spec.head != "tokens":
            raise ModelError("This model has no token classifier: load it with head='tokens'.")
        return self._module(params).score(hidden)

    def prefill(
        self, params: Params, ids: Int[Array, "b s"], lengths: Int[Array, " b"], *, cache_size: int
    ) -> tuple[Float[Array, "b s d"], Cache]:
        """Runs right-padded prompts and fills cache slots 0 .. s-1.

        Args:
            params: unstacked params decode fastest; stacked ones work.
            ids: right-padded prompts.
            lengths: real tokens per row.
            cache_size: slots of the cache, at least s.

        Returns:
            Hidden states after the final norm, and the cache.
        """
        if cache_size < ids.shape[1]:
            raise ModelError(f"cache_size={cache_size} is less than the {ids.shape[1]} prompt ids.")
        module = self._module(params)
        context = self._context(ids, None, None, lengths)
        return module.prefill(ids, context, cache_size=cache_size)

    def decode(
        self,
        params: Params,
        ids: Int[Array, " b"],
        positions: Int[Array, " b"],
        cache: Cache,
        *,
        slot: Int[Array, ""] | int,
        valid: Bool[Array, "b t"],
    ) -> tuple[Float[Array, "b d"], Cache]:
        """Runs one token per row and writes it to the same cache slot in all rows.

        Args:
            params: as returned by `unstack`.
            ids: the tokens.
            positions: RoPE position of each row's token.
            cache: of `prefill` or the last `decode`.
            slot: where this token's keys and values go.
            valid: slots that each row may read, `slot` itself included.

        Returns:
            Hidden states after the final norm, and the cache with the slot written.
        """
        behind = None
        if any(self.spec.windows):
            # Slots hold a row's tokens in order, with gaps: count the valid ones after each.
            seen = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
            behind = seen[:, -1:] - seen
        context = self._positioned(positions[:, None], positions[:, None] + 1)._replace(
            valid=valid, behind=behind, slot=jnp.asarray(slot, jnp.int32)
        )
        # Made once: XLA would fold the cosines into every layer's rotations.
        context = jax.lax.optimization_barrier(context)
        hidden, cache = self._module(params).decode(ids[:, None], context, cache)
        return hidden[:, 0], cache

    def unstack(self, params: Params) -> Params:
        """Params for decoding: layers as a list, weights cast to the compute dtype once.

        Slicing a stack costs a copy of the weights at every token; here it is paid once per
        rollout. On a CPU the kernels of linear maps are `Turned`. Norms, biases, routers, the value
        head and the classifier keep their own type.
        """
        params = lora.weave(params, self.adapters, ready=True)
        turned = _linears(self.spec) if platform() == "cpu" else {}
        return unstack(params, dtype=self.spec.dtype, turned=turned)

    def _module(self, params: Params) -> Decoder:
        """Merges params into a module, for the duration of one traced call."""
        params = lora.weave(params, self.adapters)
        layers = params.get("layers")
        if isinstance(layers, list | tuple):
            params = {**params, "layers": dict(enumerate(layers))}
            return nnx.merge(_graph(self.spec, self.adapters, True)[0], params)
        return nnx.merge(_graph(self.spec, self.adapters, False)[0], params)

    def _context(
        self,
        ids: Int[Array, "b s"],
        segments: Int[Array, "b s"] | None,
        positions: Int[Array, "b s"] | None,
        lengths: Int[Array, " b"] | None,
    ) -> Context:
        """What all layers of a whole forward share."""
        spec = self.spec
        if positions is None:
            positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        long = None
        if any(rope is not None and rope.by_length for rope in (spec.rope, spec.local_rope)):
            if segments is not None:
                long = document_lengths(positions, segments)
            elif lengths is not None:
                long = lengths[:, None]
            else:
                long = jnp.full((1, 1), ids.shape[1], jnp.int32)
        return self._positioned(positions, long)._replace(segments=segments)

    def _positioned(
        self, positions: Int[Array, "b s"], lengths: Int[Array, "b s"] | None
    ) -> Context:
        """The part of a context that says where each token stands."""
        spec = self.spec
        if spec.positions == "learned":
            return Context(positions=positions)

        def angles(rope: RopeSpec) -> Rotation:
            return rotation(positions, rope=rope, head_dim=spec.head_dim, lengths=lengths)

        local = None if spec.local_rope is None else angles(spec.local_rope)
        return Context(angles(spec.rope), local)
