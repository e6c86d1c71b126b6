"""What the layers of one forward are told besides the states: positions, masks, own flags."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jrlhf.models.rope import Rotation
from jrlhf.models.spec import DecoderSpec


class Context(NamedTuple):
    """What every layer of one forward shares, made once outside the scan.

    Attributes:
        rotation: RoPE's cos and sin of each token; None where positions are learned.
        local: those of the second rotation, if the model has one.
        positions: of each token, where positions are learned.
        segments: document of each token, 0 for padding; None where rows are right-padded.
        real: tokens whose routing is counted [b s]; None: nobody asks.
        valid: decoding only, which cache slots each row may read [b t].
        behind: decoding with windows only, how far each slot lies behind the token [b t].
        slot: decoding only, the cache slot of the first token.
    """

    rotation: Rotation | None = None
    local: Rotation | None = None
    positions: Array | None = None
    segments: Array | None = None
    real: Array | None = None
    valid: Array | None = None
    behind: Array | None = None
    slot: Array | None = None


class LayerFlags(NamedTuple):
    """What differs from layer to layer besides weights: [l] arrays that a scan slices.

    None where nothing differs, so that such a model's program has no trace of it.

    Attributes:
        window: keys that a query reads, its own included.
        rope: 0 the rotation, 1 the local one, -1 none.
        scale: factor on queries.
        dense: a plain MLP in place of the experts.
    """

    window: Any = None
    rope: Any = None
    scale: Any = None
    dense: Any = None

    def of(self, at: int | slice) -> LayerFlags:
        """Those of one layer, or of some."""
        return jax.tree.map(lambda flag: flag[at], self)


UNIFORM = LayerFlags()


def layer_flags(spec: DecoderSpec) -> LayerFlags:
    """The flags of all layers, as numpy arrays."""
    window = rope = scale = dense = None
    if any(spec.windows):
        window = np.array([w or np.iinfo(np.int32).max for w in spec.windows], np.int32)
    if any(spec.layer_ropes):
        rope = np.array(spec.layer_ropes, np.int32)
    if spec.attention_scale_by_layer:
        scale = (1.0 / np.arange(1, spec.num_hidden_layers + 1)).astype(np.float32)
    if spec.moe is not None and spec.moe.dense_layers:
        dense = np.isin(np.arange(spec.num_hidden_layers), spec.moe.dense_layers)
    return LayerFlags(window, rope, scale, dense)
