"""One row per kind of tensor: where it lies in our tree and what it is called in a checkpoint.

The same row is read in both directions (load and save). A tensor of a checkpoint is ours with the
axes regrouped: `groups[i]` lists which of our axes make up axis i of theirs, in order. So an output
projection, ours [h e d], theirs [d, h*e], has `groups=((2,), (0, 1))`; a transpose is ((1,), (0,)).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from jrlhf.models.encoder_spec import AnySpec

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A kind of tensor.

    Attributes:
        path: keys in the params tree; for a layered weight the stack's key is "layers" here and
            becomes "trunk" for the frozen lower layers (see `places`).
        name: name in the checkpoint, with "{layer}" where the layer's number goes.
        shape: our shape, without the stacked axis.
        groups: see the module docstring.
        optional: a checkpoint may lack it (a head that is new): it is then initialised.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    optional: bool = False

    @property
    def layered(self) -> bool:
        """Whether there is one such tensor per layer, stacked along a first axis of ours."""
        return "{layer}" in self.name

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    def to_hf(self, array: Any) -> Any:
        """Our array (one layer's slice) in the checkpoint's layout."""
        return array.transpose(tuple(itertools.chain(*self.groups))).reshape(self.hf_shape)

    def from_hf(self, array: Any, shape: tuple[int, ...] | None = None) -> Any:
        """A checkpoint's array in our layout; `shape` is ours, for a slice of the whole."""
        shape = self.shape if shape is None else shape
        order = tuple(itertools.chain(*self.groups))
        split = array.reshape(tuple(shape[axis] for axis in order))
        return split.transpose(tuple(order.index(axis) for axis in range(len(order))))

    def hf_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of the checkpoint's tensor that holds the slice `index` of ours.

        Raises:
            ValueError: that slice is not contiguous there (a merged axis other than the outermost
                of its group is cut); the caller then reads the whole tensor.
        """
        whole = []
        for group in self.groups:
            inner = math.prod(self.shape[axis] for axis in group[1:])
            for axis in group[1:]:
                if index[axis].indices(self.shape[axis]) != (0, self.shape[axis], 1):
                    raise ValueError(f"{self.name}: axis {axis} of {self.path} is cut inside.")
            start, stop, step = index[group[0]].indices(self.shape[group[0]])
            if step != 1:
                raise ValueError(f"{self.name}: a slice with a step.")
            whole.append(slice(start * inner, stop * inner))
        return tuple(whole)

    def places(self, spec: AnySpec) -> Iterator[tuple[str, Path, int | None]]:
        """Yields (checkpoint name, path in params, index along the stacked axis or None)."""
        if not self.layered:
            yield self.name, self.path, None
            return
        for layer in range(spec.num_hidden_layers):
            name = self.name.format(layer=layer)
            if layer < spec.trunk_layers:
                yield name, ("trunk", *self.path[1:]), layer
            else:
                yield name, self.path, layer - spec.trunk_layers


def vector(path: Path, name: str, *shape: int, optional: bool = False) -> Weight:
    """A bias or a norm's scale; theirs is flat."""
    return Weight(
        path=path, name=name, shape=shape, groups=(tuple(range(len(shape))),), optional=optional
    )


def matrix(path: Path, name: str, *shape: int, inputs: int = 1, optional: bool = False) -> Weight:
    """A linear map: ours [inputs..., outputs...], theirs [outputs, inputs] (torch's order)."""
    axes = tuple(range(len(shape)))
    return Weight(
        path=path,
        name=name,
        shape=shape,
        groups=(axes[inputs:], axes[:inputs]),
        optional=optional,
    )
