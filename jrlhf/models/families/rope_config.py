"""Reads and writes the rotary parameters of a config.json, of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.spec import RopeSpec

_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read_rope(config: Mapping[str, Any], *, default_theta: float = 10000.0) -> RopeSpec:
    """Reads `rope_parameters` (5), else `rope_scaling` beside `rope_theta` (4).

    As in transformers, a `rope_scaling` that is set wins over `rope_parameters`, `type` is an old
    name of `rope_type`, and llama3's original length defaults to `max_position_embeddings`.

    Raises:
        UnsupportedModelError: an unknown type, a partial rotation, or a key that the type needs.
    """
    raw = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope_type = raw.get("rope_type") or raw.get("type") or "default"
    theta = raw.get("rope_theta") or config.get("rope_theta") or default_theta
    if any(isinstance(value, Mapping) for value in raw.values()):
        raise UnsupportedModelError("rope_parameters per layer type are not implemented.")
    partial = raw.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"partial_rotary_factor={partial} is not implemented.")
    # An unknown type is refused by RopeSpec itself, before its keys are looked for.
    base = RopeSpec(rope_type=str(rope_type), rope_theta=float(theta))
    missing = [key for key in _NEEDED.get(base.rope_type, ()) if raw.get(key) is None]
    if missing:
        raise UnsupportedModelError(
            f"rope_type {base.rope_type!r} needs {', '.join(missing)} in rope_parameters."
        )
    if base.rope_type == "default":
        return base
    if base.rope_type == "linear":
        return RopeSpec(rope_type="linear", rope_theta=float(theta), factor=float(raw["factor"]))
    original = (
        config.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or config.get("max_position_embeddings")
        or RopeSpec.original_max_position_embeddings
    )
    return RopeSpec(
        rope_type="llama3",
        rope_theta=float(theta),
        factor=float(raw["factor"]),
        low_freq_factor=float(raw["low_freq_factor"]),
        high_freq_factor=float(raw["high_freq_factor"]),
        original_max_position_embeddings=int(original),
    )


def write_rope(rope: RopeSpec) -> dict[str, Any]:
    """The value of `rope_parameters` in a config.json."""
    values: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}
    for key in _NEEDED.get(rope.rope_type, ()):
        values[key] = getattr(rope, key)
    if rope.rope_type == "llama3":
        values["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return values
