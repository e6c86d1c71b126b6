"""Tiny models as GGUF files, written with the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARED = {k: v for k, v in CONFIG.items() if k not in ("attention_bias", "mlp_bias", "hidden_act")}
# What config.json would say, by llama.cpp's name of the architecture.
CONFIGS = {
    "llama": CONFIG,
    "qwen2": SHARED
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
    },
    "qwen3": SHARED
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "head_dim": 16,
    },
    "gemma3": SHARED
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "num_hidden_layers": 7,  # the sixth reads everything
        "sliding_window": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "final_logit_softcapping": None,
    },
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def permute(weights, heads):
    """What llama.cpp's converter does to q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows = weights.shape[0]
    split = weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def their_name(name, names):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{names[stem]}.{kind}"


def k_blocks(shape, form):
    """Random bytes of a K-quant, with scales of an ordinary size: the package only reads these."""
    _, size = gguf.GGML_QUANT_SIZES[form]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, size), np.uint8)
    scales = range(-2, 0) if form == Kind.Q6_K else range(4)  # where float16 scales are
    for i in scales:
        blocks[..., i] = np.float16(2e-3).tobytes()[i % 2]
    return blocks.reshape(*shape[:-1], -1)


def add_metadata(writer, metadata):
    """Adds values of any type; as the converter, whole numbers have no sign if they need none."""
    for key, value in metadata.items():
        whole = type(value) is int and value >= 0
        kind = gguf.GGUFValueType.UINT32 if whole else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)


def write_gguf(path, config, tensors, *, kind=Kind.F32, extra=None, metadata=None, arch="llama"):
    """Writes a model as llama.cpp's converter would; returns what the file then holds."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    add_metadata(writer, metadata or {})
    held = {}
    for name, tensor in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        part, added = name.split(".")[-2], np.float32(arch == "gemma3" and "norm" in name)
        turned = arch == "llama" and part in heads
        form = kind if tensor.ndim == 2 else Kind.F32  # as the converter: vectors stay float32
        if form in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
            stored = k_blocks(tensor.shape, form)
            whole = dequantize(stored, form)
            rows = np.arange(len(whole))
            order = np.argsort(permute(rows, config[heads[part]])) if turned else rows
            held[name] = whole[order]
        else:
            turn = permute(tensor, config[heads[part]]) if turned else tensor
            stored = quantize(turn + added, form)
            held[name] = dequantize(quantize(tensor + added, form), form) - added
        names = GEMMA_NAMES if arch == "gemma3" else NAMES
        writer.add_tensor(their_name(name, names), stored, raw_dtype=form)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def write_hf(path, config, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
