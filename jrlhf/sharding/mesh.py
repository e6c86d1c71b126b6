"""The device mesh: five named axes, from a config value to `jax.sharding.Mesh`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from jrlhf.errors import MeshError, suggest

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
# The rows of a batch are cut over these axes.
BATCH_AXES = ("data", "fsdp")
_LISTED = 12


def parse_mesh(value: str | Mapping[str, int] | None) -> dict[str, int]:
    """Reads "data=1,fsdp=4,tensor=2", or the same as a mapping.

    Args:
        value: sizes by axis name; at most one may be -1, which takes all devices that are left.
            None or "" gives {}: every device on `data`.

    Returns:
        The sizes that were given, in the order of `AXES`.

    Raises:
        MeshError: an unknown axis, an axis given twice, a size that is not a positive integer or
            -1, or two sizes of -1.
    """
    if value is None:
        return {}
    if not isinstance(value, str | Mapping):
        raise MeshError(
            f"A mesh is written as data=1,fsdp=4 or as a mapping of sizes, got {value!r}."
        )
    shape: dict[str, int] = {}
    pairs = _pairs(value) if isinstance(value, str) else value.items()
    for name, size in pairs:
        if name not in AXES:
            hint = suggest(str(name), AXES)
            raise MeshError(f"A mesh has no axis {name!r}; its axes are {', '.join(AXES)}.{hint}")
        if name in shape:
            raise MeshError(f"The mesh axis {name!r} is given twice.")
        shape[name] = _size(name, size)
    if sum(size == -1 for size in shape.values()) > 1:
        raise MeshError(f"Only one mesh axis can be -1 (fill up), got {_show(shape)}.")
    return {name: shape[name] for name in AXES if name in shape}


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, size = part.partition("=")
        if not separator:
            raise MeshError(f"{part!r} is not an axis; write for example data=1,fsdp=4,tensor=2.")
        yield name.strip(), size.strip()


def _size(name: str, size: object) -> int:
    try:
        number = int(size)  # type: ignore[call-overload]
        exact = isinstance(size, str) or number == size
    except (TypeError, ValueError):
        number, exact = 0, False
    if isinstance(size, bool) or not exact or (number < 1 and number != -1):
        raise MeshError(f"Mesh axis {name} must be a positive integer or -1, got {size!r}.")
    return number


def make_mesh(
    shape: str | Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Builds the mesh, all five axes always present (size 1 where not used).

    Args:
        shape: anything `parse_mesh` reads.
        devices: the devices to use; None: all of them, on every process.

    Returns:
        A mesh whose axes are left to the compiler (`AxisType.Auto`).

    Raises:
        MeshError: the sizes do not multiply to the number of devices. The message lists the
            factorisations of that number over the axes that were asked for.
    """
    given = parse_mesh(shape)
    count = len(jax.devices() if devices is None else devices)
    sizes = _fill(given or {"data": -1}, count)
    return jax.make_mesh(
        tuple(sizes.get(name, 1) for name in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=None if devices is None else list(devices),
    )


def _fill(shape: dict[str, int], count: int) -> dict[str, int]:
    known = math.prod(size for size in shape.values() if size != -1)
    open_axis = next((name for name, size in shape.items() if size == -1), None)
    if open_axis is not None and count % known == 0:
        return {**shape, open_axis: count // known}
    if open_axis is None and known == count:
        return shape
    asked = [name for name, size in shape.items() if size != 1] or ["data"]
    fits = factorisations(count, asked if len(asked) > 1 else ["data", *asked])
    near = sorted(fits, key=lambda fit: _distance(fit, shape))[:_LISTED]
    raise MeshError(
        f"The mesh {_show(shape)} does not fit {count} device{'s' * (count != 1)}: its sizes "
        f"multiply to {known}{', which does not divide it' if open_axis else ''}. "
        f"Nearest that fit: {'; '.join(_show(fit) for fit in near)}."
    )


def factorisations(count: int, axes: Sequence[str]) -> list[dict[str, int]]:
    """All ways to write `count` as an ordered product of one size per axis."""
    names = [name for name in AXES if name in axes]
    if len(names) == 1:
        return [{names[0]: count}]
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    return [
        {names[0]: first, **rest}
        for first in divisors
        for rest in factorisations(count // first, names[1:])
    ]


def _distance(fit: Mapping[str, int], wanted: Mapping[str, int]) -> float:
    """How far apart two shapes are, in doublings; axes left open cost nothing."""
    return sum(
        abs(math.log2(size / wanted.get(name, 1)))
        for name, size in fit.items()
        if wanted.get(name, 1) != -1
    )


def _show(shape: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in shape.items())


def data_shards(mesh: Mesh) -> int:
    """The number of shards that the rows of a batch are cut into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def check_batch(rows: int, mesh: Mesh, *, accumulate: int = 1, what: str = "batch") -> None:
    """Raises MeshError unless `rows` divides evenly over data shards and micro-batches."""
    shards = data_shards(mesh)
    unit = shards * accumulate
    if rows > 0 and rows % unit == 0:
        return
    below, above = rows // unit * unit, (rows // unit + 1) * unit
    near = f"{below} or {above}" if below else f"{above}"
    parts = " × ".join(f"{name}={mesh.shape[name]}" for name in BATCH_AXES)
    micro = f" × {accumulate} micro-batches" if accumulate > 1 else ""
    raise MeshError(
        f"A {what} of {rows} rows does not divide over {parts}{micro} = {unit}. "
        f"Nearest sizes that do: {near}."
    )
