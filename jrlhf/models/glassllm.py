"""Reads glassllm's npz files: a Llama with interleaved rotary pairs, weights stored (in, out)."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.errors import ModelError
from jrlhf.models.hf.reader import read_json

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
SPACE = "▁"

# Ours (Hugging Face's) on the left; {} is the layer.
_NAMES = {
    "model.layers.{}.input_layernorm.weight": "blocks.{}.norm1.gamma",
    "model.layers.{}.post_attention_layernorm.weight": "blocks.{}.norm2.gamma",
    "model.layers.{}.self_attn.q_proj.weight": "blocks.{}.attn.W_Q",
    "model.layers.{}.self_attn.k_proj.weight": "blocks.{}.attn.W_K",
    "model.layers.{}.self_attn.v_proj.weight": "blocks.{}.attn.W_V",
    "model.layers.{}.self_attn.o_proj.weight": "blocks.{}.attn.W_O",
    "model.layers.{}.mlp.gate_proj.weight": "blocks.{}.ffn.W1",
    "model.layers.{}.mlp.up_proj.weight": "blocks.{}.ffn.W3",
    "model.layers.{}.mlp.down_proj.weight": "blocks.{}.ffn.W2",
}
_TOP = {"model.embed_tokens.weight": "E", "model.norm.weight": "norm_f.gamma"}


def unpermute_rows(heads: int, rows: int) -> np.ndarray:
    """Where each output row of a q or k projection lies when rotary pairs are interleaved.

    Llama's rotary embedding pairs row i of a head with row i + e/2; glassllm and llama.cpp pair
    neighbours. `w[unpermute_rows(...)]` brings neighbours half a head apart.

    Args:
        heads: heads of this projection.
        rows: its output rows, heads times head dim.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


class GlassLLMCheckpoint:
    """A glassllm model under Hugging Face's names and in its layout."""

    kind: str = "glassllm"
    generation_config: Mapping[str, Any] | None = None

    def __init__(self, path: Path) -> None:
        """Reads the file whole: these models are small.

        Raises:
            ModelError: it is not a glassllm file.
        """
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            raw = json.loads(str(arrays.pop("__config__")))
            self.config: Mapping[str, Any] = _config(raw, arrays)
            self._arrays = self._rename(arrays)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ModelError(f"{path} is not a glassllm model: {error!r}") from error
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: array.shape for name, array in self._arrays.items()
        }

    def _rename(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }
        theirs = dict(_TOP)
        for layer in range(self.config["num_hidden_layers"]):
            theirs |= {ours.format(layer): name.format(layer) for ours, name in _NAMES.items()}
        known = set(theirs.values())
        # An array that is in no table keeps its name, and the loader reports it as unexpected.
        renamed = {name: array for name, array in arrays.items() if name not in known}
        for ours, name in theirs.items():
            if name not in arrays:
                continue
            array = arrays[name]
            if array.ndim == 2 and name != "E":
                array = array.T
            if permuted := re.search(r"\.([qk]_proj)\.", ours):
                array = array[unpermute_rows(heads[permuted[1]], array.shape[0])]
            renamed[ours] = array
        return renamed

    def read(
        self, name: str, index: tuple[slice, ...], shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        array = self._arrays[name]
        return (array if shape is None else array.reshape(shape))[index]


def _config(raw: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What config.json would say. The MLP's width is not in the file's own config."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["d_model"],
        "intermediate_size": int(arrays["blocks.0.ffn.W1"].shape[1]),
        "num_hidden_layers": raw["n_layers"],
        "num_attention_heads": raw["n_heads"],
        "num_key_value_heads": raw["n_kv_heads"],
        "max_position_embeddings": raw["max_len"],
        "rope_parameters": {"rope_type": "default", "rope_theta": raw["rope_base"]},
        "rms_norm_eps": raw["eps"],
        "initializer_range": raw["init_std"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "pad_token_id": SPECIALS.index("<pad>"),
        "bos_token_id": SPECIALS.index("<bos>"),
        "eos_token_id": SPECIALS.index("<eos>"),
    }


def tokenizer_backend(file: Path) -> Any:
    """glassllm's character BPE as a `tokenizers.Tokenizer`.

    Raises:
        ModelError: it is not a glassllm tokenizer file.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    data = read_json(file)
    try:
        merges = [(a, b) for a, b in data["merges"]]
        words = [*SPECIALS, *data["alphabet"], *(a + b for a, b in merges)]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file} is not a glassllm tokenizer: {error!r}") from error
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+"), behavior="isolated"
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in SPECIALS]
    )
    return tokenizer
