"""Reads llama.cpp's GGUF files: weights of any quantization, config and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.errors import ModelError, TokenizerError, UnsupportedModelError, suggest
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
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ROPE_FREQS = "rope_freqs.weight"


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
        self.config: Mapping[str, Any] = _config(file)
        self.generation_config: Mapping[str, Any] | None = _generation_config(file)
        self._tensors = self._rename(file.tensors)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensor.shape for name, tensor in self._tensors.items()
        }

    def _rename(self, tensors: Mapping[str, GGUFTensor]) -> dict[str, GGUFTensor]:
        theirs = dict(_TOP)
        for layer in range(self.config["num_hidden_layers"]):
            theirs |= {ours.format(layer): name.format(layer) for ours, name in _LAYER.items()}
        ours = {name: hf for hf, name in theirs.items()}
        renamed = {}
        for name, tensor in tensors.items():
            stem, _, kind = name.rpartition(".")
            if name != _ROPE_FREQS:  # already in the config
                renamed[f"{ours[stem]}.{kind}" if stem in ours else name] = tensor
        return renamed

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows: slice | np.ndarray = index[0]
        if found := re.search(r"\.([qk])_proj\.", name):
            key = "num_attention_heads" if found[1] == "q" else "num_key_value_heads"
            rows = unpermute_rows(self.config[key], self.shapes[name][0])[index[0]]
        if len(index) == 1:
            return self._tensors[name].read(slice(None))[rows]
        # Quantized blocks lie along the last axis: rows can be picked before dequantizing.
        return self._tensors[name].read(rows)[(slice(None), *index[1:])]


def _config(metadata: GGUFFile) -> dict[str, Any]:
    """What config.json would say."""
    tensors = metadata.tensors
    arch = metadata.need("general.architecture")
    if arch != "llama":
        raise UnsupportedModelError(
            f"{metadata.path} has architecture {arch!r}; of GGUF files, llama is implemented."
        )
    if metadata.get("llama.expert_count"):
        raise UnsupportedModelError(f"{metadata.path} is a mixture of experts.")
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedModelError(f"{metadata.path} is one part of several; merge them first.")
    hidden = metadata.integer("llama.embedding_length")
    heads = metadata.integer("llama.attention.head_count")
    head_dim = metadata.integer("llama.attention.key_length", hidden // heads)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{metadata.path} has no token_embd.weight.")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("llama.feed_forward_length"),
        "num_hidden_layers": metadata.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer("llama.context_length"),
        "rope_parameters": _rope(metadata, head_dim=head_dim),
        "rms_norm_eps": _short(metadata.need("llama.attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return config | _token_ids(metadata)


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


def _rope(metadata: GGUFFile, *, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` as config.json writes them."""
    theta = _short(metadata.get("llama.rope.freq_base", 10000.0))
    rotated = metadata.integer("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UnsupportedModelError(f"{metadata.path} rotates {rotated} of {head_dim} dimensions.")
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        factor = _short(metadata.need("llama.rope.scaling.factor"))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
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


# tokenizer.ggml.pre -> (regular expression that splits before the bytes, or None; digits one by
# one; whether whole words of the vocabulary skip the merges). llama.cpp: src/llama-vocab.cpp.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[str, tuple[str | None, bool, bool]] = {
    "gpt-2": (None, False, False),
    "smollm": (None, True, False),
    "starcoder": (None, True, False),
    "llama-bpe": (_GPT4 % "{1,3}", False, True),
    "qwen2": (_GPT4 % "", False, False),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def tokenizer_backend(path: Path) -> tuple[Any, dict[str, Any]]:
    """A GGUF file's tokenizer.

    Returns:
        The `tokenizers.Tokenizer` and what the class around it must know: special tokens,
        chat_template and model_max_length.

    Raises:
        TokenizerError: a tokenizer model or pre-tokenizer that is not implemented.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    metadata = GGUFFile(path)
    kind = metadata.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise TokenizerError(
            f"{path} has tokenizer model {kind!r}; of GGUF files, byte-level BPE (gpt2) is"
            " implemented. Give the Hugging Face tokenizer's directory instead."
        )
    pre, ignore_merges = _pre_tokenizer(metadata)
    words: list[str] = metadata.need("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ", 1)) for pair in metadata.need("tokenizer.ggml.merges")]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(words))
    # In the order of their ids, so that none gets a new id.
    for word, token_type in zip(words, types, strict=True):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(word, normalized=False)])
    settings = _settings(metadata, words)
    _add_template(tokenizer, metadata, settings)
    return tokenizer, settings


def _pre_tokenizer(metadata: GGUFFile) -> tuple[Any, bool]:
    from tokenizers import Regex, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"{metadata.path} has pre-tokenizer {name!r}; known: {', '.join(_PRE_TOKENIZERS)}."
            + suggest(name, _PRE_TOKENIZERS)
        )
    pattern, digits, ignore_merges = _PRE_TOKENIZERS[name]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    return pre_tokenizers.Sequence(steps), ignore_merges


def _settings(metadata: GGUFFile, words: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for name, role in roles.items():
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and token_id < len(words):
            settings[f"{role}_token"] = words[token_id]
    arch = metadata.need("general.architecture")
    if length := metadata.get(f"{arch}.context_length"):
        settings["model_max_length"] = int(length)
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return settings


def _add_template(tokenizer: Any, metadata: GGUFFile, settings: Mapping[str, Any]) -> None:
    """Makes the tokenizer add BOS and EOS where the file says so."""
    from tokenizers import processors

    # llama.cpp adds BOS for llama-bpe even when the file is silent.
    by_default = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    before = metadata.get("tokenizer.ggml.add_bos_token", by_default) and settings.get("bos_token")
    after = metadata.get("tokenizer.ggml.add_eos_token", False) and settings.get("eos_token")
    if not before and not after:
        return
    special = [token for token in (before, after) if token]
    parts = [part for part in (before, "$A", after) if part]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts),
        pair=None,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
    )
