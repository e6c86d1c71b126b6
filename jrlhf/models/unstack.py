"""A model's parameters as decoding wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jrlhf.models.quantize import is_quantized
from jrlhf.ops.turned import Turned

Params = dict[str, Any]


def unstack(params: Params, *, dtype: str, turned: Mapping[str, int]) -> Params:
    """Layers as a list of single ones, weights cast to the compute dtype.

    Args:
        params: stacked, adapters woven in.
        dtype: of what dots read; norms, biases, routers, the value head and the classifier keep
            their own.
        turned: kernels to be laid out as `Turned` ("layers/0/attn/q/kernel"), and how many of their
            axes are inputs.
    """
    cast = {key: value for key, value in params.items() if key not in ("trunk", "layers")}
    layers: list[Any] = []
    for name in ("trunk", "layers"):
        if name in params:
            count = jax.tree.leaves(params[name])[0].shape[0]
            layers += [jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for i in range(count)]
    cast["layers"] = layers

    def lower(path: tuple[Any, ...], leaf: Any) -> Any:
        if is_quantized(leaf):
            return leaf
        names = {str(getattr(key, "key", "")) for key in path}
        is_dot = bool(names & {"kernel", "table", "a", "b"})
        is_dot = is_dot and not names & {"value", "score", "router"}
        leaf = leaf.astype(dtype) if is_dot else leaf
        inputs = turned.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return leaf if inputs is None else Turned.of(leaf, inputs)

    return jax.tree_util.tree_map_with_path(lower, cast, is_leaf=is_quantized)
