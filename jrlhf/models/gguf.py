"""Reads llama.cpp's GGUF files: weights of any quantization, and what config.json would say.

llama.cpp's converter changes weights in two ways, which are undone here: of `llama` it interleaves
the rows of q and k, of Gemma it adds 1 to every norm's scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.errors import ModelError, UnsupportedModelError
from jrlhf.models.families.keys import FULL, SLIDING
from jrlhf.models.gguf_file import GGUFFile, GGUFTensor
from jrlhf.models.glassllm import unpermute_rows

# Hugging Face's names on the left; {} is the layer. Each also exists with ".bias".
_LAYER = {
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
_SANDWICH = {
    "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
    "model.layers.{}.pre_feedforward_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm",
}
_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp writes one family.

    Attributes:
        config: the keys of config.json that other families do not have, from the metadata.
        layer: Hugging Face's names of what a layer holds -> theirs.
        interleaved: whether rows of q and k are in llama.cpp's order.
        norm_offset: what was added to the norms' scales.
    """

    config: Callable[[GGUFFile, Mapping[str, Any]], dict[str, Any]]
    layer: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0


class GGUFCheckpoint:
    """A GGUF file under Hugging Face's names and in its layout."""

    kind: str = "gguf"

    def __init__(self, path: Path) -> None:
        """Maps the file into memory and reads its metadata.

        Raises:
            ModelError: the file is damaged.
            UnsupportedModelError: an architecture or rotary scaling that is not implemented.
        """
        self.path = path
        file = GGUFFile(path)
        arch = file.need("general.architecture")
        if arch not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path} has architecture {arch!r}; of GGUF files are implemented:"
                f" {', '.join(ARCHITECTURES)}."
            )
        self._architecture = ARCHITECTURES[arch]
        self.config: Mapping[str, Any] = _config(file, self._architecture)
        self.generation_config: Mapping[str, Any] | None = _generation_config(file)
        self._tensors = self._rename(file.tensors)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensor.shape for name, tensor in self._tensors.items()
        }

    def _rename(self, tensors: Mapping[str, GGUFTensor]) -> dict[str, GGUFTensor]:
        theirs = dict(_TOP)
        for layer in range(self.config["num_hidden_layers"]):
            theirs |= {
                ours.format(layer): name.format(layer)
                for ours, name in self._architecture.layer.items()
            }
        ours = {name: hf for hf, name in theirs.items()}
        renamed = {}
        for name, tensor in tensors.items():
            stem, _, kind = name.rpartition(".")
            if name != _ROPE_FREQS:  # already in the config
                renamed[f"{ours[stem]}.{kind}" if stem in ours else name] = tensor
        return renamed

    def read(
        self, name: str, index: tuple[slice, ...], shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        stored = self.shapes[name]
        shape = stored if shape is None else shape
        # The axes that our rows are split into.
        lead = next(i for i in range(1, len(shape) + 1) if math.prod(shape[:i]) == stored[0])
        rows = np.arange(stored[0]).reshape(shape[:lead])[index[:lead]]
        found = re.search(r"\.([qk])_proj\.", name) if self._architecture.interleaved else None
        if found:
            key = "num_attention_heads" if found[1] == "q" else "num_key_value_heads"
            rows = unpermute_rows(self.config[key], stored[0])[rows]
        tensor = self._tensors[name]
        if len(stored) == 1:
            values = tensor.read(slice(None))[rows]
            return values - self._architecture.norm_offset if "norm" in name else values
        # Quantized blocks lie along the last axis: rows can be picked before dequantizing.
        values = tensor.read(rows.ravel()).reshape(*rows.shape, *shape[lead:])
        return values[(slice(None),) * lead + index[lead:]]


def _config(metadata: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """What config.json would say."""
    tensors = metadata.tensors
    arch = metadata.need("general.architecture")
    if metadata.get(f"{arch}.expert_count"):
        raise UnsupportedModelError(f"{metadata.path} is a mixture of experts.")
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedModelError(f"{metadata.path} is one part of several; merge them first.")
    hidden = metadata.integer(f"{arch}.embedding_length")
    heads = metadata.integer(f"{arch}.attention.head_count")
    head_dim = metadata.integer(f"{arch}.attention.key_length", hidden // heads)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{metadata.path} has no token_embd.weight.")
    layers = metadata.integer(f"{arch}.block_count")
    if not 0 < layers <= len(tensors):
        raise ModelError(
            f"{metadata.path} has {arch}.block_count={layers} and {len(tensors)} tensors."
        )
    config = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer(f"{arch}.context_length"),
        "rms_norm_eps": _short(metadata.need(f"{arch}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return config | architecture.config(metadata, config) | _token_ids(metadata)


def _llama(metadata: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_parameters": _rope(metadata, head_dim=config["head_dim"]),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in metadata.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in metadata.tensors,
    }


def _qwen2(metadata: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_parameters": _rope(metadata, head_dim=config["head_dim"]),
        "hidden_act": "silu",
        "use_sliding_window": False,  # llama.cpp has none either
    }


def _qwen3(metadata: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    bias = "blk.0.attn_q.bias" in metadata.tensors
    own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": bias}
    return _qwen2(metadata, config) | own


def _gemma3(metadata: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    window = metadata.integer("gemma3.attention.sliding_window", 0)
    # One layer in six reads everything; without a window every one does.
    pattern = metadata.integer("gemma3.attention.sliding_window_pattern", 6) if window else 1
    local_theta = _short(metadata.get("gemma3.rope.freq_base_swa", 10000.0))
    # Only the largest divides queries by something else than the size of its heads.
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else head_dim
    cap = metadata.get("gemma3.final_logit_softcapping")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_parameters": {
            FULL: _rope(metadata, head_dim=head_dim, default_theta=1e6),
            SLIDING: {"rope_type": "default", "rope_theta": local_theta},
        },
        "layer_types": [SLIDING if (i + 1) % pattern else FULL for i in range(layers)],
        **({"sliding_window": window} if window else {}),
        "query_pre_attn_scalar": scalar,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "final_logit_softcapping": None if cap is None else _short(cap),
    }


ARCHITECTURES = {
    "llama": Architecture(config=_llama, layer=_LAYER, interleaved=True),
    "qwen2": Architecture(config=_qwen2, layer=_LAYER),
    "qwen3": Architecture(config=_qwen3, layer=_LAYER),
    "gemma3": Architecture(config=_gemma3, layer=_LAYER | _SANDWICH, norm_offset=1.0),
}


def _token_ids(metadata: GGUFFile) -> dict[str, int]:
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {hf: metadata.get(f"tokenizer.ggml.{name}_token_id") for name, hf in keys.items()}
    return {key: int(value) for key, value in found.items() if value is not None}


def _generation_config(metadata: GGUFFile) -> dict[str, Any]:
    """The special tokens; a separate end-of-turn token also ends a completion."""
    config: dict[str, Any] = dict(_token_ids(metadata))
    turn = metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != config.get("eos_token_id"):
        config["eos_token_id"] = [*([config["eos_token_id"]] if "eos_token_id" in config else [])]
        config["eos_token_id"].append(int(turn))
    return config


def _short(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(metadata: GGUFFile, *, head_dim: int, default_theta: float = 10000.0) -> dict[str, Any]:
    """`rope_parameters` as config.json writes them."""
    own = f"{metadata.need('general.architecture')}.rope"
    theta = _short(metadata.get(f"{own}.freq_base", default_theta))
    rotated = metadata.integer(f"{own}.dimension_count", head_dim)
    if rotated != head_dim:
        raise UnsupportedModelError(f"{metadata.path} rotates {rotated} of {head_dim} dimensions.")
    kind = metadata.get(f"{own}.scaling.type", "none")
    if kind in ("linear", "yarn"):
        factor = _short(metadata.need(f"{own}.scaling.factor"))
        scaled = {"rope_type": kind, "rope_theta": theta, "factor": factor}
        if kind == "yarn":
            length = metadata.integer(f"{own}.scaling.original_context_length")
            scaled["original_max_position_embeddings"] = length
        return scaled
    if kind != "none":
        raise UnsupportedModelError(f"{metadata.path} has rotary scaling {kind!r}.")
    if _ROPE_FREQS not in metadata.tensors:
        return {"rope_type": "default", "rope_theta": theta}
    divisors = metadata.tensors[_ROPE_FREQS].read(slice(None))
    return _llama3_rope(divisors, theta=theta, head_dim=head_dim)


def _llama3_rope(divisors: np.ndarray, *, theta: float, head_dim: int) -> dict[str, Any]:
    """Recovers llama3's parameters from the divisors of the frequencies that llama.cpp stores.

    Every released model has the same low, high and original length; only the factor differs, and
    it is the largest divisor. The guess is checked against all divisors.

    Raises:
        UnsupportedModelError: they follow another rule.
    """
    factor, low, high, original = _short(divisors.max()), 1.0, 4.0, 8192
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = original * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UnsupportedModelError(f"{_ROPE_FREQS} holds rotary factors that are not llama3's.")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
