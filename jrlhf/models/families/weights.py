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

    def index(self, start: int, stop: int) -> slice:
        """Where entries start .. stop of ours lie on their axis, perhaps among others.

        Raises:
            ValueError: they are parts of several stripes.
        """
        stripe, first = divmod(start, self.size)
        if first + stop - start <= self.size:  # of one stripe
            at = stripe * self.total + self.start + first
            return slice(at, at + stop - start)
        if first or stop % self.size:
            raise ValueError(f"{start}:{stop} cuts stripes of {self.size}.")
        return slice(stripe * self.total, stop // self.size * self.total)


class CutInsideError(Exception):
    """A slice of ours is several rectangles of theirs: one for each entry of an axis, or more.

    Attributes:
        axis: that axis of ours.
    """

    def __init__(self, axis: int) -> None:
        super().__init__(f"axis {axis} must be gone along entry by entry")
        self.axis = axis


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
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    optional: bool = False
    part: Part | None = None

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
        """A checkpoint's array in our layout; `shape` is ours, for a slice of the whole."""
        shape = self.shape if shape is None else shape
        if self.part is not None and array.shape != self._own_shape(shape):
            array = self.part.pick(array)
        order = tuple(itertools.chain(*self.groups))
        split = array.reshape(tuple(shape[axis] for axis in order))
        return split.transpose(tuple(order.index(axis) for axis in range(len(order))))

    def hf_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of the checkpoint's tensor that holds the slice `index` of ours.

        Of a fused tensor whose stripes lie between others' it holds these too; `from_hf` drops
        them.

        Raises:
            CutInsideError: that slice is no single rectangle there.
        """
        whole = []
        for at, group in enumerate(self.groups):
            start, stop = 0, 1  # along the merged axis, as far as its axes are gone through
            outer = None  # the first axis of which more than one entry is wanted
            for axis in group:
                size = self.shape[axis]
                first, last, _ = index[axis].indices(size)
                if outer is not None and (first, last) != (0, size):
                    raise CutInsideError(outer)
                start, stop = start * size + first, (stop - 1) * size + last
                outer = axis if outer is None and last - first > 1 else outer
            part = self.part if self.part is not None and self.part.axis == at else None
            try:
                whole.append(slice(start, stop) if part is None else part.index(start, stop))
            except ValueError:
                assert outer is not None
                raise CutInsideError(outer) from None
        return tuple(whole)

    def places(self, spec: AnySpec) -> Iterator[tuple[str, Path, int | tuple[int, int] | None]]:
        """Yields (checkpoint name, path in params, index along the stacked axes).

        The index is None for a tensor that is not stacked, the layer in its stack, or with one
        tensor per expert (layer, expert).
        """
        if not self.layered:
            yield self.name, self.path, None
            return
        for layer in range(spec.num_hidden_layers):
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
