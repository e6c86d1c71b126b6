"""Every decoder family with the flags of its config, on and off somewhere."""

from __future__ import annotations

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "vocab_size": 61}
GPT |= {"tie_word_embeddings": False} | {f"{k}_token_id": None for k in ("bos", "eos", "pad")}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
WIDE = {"head_dim": 12}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20}

# model_type -> {flags: changes of the config}. The first case of each also generates greedily, as
# do those whose name ends with "*".
CASES = {
    "llama": {
        "llama3 rope, biases, wide heads": {
            "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, **WIDE,
        },
        "yarn, tied *": {"rope_parameters": YARN, "tie_word_embeddings": True},
        "yarn with mscale, untruncated": {
            "rope_parameters": {
                **YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False, "beta_fast": 20.0,
            },
        },
        "dynamic rope beyond its length *": {
            "rope_parameters": DYNAMIC, "max_position_embeddings": 16,
        },
        "linear rope, multi-query": {"rope_parameters": LINEAR, "num_key_value_heads": 1},
    },
    "mistral": {
        "window": {"sliding_window": 5},
        "no window, wide heads": {"sliding_window": None, **WIDE},
    },
    "qwen2": {
        "windows above layer 2, tied": {
            "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
        "no window": {},
    },
    "qwen3": {
        "windows by layer type": {
            "use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED, **WIDE,
        },
        "biases, tied": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 8},
    },
    "gemma": {
        "tied, wide heads": {"tie_word_embeddings": True, **WIDE},
        "untied, exact gelu's old name": {"hidden_act": "gelu", "attention_bias": True, **WIDE},
    },
    "gemma2": {
        "caps, alternating windows, tied": {
            "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 10, "tie_word_embeddings": True, **WIDE,
        },
        "no caps, untied": {
            "sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "attention_bias": True, "head_dim": 8,
        },
    },
    "gemma3_text": {
        "two ropes, windows, tied": {
            "sliding_window": 5, "layer_types": MIXED, "query_pre_attn_scalar": 10,
            "tie_word_embeddings": True, **WIDE,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
        "dynamic rope in windowed layers *": {
            "sliding_window": 5, "layer_types": MIXED, "head_dim": 8,
            "max_position_embeddings": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": DYNAMIC,
            },
        },
        "final cap, biases": {
            "sliding_window": 7, "final_logit_softcapping": 3.0, "attention_bias": True,
            "head_dim": 8,
        },
    },
    "phi3": {
        "longrope, window": {
            "rope_parameters": LONG, "original_max_position_embeddings": 12, "sliding_window": 5,
        },
        "partial rotation, tied": {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
            },
            "tie_word_embeddings": True,
        },
    },
    "olmo2": {"untied": {}, "biases, tied": {"attention_bias": True, "tie_word_embeddings": True}},
    "smollm3": {
        "windows where nothing turns, tied": {
            "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 5,
            "tie_word_embeddings": True,
        },
        "biases, yarn": {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    },
    "granite": {
        "multipliers": {
            "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.3,
            "logits_scaling": 7.0,
        },
        "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    },
    "cohere": {
        "q/k norm, tied": {
            "use_qk_norm": True, "tie_word_embeddings": True, "logit_scale": 0.25,
        },
        "biases": {"attention_bias": True},
    },
    "gpt2": {
        "tied": {**GPT, "tie_word_embeddings": True, "n_inner": 44},
        "scores by layer number": {
            **GPT, "scale_attn_by_inverse_layer_idx": True
        },
        "unscaled scores": {**GPT, "scale_attn_weights": False, "activation_function": "relu"},
    },
    "gpt_neox": {
        "parallel": {},
        "one after the other, no biases, tied": {
            "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 1.0,
            },
        },
    },
    "gptj": {
        "untied": {**GPT, "rotary_dim": 4},
        "tied, whole heads": {
            **GPT, "rotary_dim": 8, "tie_word_embeddings": True, "n_inner": 44,
        },
    },
    "opt": {
        "tied": {"ffn_dim": 44, "tie_word_embeddings": True},
        "no biases, gelu": {
            "ffn_dim": 44, "enable_bias": False, "activation_function": "gelu",
        },
        "opt-350m: norms after, narrow embeddings": {
            "ffn_dim": 44, "do_layer_norm_before": False, "word_embed_proj_dim": 20,
            "tie_word_embeddings": True,
        },
        "no final norm, wide embeddings": {
            "ffn_dim": 44, "_remove_final_layer_norm": True, "word_embed_proj_dim": 40,
        },
        "norms without parameters": {"ffn_dim": 44, "layer_norm_elementwise_affine": False},
    },
    "mixtral": {
        "no window": EXPERTS,
        "window, tied": {**EXPERTS, "sliding_window": 5, "tie_word_embeddings": True},
    },
    "qwen3_moe": {
        "normed weights, window": {
            **QWEN_EXPERTS, "norm_topk_prob": True, "use_sliding_window": True,
            "sliding_window": 5, **WIDE,
        },
        "raw weights, biases": {**QWEN_EXPERTS, "attention_bias": True, "head_dim": 8},
        "plain MLPs in some layers *": {
            **QWEN_EXPERTS, "head_dim": 8, "mlp_only_layers": [0], "decoder_sparse_step": 2,
            "intermediate_size": 36,
        },
    },
    "gpt_oss": {
        "sinks, yarn, windows": {
            **EXPERTS, "sliding_window": 5, "swiglu_limit": 1.0, "head_dim": 8,
        },
        "no biases, default rope, all full": {
            **EXPERTS, "layer_types": ["full_attention"] * 4, "attention_bias": False, **WIDE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "swiglu_alpha": 1.1,
        },
    },
}  # fmt: skip
NAMED = [(family, flags) for family, cases in CASES.items() for flags in cases]
GREEDY = [
    (family, flags)
    for family, cases in CASES.items()
    for i, flags in enumerate(cases)
    if i == 0 or flags.endswith("*")
]
