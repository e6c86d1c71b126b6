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

from jrlhf.errors import JrlhfError, ModelError, UnsupportedModelError
from jrlhf.models.families.keys import FULL, SLIDING
from jrlhf.models.gguf_file import GGUFFile, GGUFTensor, shortest
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
# Keys below {arch}.rope.scaling that are read here, or change no number.
_SCALING = {"type", "factor", "original_context_length", "finetuned",
            "yarn_beta_fast", "yarn_beta_slow"}  # fmt: skip


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
            ModelError: the file is damaged, or a value is of another kind than its key wants.
            UnsupportedModelError: an architecture or rotary scaling that is not implemented.
        """
        self.path = path
        file = GGUFFile(path)
        arch = file.text("general.architecture")
        if arch not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path} has architecture {arch!r}; of GGUF files are implemented:"
                f" {', '.join(ARCHITECTURES)}."
            )
        self._architecture = ARCHITECTURES[arch]
        self.config: Mapping[str, Any] = _read(file, self._architecture)
        vocabulary = self.config["vocab_size"]
        self.generation_config: Mapping[str, Any] | None = _generation_config(file, vocabulary)
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


def _read(metadata: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    try:
        return _config(metadata, architecture)
    except JrlhfError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"{metadata.path} has metadata that make no config ({error}); convert it again."
        ) from error


def _config(metadata: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """What config.json would say."""
    tensors = metadata.tensors
    arch = metadata.text("general.architecture")
    if metadata.integer(f"{arch}.expert_count", 0, least=0):
        raise UnsupportedModelError(f"{metadata.path} is a mixture of experts.")
    if metadata.integer("split.count", 1, least=0) > 1:
        raise UnsupportedModelError(f"{metadata.path} is one part of several; merge them first.")
    hidden = metadata.integer(f"{arch}.embedding_length")
    heads = metadata.integer(f"{arch}.attention.head_count")
    head_dim = metadata.integer(f"{arch}.attention.key_length", hidden // heads)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{metadata.path} has no token_embd.weight.")
    layers = metadata.integer(f"{arch}.block_count", least=0)
    if not 0 < layers <= len(tensors):
        raise ModelError(
            f"{metadata.path} has {arch}.block_count={layers} and {len(tensors)} tensors."
        )
    config: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer(f"{arch}.context_length"),
        "rms_norm_eps": metadata.number(f"{arch}.attention.layer_norm_rms_epsilon", zero=True),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    own = architecture.config(metadata, config)
    return config | own | _token_ids(metadata, config["vocab_size"])


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
    window = metadata.integer("gemma3.attention.sliding_window", 0, least=0)
    # One layer in six reads everything; without a window every one does.
    pattern = metadata.integer("gemma3.attention.sliding_window_pattern", 6) if window else 1
    local_theta = metadata.number("gemma3.rope.freq_base_swa", 10000.0)
    # Only the largest divides queries by something else than the size of its heads.
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else head_dim
    cap = metadata.number("gemma3.final_logit_softcapping", 0.0, zero=True)
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
        "final_logit_softcapping": cap or None,
    }


ARCHITECTURES = {
    "llama": Architecture(config=_llama, layer=_LAYER, interleaved=True),
    "qwen2": Architecture(config=_qwen2, layer=_LAYER),
    "qwen3": Architecture(config=_qwen3, layer=_LAYER),
    "gemma3": Architecture(config=_gemma3, layer=_LAYER | _SANDWICH, norm_offset=1.0),
}


def _token_ids(metadata: GGUFFile, vocabulary: int) -> dict[str, int]:
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {hf: metadata.token_id(role, vocabulary) for role, hf in keys.items()}
    return {key: value for key, value in found.items() if value is not None}


def _generation_config(metadata: GGUFFile, vocabulary: int) -> dict[str, Any]:
    """The special tokens; a separate end-of-turn token also ends a completion."""
    config: dict[str, Any] = dict(_token_ids(metadata, vocabulary))
    turn = metadata.token_id("eot", vocabulary)
    if turn is not None and turn != config.get("eos_token_id"):
        config["eos_token_id"] = [*([config["eos_token_id"]] if "eos_token_id" in config else [])]
        config["eos_token_id"].append(turn)
    return config


def _rope(metadata: GGUFFile, *, head_dim: int, default_theta: float = 10000.0) -> dict[str, Any]:
    """`rope_parameters` as config.json writes them."""
    own = f"{metadata.text('general.architecture')}.rope"
    theta = metadata.number(f"{own}.freq_base", default_theta)
    rotated = metadata.integer(f"{own}.dimension_count", head_dim)
    if rotated != head_dim:
        raise UnsupportedModelError(f"{metadata.path} rotates {rotated} of {head_dim} dimensions.")
    scaled = _scaling(metadata, own)
    if _ROPE_FREQS not in metadata.tensors:
        return {"rope_type": "default", "rope_theta": theta} | scaled
    if scaled:
        kind = scaled["rope_type"]
        raise UnsupportedModelError(
            f"{metadata.path} has both rotary scaling {kind!r} and {_ROPE_FREQS}."
        )
    divisors = metadata.tensors[_ROPE_FREQS].read(slice(None))
    return _llama3_rope(divisors, theta=theta, head_dim=head_dim)


def _scaling(metadata: GGUFFile, own: str) -> dict[str, Any]:
    """What `rope_parameters` says of linear or YaRN scaling; empty where positions are as usual.

    As in llama.cpp, scaling without a type is linear and a factor of 0 is none.
    """
    given = metadata.get(f"{own}.scaling.type")
    kind = metadata.text(f"{own}.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{metadata.path} has rotary scaling {kind!r}.")
    _check_scaling(metadata, own, kind)
    if kind == "none":
        return {}
    new, old = f"{own}.scaling.factor", f"{own}.scale_linear"
    key = old if new not in metadata.metadata and old in metadata.metadata else new
    factor = metadata.number(key, 1.0 if given is None else None, zero=True) or 1.0
    if kind == "linear":
        return {} if factor == 1 else {"rope_type": "linear", "factor": factor}
    length = metadata.integer(f"{own}.scaling.original_context_length")
    scaled = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    for beta in ("beta_fast", "beta_slow"):
        if f"{own}.scaling.yarn_{beta}" in metadata.metadata:
            scaled[beta] = metadata.number(f"{own}.scaling.yarn_{beta}")
    return scaled


def _check_scaling(metadata: GGUFFile, own: str, kind: str) -> None:
    """Refuses keys of rotary scaling that would change numbers.

    One is `yarn_attn_factor`: llama.cpp's converter copies Hugging Face's `attention_factor` into
    it, which replaces YaRN's own factor on cos and sin; its rotation would multiply the two.
    """
    neutral = {
        "attn_factor": (1.0,),
        "yarn_ext_factor": (-1.0, 1.0 if kind == "yarn" else 0.0),  # -1: by the type
        "yarn_log_multiplier": (0.0,),
    }
    for key, value in metadata.metadata.items():
        name = key.removeprefix(f"{own}.scaling.")
        if name in (key, *_SCALING) or value in (*neutral.get(name, ()), "", []):
            continue
        raise UnsupportedModelError(
            f"{metadata.path} has {key}={value!r:.80}, which is not implemented for rotary scaling"
            f" {kind!r}. Give the Hugging Face checkpoint instead."
        )


def _llama3_rope(divisors: np.ndarray, *, theta: float, head_dim: int) -> dict[str, Any]:
    """Recovers llama3's parameters from the divisors of the frequencies that llama.cpp stores.

    Every released model has the same low, high and original length; only the factor differs, and
    it is the largest divisor. The guess is checked against all divisors.

    Raises:
        UnsupportedModelError: they follow another rule.
    """
    factor, low, high, original = shortest(divisors.max()), 1.0, 4.0, 8192
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
