"""An encoder as pure functions of a params pytree, and the choice between it and a decoder.

`EncoderNet` has the face of `build.Net` as far as classifiers have it, so that scoring, the reward
model and the trainers need not know which one they hold.

    net = net_of(spec)
    params = jax.jit(net.init)(jax.random.key(0))
    scores = net.scores(params, net.hidden(params, ids, lengths=lengths), lengths)     # [b n]
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jrlhf.models.axes import Axes
from jrlhf.models.build import Net, Params
from jrlhf.models.encoder import Encoder
from jrlhf.models.encoder_spec import AnySpec, EncoderSpec


@functools.lru_cache(maxsize=64)
def _graph(spec: EncoderSpec) -> tuple[nnx.GraphDef[Encoder], nnx.State]:
    """The static half of the module and its abstract state."""
    return nnx.split(nnx.eval_shape(lambda: Encoder(spec, jax.random.key(0))))


@dataclasses.dataclass(frozen=True)
class EncoderNet:
    """An encoder and its classifier.

    The params tree: `embed` (`table [v d]`, `norm`, and as the spec says `positions [n d]`,
    `types [n d]`, `proj.kernel`, `relative [n d]`, `relative_norm`, `conv`), `layers` stacked
    [l ...] (and `trunk`), `norm` where norms stand before their halves, `pooler.dense [d d]` (and
    `pooler.norm`), `score.{kernel [d n], bias [n]}`.
    """

    spec: EncoderSpec

    @property
    def adapters(self) -> tuple[()]:
        """None: adapters are for decoders."""
        return ()

    @property
    def base(self) -> EncoderNet:
        """Itself."""
        return self

    @property
    def drops(self) -> bool:
        """False: an encoder trains without dropout."""
        return False

    def of(self, spec: AnySpec) -> EncoderNet:
        """The net of a changed spec."""
        assert isinstance(spec, EncoderSpec)
        return EncoderNet(spec)

    def init(self, key: Array) -> Params:
        """Draws float32 weights: N(0, initializer_range^2), norms 1, biases 0."""
        return nnx.to_pure_dict(nnx.split(Encoder(self.spec, key))[1])

    def abstract(self) -> Params:
        """Shapes and dtypes of `init`, without computing anything."""
        return nnx.to_pure_dict(_graph(self.spec)[1])

    def axes(self) -> dict[str, Any]:
        """Logical axis names, a tuple per parameter, in the structure of params."""

        def names(variable: nnx.Variable[Any]) -> Axes:
            return variable.get_metadata()["axes"]

        state = _graph(self.spec)[1]
        named = jax.tree.map(names, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return nnx.to_pure_dict(named)

    def hidden(
        self,
        params: Params,
        ids: Int[Array, "b s"],
        *,
        segments: Int[Array, "b s"] | None = None,
        positions: Int[Array, "b s"] | None = None,
        lengths: Int[Array, " b"] | None = None,
        types: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Hidden states of every token, float32.

        Args:
            params: of `init`.
            ids: right-padded tokens. Their values at padding never matter for real positions.
            segments: document of each token, 0 for padding; a token reads its own document.
            positions: of each token, from 0; 0, 1, ... by default.
            lengths: real tokens per row, in place of segments. Without both all tokens are real.
            types: token types; 0 by default. Nothing where the model has no table of them.
        """
        places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        if segments is None:
            count = jnp.asarray(ids.shape[1]) if lengths is None else lengths[:, None]
            segments = jnp.broadcast_to((places < count).astype(jnp.int32), ids.shape)
        module = nnx.merge(_graph(self.spec)[0], params)
        return module.hidden(
            ids,
            segments=segments,
            positions=places if positions is None else positions,
            types=types,
        )

    def scores(
        self, params: Params, hidden: Float[Array, "b s d"], lengths: Int[Array, " b"]
    ) -> Float[Array, "b n"]:
        """The classifier's scores of right-padded rows, float32."""
        return nnx.merge(_graph(self.spec)[0], params).pooled_score(hidden, lengths)


AnyNet = Net | EncoderNet


def net_of(spec: AnySpec) -> AnyNet:
    """The net that a spec describes."""
    return EncoderNet(spec) if isinstance(spec, EncoderSpec) else Net(spec)
