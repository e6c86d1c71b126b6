"""Which mesh axis a logical axis is cut over: the only place that knows both kinds of name."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jrlhf.errors import MeshError, suggest
from jrlhf.models.axes import ArrayFunction, Axes, resolve_with
from jrlhf.ops.layout import platform_of
from jrlhf.sharding.mesh import AXES, BATCH_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The mesh axes of each logical axis, () for none.

    In the notation of the scaling book: attention's query weight is q[D_fsdp, H_tensor, E], an
    activation x[B_(data,fsdp), S_sequence, D].
    """

    batch: tuple[str, ...] = BATCH_AXES
    sequence: tuple[str, ...] = ("sequence",)
    layers: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            for name in getattr(self, field.name):
                if name not in AXES:
                    raise MeshError(
                        f"The rule {field.name} names {name!r}, which is no mesh axis "
                        f"({', '.join(AXES)}).{suggest(str(name), AXES)}"
                    )

    def of(self, name: str) -> tuple[str, ...]:
        """The mesh axes of one logical axis; MeshError for an unknown one."""
        known = [field.name for field in dataclasses.fields(self)]
        if name not in known:
            raise MeshError(
                f"No rule for the logical axis {name!r}; rules exist for {', '.join(known)}."
                + suggest(name, known)
            )
        return getattr(self, name)


DEFAULT = Rules()


def spec_for(axes: Axes, shape: Sequence[int], mesh: Mesh, rules: Rules = DEFAULT) -> PartitionSpec:
    """The layout of one array.

    Mesh axes of size 1 and trailing Nones are left out, so that equal layouts compare equal (jit
    compiles again for a spec that is merely written differently).

    Args:
        axes: logical name of each dimension, None where it is never cut.
        shape: sizes of the dimensions. One that does not divide over its mesh axes is cut over as
            many of them, from the left, as divide it.
        mesh: the mesh.
        rules: logical to mesh axes.

    Raises:
        MeshError: two dimensions claim the same mesh axis, or a logical name has no rule.
    """
    if len(axes) != len(shape):
        raise MeshError(f"{len(axes)} axis names {axes} for an array of shape {tuple(shape)}.")
    owner: dict[str, str] = {}
    parts: list[str | tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        wanted = () if name is None else rules.of(name)
        for axis in wanted:
            if axis in owner:
                raise MeshError(
                    f"Both {owner[axis]!r} and {name!r} of {axes} are cut over mesh axis {axis!r}; "
                    f"an array can be cut over it only once."
                )
            owner[axis] = str(name)
        used = _dividing([axis for axis in wanted if mesh.shape[axis] > 1], size, mesh)
        parts.append(None if not used else used[0] if len(used) == 1 else tuple(used))
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def _dividing(axes: list[str], size: int, mesh: Mesh) -> list[str]:
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


@dataclasses.dataclass(frozen=True)
class MeshShards:
    """A mesh, as far as a kernel must know it (`models.axes.Shards`)."""

    mesh: Mesh
    rules: Rules = DEFAULT

    @property
    def platform(self) -> str:
        """As `ops.layout.platform_of`; also of a topology, of which no device is here."""
        return platform_of(self.mesh.devices.flat[0])

    def cuts(self, axis: str, size: int) -> int:
        """Into how many parts an axis of this name and size is cut."""
        wanted = [name for name in self.rules.of(axis) if self.mesh.shape[name] > 1]
        return math.prod(self.mesh.shape[name] for name in _dividing(wanted, size, self.mesh))

    def map(self, function: ArrayFunction, inputs: tuple[Axes, ...]) -> ArrayFunction:
        """`function` on every device's parts; see `models.axes.per_shard`."""
        if self.mesh.size == 1:
            return function

        def run(*arrays: jax.Array) -> jax.Array:
            specs = tuple(
                spec_for(axes, x.shape, self.mesh, self.rules)
                for axes, x in zip(inputs, arrays, strict=True)
            )
            cut = jax.shard_map(
                function, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False
            )
            return cut(*arrays)

        return run


@contextlib.contextmanager
def activate(mesh: Mesh | None, rules: Rules = DEFAULT) -> Iterator[None]:
    """Gives `models.axes.constrain` its meaning while functions are traced in this block.

    A jitted function keeps what it was traced under: put the block inside the function. With mesh
    None, or one device, constraints mean nothing.
    """
    if mesh is None:
        with resolve_with(None):
            yield
        return
    shards = MeshShards(mesh, rules)
    if mesh.size == 1:
        with resolve_with(None, shards):
            yield
        return

    def resolver(x: jax.Array, axes: Axes) -> jax.Array:
        sharding = NamedSharding(mesh, spec_for(axes, x.shape, mesh, rules))
        return jax.lax.with_sharding_constraint(x, sharding)

    with resolve_with(resolver, shards):
        yield
