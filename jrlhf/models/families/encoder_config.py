"""What the configs of all encoder families have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.families import keys

# transformers' names -> ours. The exact gelu and its tanh approximation differ; keep them apart.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def activation(config: Mapping[str, Any], key: str, default: str = "gelu") -> str:
    """Our name of an activation.

    Raises:
        UnsupportedModelError: an unknown one.
    """
    name = config.get(key) or default
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise UnsupportedModelError(f"{key}={name!r} is not implemented; known: {known}.")
    return _ACTIVATIONS[name]


def activation_name(name: str) -> str:
    """transformers' name of one of our activations."""
    return _NAMES.get(name, name)


def refuse(config: Mapping[str, Any], **plain: tuple[Any, str]) -> None:
    """Refuses quantized weights, and keys that are set to anything but their plain value.

    Args:
        config: config.json.
        **plain: key = (the one value that is implemented, why no other is).

    Raises:
        UnsupportedModelError: the first key that is set otherwise, and the value that it may have.
    """
    keys.refuse(config, "quantization_config", (None,), "load the weights that are not quantized")
    for key, (value, why) in plain.items():
        keys.refuse(config, key, (value, None), why)


def sizes(config: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, Any]:
    """Whole numbers of a config, a family's defaults where a key is absent."""
    return {key: int(config.get(key, value)) for key, value in defaults.items()}


def heads(hidden_size: int, count: int) -> dict[str, Any]:
    """The heads of a spec.

    Raises:
        UnsupportedModelError: heads that do not divide the hidden size.
    """
    if hidden_size % count:
        raise UnsupportedModelError(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={count}."
        )
    return {"num_attention_heads": count, "head_dim": hidden_size // count}


def common(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every family says alike; 2 labels where the config names none, as transformers."""
    return {
        "initializer_range": float(config.get("initializer_range", 0.02)),
        "num_labels": keys.count_labels(config),
    }


def shared(spec: EncoderSpec, architecture: str) -> dict[str, Any]:
    """Keys that every family writes under the same name."""
    return {
        "model_type": spec.model_type,
        "architectures": [architecture],
        "vocab_size": spec.vocab_size,
        "initializer_range": spec.initializer_range,
        "id2label": {str(i): f"LABEL_{i}" for i in range(spec.num_labels)},
        "label2id": {f"LABEL_{i}": i for i in range(spec.num_labels)},
    }
