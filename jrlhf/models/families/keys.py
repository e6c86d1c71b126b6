"""Keys of a config.json and fields of a spec: one table per family, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jrlhf.errors import ModelError, UnsupportedModelError, suggest
from jrlhf.models.spec import DecoderSpec

# Field of the spec -> (key of config.json, its value where the key is absent or null).
Keys = Mapping[str, tuple[str, Any]]

# transformers' names -> ours. The exact gelu and its tanh approximation differ; keep them apart.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
FULL, SLIDING = "full_attention", "sliding_attention"


def with_defaults(keys: Keys, **defaults: Any) -> dict[str, tuple[str, Any]]:
    """The same keys with other values for absence, by field of the spec."""
    return {**keys, **{field: (keys[field][0], value) for field, value in defaults.items()}}


def read_keys(config: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """The spec's fields that a table of keys decides, and the number of labels.

    Raises:
        UnsupportedModelError: quantized weights, or an activation that is not implemented.
    """
    refuse(config, "quantization_config", (None,), "load the weights that are not quantized")
    fields: dict[str, Any] = {}
    for field, (name, default) in keys.items():
        value = config.get(name)
        if value is None:
            value = default
        fields[field] = _as(name, value, type(default))
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = int(fields.get("num_key_value_heads") or heads)
    fields["head_dim"] = int(fields.get("head_dim") or fields["hidden_size"] // heads)
    fields["hidden_act"] = activation(keys["hidden_act"][0], fields["hidden_act"])
    fields["num_labels"] = count_labels(config)
    return fields


def count_labels(config: Mapping[str, Any]) -> int:
    """`num_labels`, which wins as in transformers, else the number of names; 2 without either."""
    count = config.get("num_labels")
    return len(config.get("id2label") or (0, 1)) if count is None else int(count)


def _as(name: str, value: Any, kind: type) -> Any:
    """A key's value in the kind of its default, if it loses nothing by it."""
    if value is None or kind is type(None) or type(value) is kind:
        return value
    if kind is str:  # what knows the names will judge it
        return str(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (kind is float and number) or (kind is int and number and float(value).is_integer()):
        return kind(value)
    raise ModelError(f"config.json: {name}={value!r} must be {kind.__name__}.")


def activation(key: str, name: str) -> str:
    """Our name of an activation.

    Raises:
        UnsupportedModelError: it is not implemented.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise UnsupportedModelError(
            f"{key}={name!r} is not implemented; known: {known}." + suggest(str(name), ACTIVATIONS)
        )
    return ACTIVATIONS[name]


def refuse(config: Mapping[str, Any], key: str, fine: Sequence[Any], hint: str) -> None:
    """Raises UnsupportedModelError where a key has a value whose meaning is not implemented."""
    value = config.get(key, fine[0])
    if value not in fine:
        known = " or ".join(repr(one) for one in fine)
        raise UnsupportedModelError(f"{key}={value!r} is not implemented, only {known}: {hint}.")


def write_keys(spec: DecoderSpec, keys: Keys, architectures: Mapping[str, str]) -> dict[str, Any]:
    """config.json's keys of a table, the model's type, its architecture and its labels.

    Args:
        spec: the model.
        keys: the family's table.
        architectures: transformers' class of each head.
    """
    config: dict[str, Any] = {
        "model_type": spec.model_type,
        "architectures": [architectures[spec.head]],
    }
    for field, (name, _) in keys.items():
        config[name] = getattr(spec, field)
    act = keys["hidden_act"][0]
    config[act] = _ACTIVATION_NAMES[spec.hidden_act]
    if act == "activation_function" and spec.hidden_act == "gelu_tanh":
        config[act] = "gelu_new"  # what GPT-2 and its kin call it; it rounds otherwise
    if spec.head != "causal":
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(spec.num_labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(spec.num_labels)}
    return config


def classes(stem: str, **others: str) -> dict[str, str]:
    """transformers' class of each head, where their names begin alike."""
    return {
        "causal": f"{stem}ForCausalLM",
        "classifier": f"{stem}ForSequenceClassification",
        "tokens": f"{stem}ForTokenClassification",
        **others,
    }


def read_windows(
    config: Mapping[str, Any], layers: int, types: Sequence[str], *, default: int | None = None
) -> tuple[int, ...]:
    """The spec's windows from `sliding_window` and the type of each layer.

    Args:
        config: config.json; its `layer_types` win over `types`.
        layers: how many there are.
        types: the layers' types where the config does not say.
        default: the window where the config does not say.

    Raises:
        UnsupportedModelError: a layer type that is not implemented.
    """
    types = config.get("layer_types") or types
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise UnsupportedModelError(
            f"layer_types has {', '.join(unknown)}; known: {FULL}, {SLIDING}."
        )
    window = config.get("sliding_window", default)
    windows = tuple(int(window or 0) if kind == SLIDING else 0 for kind in types[:layers])
    return windows if any(windows) else ()


def layer_types(spec: DecoderSpec) -> list[str]:
    """`layer_types` of a config.json."""
    windows = spec.windows or (0,) * spec.num_hidden_layers
    return [SLIDING if window else FULL for window in windows]


def window_of(spec: DecoderSpec) -> int | None:
    """`sliding_window` of a config.json, which has one for all layers."""
    sizes = sorted({window for window in spec.windows if window})
    if len(sizes) > 1:
        raise UnsupportedModelError(f"windows {sizes}: a config.json can hold one size only.")
    return sizes[0] if sizes else None
