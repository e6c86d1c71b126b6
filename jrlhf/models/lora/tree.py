"""Trees of adapters: what can be adapted, first values, and base and adapter put together.

    params["adapters"][name]["layers"]["attn"]["q"] = {"a": [l d r], "b": [l r h e]}

`weave` hangs these beside the kernels, where the modules look for them, while a call is traced; it
copies nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.families import Weight, family_of
from jrlhf.models.families.weights import Part
from jrlhf.models.layers import Linear
from jrlhf.models.lora.layer import LowRank, delta, gain, norm
from jrlhf.models.lora.plan import Adapter, Linears, Path, Target, Weights
from jrlhf.models.spec import DecoderSpec

Params = dict[str, Any]
KEY = "adapters"
_BESIDE = "lora"
# Leaves of a low-rank path that follow from the plan, and are no parameters.
_CONSTANTS = ("scale", "tag")


# ------------------------------------------------------------------ what the model has


def weights(spec: Any) -> Weights:
    """The rows with their places, under the names that PEFT's files have: those in memory."""
    rows = family_of(spec).weights(spec)
    if any("{expert}" in row.name for row in rows):
        rows = tuple(_in_memory(row, spec) for row in rows)
    return [(row, list(row.places(spec))) for row in rows]


def _in_memory(row: Weight, spec: Any) -> Weight:
    """A row of a model whose files have a tensor for each expert, and whose layers have two."""
    if row.path[:2] != ("layers", "mlp"):
        return row
    name, x = "model.layers.{layer}.mlp.", spec.moe.num_experts
    if row.path[2] == "router":
        return dataclasses.replace(row, name=f"{name}gate.weight")
    if row.path[2] == "down":
        name, part = f"{name}experts.down_proj", None
    else:
        size = spec.intermediate_size
        start = size * (row.path[2] == "up")
        name, part = f"{name}experts.gate_up_proj", Part(1, 1, start, size, 2 * size)
    return dataclasses.replace(
        row, name=name, shape=(x, *row.shape), groups=((0,), (2,), (1,)), part=part
    )


def tied_head(spec: DecoderSpec) -> str:
    """What a checkpoint would call the head, were it not the embedding; "" if it is not."""
    if spec.head != "causal" or not spec.tie_word_embeddings:
        return ""
    rows = family_of(spec).weights(spec.replace(tie_word_embeddings=False))
    return next(row.name for row in rows if row.path == ("head", "kernel"))


def linears(spec: Any, module: nnx.Module) -> list[Linears]:
    """Every linear map of a module (abstract is enough), under the names of its checkpoint.

    But those that some layers lack: plain MLPs between experts, whose names PEFT takes for experts.
    """
    found: list[Linears] = []
    first: dict[str, Path] = {}  # of the maps that are one in the checkpoint
    for row, places in weights(spec):
        stacks: dict[Path, list[tuple[int | None, str]]] = {}
        for name, path, at in places:
            stacks.setdefault(path, []).append((at, name))
        for path, tensors in stacks.items():
            linear = _at(module, path[:-1])
            if path[-1] != "kernel" or not isinstance(linear, Linear) or row.layers is not None:
                continue
            inputs, outputs = _sides(row, linear.inputs)
            order = [at for at, _ in tensors]
            names = tuple(name.removesuffix(".weight") for _, name in tensors)
            assert order == [None] or order == list(range(len(order))), path
            source = first.setdefault(names[0], path[:-1])
            shared = None if source == path[:-1] else source
            stacked = order != [None]
            found.append(Linears(path[:-1], names, stacked, inputs, outputs, row.part, shared))
    return found


