"""A model's parameters in two halves, the trained one and the frozen one, and where it is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jrlhf.models.lora.tree import KEY

if TYPE_CHECKING:
    from jrlhf.models.build_encoder import AnyNet

Params = dict[str, Any]


def restack(params: Params, trunk: int) -> Params:
    """Moves the border between the frozen lower layers and the rest."""
    stacks = [params[name] for name in ("trunk", "layers") if name in params]
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
    out = {name: value for name, value in params.items() if name not in ("trunk", "layers")}
    count = jax.tree.leaves(whole)[0].shape[0]
    if trunk:
        out["trunk"] = jax.tree.map(lambda x: x[:trunk], whole)
    if trunk < count:
        out["layers"] = jax.tree.map(lambda x: x[trunk:], whole)
    return out


def partition(params: Params, net: AnyNet) -> tuple[Params, Params]:
    """Splits params into (trainable, frozen).

    With adapters the active ones are trainable, and a value head, which is always new. Else, with
    `trunk_layers`, the trunk and the embedding (which is the head too when tied) are frozen;
    otherwise everything is trainable. Both halves are plain sub-dicts, so they can be passed to a
    jitted function apart: gradients with respect to `trainable` never enter the trunk.
    """
    if net.adapters:
        names = {adapter.name for adapter in net.adapters}
        held = params[KEY]
        trainable = {key: params[key] for key in ("value",) if key in params}
        trainable[KEY] = {name: held[name] for name in held if name in names}
        frozen = {key: value for key, value in params.items() if key not in trainable}
        frozen[KEY] = {name: held[name] for name in held if name not in names}
        return trainable, frozen
    below = {"trunk", "embed", "project_in", "positions"} if net.spec.trunk_layers else set()
    return (
        {key: value for key, value in params.items() if key not in below},
        {key: value for key, value in params.items() if key in below},
    )


def combine(trainable: Params, frozen: Params) -> Params:
    """Puts the two halves of `partition` together again."""
    whole = {**frozen, **trainable}
    if KEY in whole:
        halves = (half.get(KEY, {}) for half in (frozen, trainable))
        whole[KEY] = {name: tree for half in halves for name, tree in half.items()}
    return whole
