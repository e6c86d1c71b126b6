"""One row per kind of tensor: where it lies in our tree and what it is called in a checkpoint.

The same row is read in both directions (load and save). A tensor of a checkpoint is ours with the
axes regrouped: `groups[i]` lists which of our axes make up axis i of theirs, in order. So an output
projection, ours [h e d], theirs [d, h*e], has `groups=((2,), (0, 1))`; a transpose is ((1,), (0,)).

Where a checkpoint fuses several of our tensors into one (q, k and v; gate and up), each of ours has
its own row with the same name, and `part` says which stripes of theirs it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from jrlhf.models.encoder_spec import AnySpec
from jrlhf.models.spec import DecoderSpec

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """The stripes of a fused tensor that one of our tensors is.

    Axis `axis` of theirs is [outer, total]; ours is [:, start : start + size]. One after the other:
    outer = 1. Per head (GPT-NeoX): outer = heads. Element by element: size = 1.
    """

    axis: int
    outer: int
    start: int
    size: int
    total: int

    def split(self, sizes: list[int], index: list[slice]) -> tuple[list[int], list[slice]]:
        """Axis `axis` of theirs, split: its sizes, and where the slice `index` of ours lies.

        Args:
            sizes: of our axes that make it up; the first of them count the stripes.
            index: a slice of each.
        """
        count = next(i for i in range(len(sizes) + 1) if math.prod(sizes[:i]) == self.outer)
        if count == len(sizes):  # stripes of one entry
            return [*sizes, self.total], [*index, slice(self.start, self.start + 1)]
        inner = math.prod(sizes[count + 1 :])
        start, stop, _ = index[count].indices(sizes[count])
        first = self.start // inner
        return (
            [*sizes[:count], self.total // inner, *sizes[count + 1 :]],
            [*index[:count], slice(first + start, first + stop), *index[count + 1 :]],
        )

    def pick(self, array: Any) -> Any:
        """Our stripes of a block of theirs that holds whole stripes."""
        shape = array.shape
        split = array.reshape(*shape[: self.axis], -1, self.total, *shape[self.axis + 1 :])
        index = (slice(None),) * (self.axis + 1) + (slice(self.start, self.start + self.size),)
        return split[index].reshape(*shape[: self.axis], -1, *shape[self.axis + 1 :])

    def put(self, whole: Any, ours: Any) -> None:
        """Writes our stripes into a tensor of theirs (numpy, in place)."""
        shape = whole.shape
        split = whole.reshape(*shape[: self.axis], self.outer, self.total, *shape[self.axis + 1 :])
        index = (slice(None),) * (self.axis + 1) + (slice(self.start, self.start + self.size),)
        split[index] = ours.reshape(split[index].shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A kind of tensor.

    Attributes:
        path: keys in the params tree; for a layered weight the stack's key is "layers" here and
            becomes "trunk" for the frozen lower layers (see `places`).
        name: name in the checkpoint, with "{layer}" where the layer's number goes and "{expert}"
            where the expert's does.
        shape: our shape, without the stacked axes.
        groups: see the module docstring.
        part: which stripes of a fused tensor it is.
        optional: a checkpoint may lack it (a head that is new): it is then initialised.
        layers: numbers of the layers that have it, None for all; our stack keeps the others' place.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    optional: bool = False
    part: Part | None = None
    layers: tuple[int, ...] | None = None

    @property
    def layered(self) -> bool:
        """Whether there is one such tensor per layer, stacked along a first axis of ours."""
        return "{layer}" in self.name

    @property
    def inside(self) -> tuple[slice, ...]:
        """What of our array a checkpoint holds; beyond it lies padding of the vocabulary."""
        return tuple(slice(size) for size in self.shape)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint; of the whole tensor where it is fused."""
        shape = list(self._own_shape(self.shape))
        if self.part is not None:
            shape[self.part.axis] = self.part.outer * self.part.total
        return tuple(shape)

    def _own_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Our shape in the checkpoint's layout, without what it is fused with."""
        return tuple(math.prod(shape[axis] for axis in group) for group in self.groups)

    def to_hf(self, array: Any) -> Any:
        """Our array (one layer's slice) in the checkpoint's layout, for `part.put` if fused."""
        turned = array[self.inside].transpose(tuple(itertools.chain(*self.groups)))
        return turned.reshape(self._own_shape(self.shape))

    def from_hf(self, array: Any, shape: tuple[int, ...] | None = None) -> Any:
        """A checkpoint's array in our layout; `shape` is ours, for a part read by `view`."""
        shape = self.shape if shape is None else shape
        if array.size != math.prod(shape):  # fused with others
            assert self.part is not None
            array = self.part.pick(array)
        order = tuple(itertools.chain(*self.groups))
        split = array.reshape(tuple(shape[axis] for axis in order))
        return split.transpose(tuple(order.index(axis) for axis in range(len(order))))

    def view(self, index: tuple[slice, ...]) -> tuple[tuple[int, ...], tuple[slice, ...]]:
        """Where the slice `index` of ours lies in the checkpoint.

        Returns:
            The shape of theirs with every merged axis split into ours, a fused one into its
            stripes, and the slice of that. It holds the wanted entries and no others.
        """
        sizes: list[int] = []
        slices: list[slice] = []
        for at, group in enumerate(self.groups):
            own = [self.shape[axis] for axis in group]
            cut = [index[axis] for axis in group]
            if self.part is not None and self.part.axis == at:
                own, cut = self.part.split(own, cut)
            sizes += own
            slices += cut
        return tuple(sizes), tuple(slices)

    def places(self, spec: AnySpec) -> Iterator[tuple[str, Path, int | tuple[int, int] | None]]:
        """Yields (checkpoint name, path in params, index along the stacked axes).

        The index is None for a tensor that is not stacked, the layer in its stack, or with one
        tensor per expert (layer, expert).
        """
        if not self.layered:
            yield self.name, self.path, None
            return
        for layer in range(spec.num_hidden_layers) if self.layers is None else self.layers:
            path, at = self.path, layer - spec.trunk_layers
            if layer < spec.trunk_layers:
                path, at = ("trunk", *self.path[1:]), layer
            if "{expert}" not in self.name:
                yield self.name.format(layer=layer), path, at
                continue
            assert isinstance(spec, DecoderSpec)
            assert spec.moe is not None
            for expert in range(spec.moe.num_experts):
                yield self.name.format(layer=layer, expert=expert), path, (at, expert)


def vector(
    path: Path, name: str, *shape: int, optional: bool = False, part: Part | None = None
) -> Weight:
    """A bias or a norm's scale; theirs is flat."""
    groups = (tuple(range(len(shape))),)
    return Weight(path=path, name=name, shape=shape, groups=groups, optional=optional, part=part)


def array(path: Path, name: str, *shape: int, part: Part | None = None) -> Weight:
    """A tensor that is theirs as it is ours."""
    groups = tuple((axis,) for axis in range(len(shape)))
    return Weight(path=path, name=name, shape=shape, groups=groups, part=part)


def matrix(
    path: Path,
    name: str,
    *shape: int,
    inputs: int = 1,
    optional: bool = False,
    turned: bool = True,
    part: Part | None = None,
) -> Weight:
    """A linear map: ours [inputs..., outputs...].

    Theirs is [outputs, inputs] (torch's Linear), or [inputs, outputs] where not `turned` (Conv1D).
    """
    axes = tuple(range(len(shape)))
    groups = (axes[inputs:], axes[:inputs]) if turned else (axes[:inputs], axes[inputs:])
    return Weight(path=path, name=name, shape=shape, groups=groups, optional=optional, part=part)
