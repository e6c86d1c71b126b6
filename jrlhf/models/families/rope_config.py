"""Reads and writes the rotary parameters of a config.json, of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.families.keys import FULL, SLIDING
from jrlhf.models.spec import ROPE_TYPES, RopeSpec

_NEEDED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor",),
}
# Types that know the length they were trained at, and take the factor from it if they must.
_WITH_LENGTH = ("dynamic", "yarn", "longrope", "llama3")


def read_rope(
    config: Mapping[str, Any],
    *,
    default_theta: float = 10000.0,
    default_partial: float | None = None,
) -> RopeSpec:
    """Reads `rope_parameters` (5), else `rope_scaling` beside `rope_theta` (4).

    As in transformers, a `rope_scaling` that is set wins over `rope_parameters`, `type` is an old
    name of `rope_type`, and the original length defaults to `max_position_embeddings`.

    Args:
        config: config.json.
        default_theta: where the config does not say.
        default_partial: the share of channels that are turned where the config does not say; None:
            the family turns all of them, and another share is an error.

    Raises:
        UnsupportedModelError: an unknown type, one dictionary per layer type, a share of channels
            that the family does not know, or a key that the type needs.
    """
    raw = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    nested = [key for key, value in raw.items() if isinstance(value, Mapping)]
    if nested:
        raise UnsupportedModelError(
            f"rope_parameters per layer type ({', '.join(nested)}) are not implemented for"
            f" model_type {config.get('model_type')!r}, only for gemma3_text and modernbert: give"
            " one dictionary."
        )
    return one_rope(raw, config, default_theta=default_theta, default_partial=default_partial)


def by_layer_type(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """`rope_parameters` of a family with one dictionary per layer type, and an old `rope_scaling`.

    Raises:
        UnsupportedModelError: entries that are no layer type, which transformers would not read.
    """
    given, scaling = (config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if any(isinstance(scaling.get(kind), Mapping) for kind in (FULL, SLIDING)):
        given, scaling = {**given, **scaling}, {}  # what some exports write there
    if unknown := sorted(given.keys() - {FULL, SLIDING}):
        raise UnsupportedModelError(
            f"rope_parameters of a {config.get('model_type')} model has {', '.join(unknown)}: give"
            f" a dictionary for {FULL} and one for {SLIDING}."
        )
    return given, scaling


def one_rope(
    raw: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    default_theta: float,
    default_partial: float | None = None,
) -> RopeSpec:
    """A rotation from one dictionary of rotary parameters, with the config for what it lacks."""
    rope_type = str(raw.get("rope_type") or raw.get("type") or "default")
    theta = raw.get("rope_theta") or config.get("rope_theta") or default_theta
    partial = raw.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if default_partial is None and partial not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"partial_rotary_factor={partial} is not implemented for model_type"
            f" {config.get('model_type')!r}, whose heads are turned whole."
        )
    # An unknown type is refused by RopeSpec itself, before its keys are looked for.
    values: dict[str, Any] = {
        "rope_type": rope_type,
        "rope_theta": float(theta),
        "partial_rotary_factor": float((default_partial or 1.0) if partial is None else partial),
    }
    if rope_type not in ROPE_TYPES or rope_type == "default":
        return RopeSpec(**values)
    missing = [key for key in _NEEDED[rope_type] if raw.get(key) is None]
    if missing:
        raise UnsupportedModelError(
            f"rope_type {rope_type!r} needs {', '.join(missing)} in rope_parameters."
        )
    if rope_type in _WITH_LENGTH:
        values["original_max_position_embeddings"] = _original(rope_type, raw, config)
    for key in ("factor", *_NEEDED[rope_type], *_OPTIONAL.get(rope_type, ())):
        if raw.get(key) is not None:
            values[key] = _number(raw[key])
    if "factor" not in values and rope_type in ("yarn", "longrope"):
        longest = int(config.get("max_position_embeddings") or 2048)
        values["factor"] = longest / values["original_max_position_embeddings"]
    return RopeSpec(**values)


def _original(rope_type: str, raw: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    longest = config.get("max_position_embeddings")
    if rope_type == "dynamic":
        return int(longest or 2048)
    return int(
        config.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or longest
        or RopeSpec.original_max_position_embeddings
    )


def _number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(float(one) for one in value)
    return value if isinstance(value, bool) else float(value)


def write_rope(rope: RopeSpec) -> dict[str, Any]:
    """The value of `rope_parameters` in a config.json."""
    values: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}
    if rope.partial_rotary_factor != 1.0:
        values["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.rope_type == "default":
        return values
    if rope.rope_type != "dynamic" and rope.rope_type in _WITH_LENGTH:
        values["original_max_position_embeddings"] = rope.original_max_position_embeddings
    for key in ("factor", *_NEEDED[rope.rope_type], *_OPTIONAL.get(rope.rope_type, ())):
        value = getattr(rope, key)
        if value is not None:
            values[key] = list(value) if isinstance(value, tuple) else value
    return values