def _sides(row: Weight, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A kernel's input and output axes, in the order in which the checkpoint merges each side."""
    sides: dict[bool, tuple[int, ...]] = {}
    for group in row.groups:
        kinds = {axis < count for axis in group}
        if len(kinds) != 1:
            raise UnsupportedModelError(f"{row.name} mixes inputs and outputs in one axis.")
        sides[kinds.pop()] = tuple(axis if axis < count else axis - count for axis in group)
    return sides[True], sides[False]


def _at(module: Any, path: Path) -> Any:
    for key in path:
        module = getattr(module, key, None)
    return module


def attach(module: Any, adapters: Sequence[Adapter], *, unrolled: bool) -> None:
    """Puts low-rank paths beside the linear maps of a new module."""
    for order, adapter in enumerate(adapters):
        for target in adapter.targets:
            for linear, lead in _places(module, target, unrolled=unrolled):
                linear.lora[_place(order)] = LowRank(
                    linear, target, adapter, lead=lead, ready=unrolled
                )


def _place(order: int) -> str:
    """A module's key of an adapter: NNX sorts keys, and adapters act in their order."""
    return f"{order:03d}"


def _places(module: Any, target: Target, *, unrolled: bool) -> list[tuple[Linear, tuple[int, ...]]]:
    if not target.stacked:
        return [(_at(module, target.path), ())]
    if unrolled:
        stack, *rest = target.path
        return [(_at(layer, tuple(rest)), ()) for layer in getattr(module, stack)]
    return [(_at(module, target.path), (len(target.names),))]


# ------------------------------------------------------------------ base and adapters together


def weave(params: Params, adapters: Sequence[Adapter], *, ready: bool = False) -> Params:
    """The base's tree with the adapters' leaves beside their kernels, as the modules want it.

    Args:
        params: the base, with the adapters under "adapters"; woven params come back as they are.
        adapters: the active ones; the others are left out.
        ready: DoRA's magnitudes are divided by their norms (see `layer.LowRank`).
    """
    if KEY not in params:
        return params
    out = {name: value for name, value in params.items() if name != KEY}
    for order, adapter in enumerate(adapters):
        own = params[KEY][adapter.name]
        for target in adapter.targets:
            leaves = _leaves(own, target)
            if ready and adapter.dora:
                kernel = get(params, target.path)["kernel"][...]
                leaves["magnitude"] = _each(target, gain)(
                    leaves["magnitude"], kernel, leaves["a"], leaves["b"], leaves["scale"]
                )
            out = with_entry(out, (*target.path, _BESIDE, _place(order)), leaves)
        for path in adapter.saved:
            out = with_entry(out, path, get(own, path))
    return out


def unweave(tree: Params, adapters: Sequence[Adapter]) -> Params:
    """The structure of params from that of the woven modules (shapes, or axis names)."""
    if not adapters:
        return tree
    held: Params = {}
    for order, adapter in enumerate(adapters):
        own: Params = {}
        for target in adapter.targets:
            leaves = get(tree, (*target.path, _BESIDE, _place(order)))
            learnt = {name: leaf for name, leaf in leaves.items() if name not in _CONSTANTS}
            if target.source is not None:
                del learnt["a"]
            own = with_entry(own, target.path, learnt)
        for path in adapter.saved:
            own = with_entry(own, path, get(tree, path))
        held[adapter.name] = own
    return {**_without_paths(tree), KEY: held}


def _without_paths(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {name: _without_paths(value) for name, value in tree.items() if name != _BESIDE}


def _constants(target: Target) -> dict[str, Array]:
    scale = np.asarray(target.scales, np.float32)
    tag = np.asarray([zlib.crc32(name.encode()) for name in target.names], np.uint32)
    if not target.stacked:
        scale, tag = scale[0], tag[0]
    return {"scale": jnp.asarray(scale), "tag": jnp.asarray(tag)}


def _leaves(own: Params, target: Target) -> Params:
    """What one low-rank path is made of, from an adapter's tree."""
    leaves = {**get(own, target.path), **_constants(target)}
    if target.source is not None:
        leaves["a"] = get(own, target.source)["a"]
    return leaves


def _each(target: Target, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one map as a function of its stack."""
    return jax.vmap(function) if target.stacked else function


def get(tree: Mapping[str, Any], path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def with_entry(tree: Params, path: Path, value: Any) -> Params:
    """A copy of a nested dict with one entry set; branches beside the path are shared."""
    key, *rest = path
    if rest:
        value = with_entry(tree.get(key, {}), tuple(rest), value)
    return {**tree, key: value}


# ------------------------------------------------------------------ first values, and merging


def init(adapter: Adapter, base: Params, key: Array) -> Params:
    """An adapter's first values, float32: traceable, and a function of (key, names of modules)."""
    own: Params = {}
    for target in adapter.targets:
        kernel = get(base, target.path)["kernel"][...]
        own = with_entry(own, target.path, _first(adapter, target, kernel, key))
    for path in adapter.saved:
        own = with_entry(own, path, get(base, path)[...].astype(jnp.float32))
    return own


def _first(adapter: Adapter, target: Target, kernel: Array, key: Array) -> Params:
    """PEFT's initial values of one stack: see `LoraConfig.init_lora_weights`."""
    shape = kernel.shape[1:] if target.stacked else kernel.shape
    inputs, outputs = shape[: len(target.inputs)], shape[len(target.inputs) :]
    r, width = target.rank, float(np.prod(inputs)) ** -0.5
    constants = _constants(target)

    def draw(tag: Array, rank: Array) -> tuple[Array, Array]:
        own = jax.random.fold_in(key, tag)
        real = jnp.arange(r) < rank
        if adapter.init == "gaussian":
            a = jax.random.normal(own, (*inputs, r)) / jnp.maximum(rank, 1)
        else:
            a = jax.random.uniform(own, (*inputs, r), minval=-width, maxval=width)
        b = jnp.zeros((r, *outputs), jnp.float32)
        part = jax.random.fold_in(own, zlib.crc32("/".join(target.path).encode()))
        if adapter.init is False:
            drawn = jax.random.uniform(part, (r, *outputs), minval=-1.0, maxval=1.0)
            b = drawn / jnp.sqrt(jnp.maximum(rank, 1).astype(jnp.float32))
        elif adapter.init == "orthogonal":
            for_a, for_b = _halves(jax.random.fold_in(own, 1), real)
            dot = functools.partial(jnp.tensordot, axes=1, precision=lax.Precision.HIGHEST)
            a = dot(jax.random.normal(own, (*inputs, r // 2)), for_a) / 10
            b = dot(for_b.T, jax.random.normal(part, (r // 2, *outputs))) / 10
        return jnp.where(real, a, 0.0), jnp.where(real.reshape(-1, *[1] * len(outputs)), b, 0.0)

    ranks = jnp.asarray(target.ranks if target.stacked else target.ranks[0])
    a, b = _each(target, draw)(constants["tag"], ranks)
    leaves = {"a": a, "b": b}
    if adapter.dora:

        def magnitude(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
            # Layers that are not adapted have none: a file says nothing of them.
            return jnp.where(scale == 0, 0.0, norm(kernel, a, b, scale))

        leaves["magnitude"] = _each(target, magnitude)(kernel, a, b, constants["scale"])
    if target.source is not None:  # the same draw as the first one's: their names are the same
        del leaves["a"]
    return leaves


def _halves(key: Array, real: Array) -> tuple[Array, Array]:
    """The even and the odd rows of a random orthogonal matrix of a map's true rank.

    What pads it to the stack's rank is the identity's: it enters padded columns alone.
    """
    both = real[:, None] & real
    drawn = jnp.where(both, jax.random.normal(key, both.shape), jnp.eye(len(real)))
    q = jnp.linalg.qr(drawn)[0]
    return q[0::2], q[1::2]


def merged(params: Params, adapters: Sequence[Adapter]) -> Params:
    """The base's tree with the adapters' effect in its weights: traceable; float32 arithmetic."""
    out = {name: value for name, value in params.items() if name != KEY}
    for adapter in adapters:
        own = params[KEY][adapter.name]
        for target in adapter.targets:
            path = (*target.path, "kernel")
            leaves = _leaves(own, target)

            def one(now: Array, kernel: Array, leaves: Params) -> Array:
                parts = leaves["a"], leaves["b"], leaves["scale"]
                whole = now.astype(jnp.float32) + delta(*parts)
                if "magnitude" in leaves:
                    whole = gain(leaves["magnitude"], kernel, *parts) * whole
                return whole.astype(now.dtype)

            kernel = _each(target, one)(get(out, path)[...], get(params, path)[...], leaves)
            out = with_entry(out, path, kernel)
        for path in adapter.saved:
            out = with_entry(out, path, get(own, path).astype(get(out, path)[...].dtype))
    return out


def changed_paths(adapters: Sequence[Adapter]) -> list[Path]:
    """The leaves of the base that `merged` changes."""
    targets = [(*t.path, "kernel") for adapter in adapters for t in adapter.targets]
    return list(dict.fromkeys([*targets, *(p for adapter in adapters for p in adapter.saved)]))
