"""Every decoder family against transformers, with each flag of its config on and off somewhere.

`python -m tests.models.table` measures all cases and writes docs/models.md.
Models are tiny and random, with norms and biases off their starting values; the oracle runs in
float64, one document at a time, so that it has no padding to get wrong.
"""

# Over budget: half of it is the table of cases.

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models.load import load_pretrained, save_pretrained
from jrlhf.ops.logps import token_logps

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
# Tiny matrices: a second thread only spins.
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
# The same program, translated with less care: half the compile time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

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
HEADS = ("SequenceClassification", "TokenClassification")
PROMPTS, NEW = (21, 13), 64


def documents():
    """(row, first column, length, segment): whole, padded left, two packed, padded right."""
    return [(0, 0, 23, 1), (1, 9, 14, 1), (2, 0, 9, 1), (2, 9, 12, 2), (3, 0, 17, 1)]


@functools.cache
def rows():
    """The batch that holds the documents; padding holds tokens too."""
    draw = np.random.default_rng(0)
    ids = draw.integers(1, BASE["vocab_size"], (4, 23)).astype(np.int32)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row, start, length, segment in documents():
        span = slice(start, start + length)
        segments[row, span], positions[row, span] = segment, np.arange(length)
    weights = draw.normal(size=ids.shape) * (positions > 0)
    return {"ids": ids, "segments": segments, "positions": positions}, weights


def theirs(family, flags, *, kind="CausalLM", scale=0.15, seed=0, **more):
    """A float32 transformers model with every parameter, norms and biases too, off its start."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **{**BASE, **CASES[family][flags], **more})
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger biases would make every token the same.
            parameter.add_((scale if parameter.ndim > 1 else 0.15) * torch.randn_like(parameter))
    return model


def reload(kind, directory):
    """Loads with transformers; nothing may be missing, left over or of another shape."""
    loader = getattr(transformers, f"AutoModelFor{kind}")
    model, info = loader.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    model.config._attn_implementation = model.config._experts_implementation = "eager"
    return model


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(rows()[0]["ids"][:1]).long()).logits


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def relative(ours, expected):
    expected = np.asarray(expected)
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


def worst_gradient(ours, expected, *, rotated):
    """The largest difference relative to its tensor's maximum.

    Without rotation a bias on keys has no gradient at all (it adds the same to all scores of a
    query): that tensor alone is compared with the largest gradient of the model.
    """
    ours = jax.device_get(jax.tree.leaves(ours))
    expected = jax.device_get(jax.tree_util.tree_leaves_with_path(expected))
    top = max(np.abs(leaf).max() for _, leaf in expected)

    def size(path, leaf):
        zero = not rotated and jax.tree_util.keystr(path).endswith("['k']['bias']")
        return top if zero else np.abs(leaf).max()

    return max(
        float(np.abs(got - wanted).max() / size(path, wanted))
        for got, (path, wanted) in zip(ours, expected, strict=True)
    )


@functools.cache
def measure(family, flags):
    """Differences of logits, loss and gradients, and whether an export comes back bit by bit."""
    with tempfile.TemporaryDirectory() as directory:
        return _measure(family, flags, Path(directory))


def _measure(family, flags, directory):
    model = theirs(family, flags)
    model.save_pretrained(directory / "theirs")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = their_logits(model)
    logits, loss = oracle(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.float().save_pretrained(directory / "gradients")

    net, params, source = load_pretrained(directory / "theirs")
    batch, weights = rows()
    real, scored = batch["segments"] > 0, batch["positions"] > 0

    def objective(params):
        hidden = net.hidden(params, **{k: jnp.asarray(x) for k, x in batch.items()})
        # As `rollout.score.outputs` does: the state before a token scores it.
        states = net.head_states(jnp.roll(hidden, 1, axis=1))
        logps, _, _ = token_logps(
            states.reshape(-1, states.shape[-1]), net.head(params),
            jnp.asarray(batch["ids"]).reshape(-1),
            softcap=net.spec.final_softcap, entropy=False,
        )  # fmt: skip
        logps = logps.reshape(scored.shape)
        return jnp.sum(logps * weights.astype(np.float32)), (logps, net.logits(params, hidden))

    gradients, (logps, ours) = quick_jit(jax.grad(objective, has_aux=True))(params)
    loss_here = -float(np.sum(np.asarray(logps), where=scored, dtype=np.float64)) / scored.sum()
    expected = load_pretrained(directory / "gradients")[1]
    save_pretrained(directory / "ours", net, params, source=source)
    again = reload("CausalLM", directory / "ours")
    return {
        "logits": relative(np.asarray(ours)[real], logits[real]),
        "loss": abs(loss_here - loss),
        "gradients": worst_gradient(gradients, expected, rotated=net.spec.positions == "rotary"),
        # The weights bit by bit; the config by what it computes (kernels may follow alignment).
        "reload": same(again.state_dict(), state) and relative(their_logits(again), first) <= 1e-6,
    }


def oracle(model):
    """Logits of every token, the mean loss, and gradients of the weighted log-probs in `model`."""
    model.double()
    batch, weights = rows()
    logits = np.zeros((*batch["ids"].shape, BASE["vocab_size"]))
    total = 0.0
    for row, start, length, _ in documents():
        span = slice(start, start + length)
        ids = torch.tensor(batch["ids"][row : row + 1, span]).long()
        out = model(ids).logits[0]
        logps = torch.log_softmax(out[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        (logps * torch.tensor(weights[row, span][1:])).sum().backward()
        logits[row, span] = out.detach().numpy()
        total -= logps.sum().item()
    return logits, total / (batch["positions"] > 0).sum()


@functools.cache
def greedy_agreement(family, flags):
    """Of 64 greedy tokens through the cache, the fewest that a row has in common with theirs."""
    lengths, width = np.array(PROMPTS, np.int32), max(PROMPTS)
    ids = np.random.default_rng(2).integers(1, BASE["vocab_size"], (2, width)).astype(np.int32)
    # Some draws say one token for ever, which proves little. Tied and scaled up, a token's own
    # vector is its own best successor: then the embedding is made small.
    small = 0.1 if family.startswith("gemma") else 1.0
    draws = [(seed, 0.4, small) for seed in range(8)] + [(seed, 0.8, 0.1) for seed in range(8)]
    if "norms after" in flags:
        # Each layer's norm takes the place of what went in: positions have to speak up.
        draws = [(seed, 0.15, 1.0) for seed in range(8)]
    for seed, scale, shrink in draws:
        model = theirs(family, flags, scale=scale, seed=seed)
        if shrink != 1.0:
            model.get_input_embeddings().weight.data.mul_(shrink)
        if "norms after" in flags:
            model.model.decoder.embed_positions.weight.data.mul_(8.0)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            net, params, _ = load_pretrained(directory)
        model.double()
        expected = np.stack([generate(model, row[:n]) for row, n in zip(ids, lengths, strict=True)])
        if min(len(np.unique(row)) for row in expected) > 8:
            break
    else:
        raise AssertionError(f"no draw of {family} ({flags}) gives varied rows")
    ours = greedy(net, quick_jit(net.unstack)(params), ids, lengths)
    return int((np.asarray(ours) == expected).sum(axis=1).min())


def generate(model, prompt):
    ids = torch.tensor(prompt)[None].long()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return out[0, len(prompt) :].numpy()


def greedy(net, params, ids, lengths):
    width = ids.shape[1]

    @quick_jit
    def run(params):
        slots = jnp.arange(width + NEW)
        hidden, cache = net.prefill(params, ids, lengths, cache_size=width + NEW)
        first = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

        def step(carry, j):
            state, cache = carry
            token = jnp.argmax(net.logits(params, state), axis=-1).astype(jnp.int32)
            valid = (slots < lengths[:, None]) | ((slots >= width) & (slots <= width + j))
            state, cache = net.decode(
                params, token, lengths + j, cache, slot=width + j, valid=valid
            )
            return (state, cache), token

        return jax.lax.scan(step, (first, cache), jnp.arange(NEW))[1].T

    return run(params)


@pytest.mark.parametrize(("family", "flags"), NAMED)
def test_logits_loss_gradients_and_export_equal_transformers(family, flags):
    found = measure(family, flags)
    assert found["logits"] <= 1e-5
    assert found["loss"] <= 2e-6
    assert found["gradients"] <= 1e-5
    assert found["reload"]


@pytest.mark.parametrize(("family", "flags"), GREEDY)
def test_64_of_64_greedy_tokens_equal_transformers_generate(family, flags):
    assert greedy_agreement(family, flags) == NEW


def classifiers():
    for family in CASES:
        names = type(transformers.AutoConfig.for_model(family)).__name__.removesuffix("Config")
        for kind in ("SequenceClassification", "TokenClassification"):
            if hasattr(transformers, f"{names}For{kind}"):
                yield family, kind


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize(("family", "kind"), list(classifiers()))
def test_classifiers_pass_both_ways(family, kind, labels, tmp_path):
    """Names and shapes for all; scores for four that differ in how they name or run things."""
    flags = next(iter(CASES[family]))
    head = "classifier" if kind.startswith("Seq") else "tokens"
    model = theirs(family, flags, kind=kind, num_labels=labels)
    model.save_pretrained(tmp_path / "theirs")
    net, params, source = load_pretrained(tmp_path / "theirs", head=head)
    assert net.spec.num_labels == labels
    save_pretrained(tmp_path / "ours", net, params, source=source)
    assert same(reload(kind, tmp_path / "ours").state_dict(), model.state_dict())
    if family not in ("gemma2", "gpt2", "gpt_neox", "gpt_oss"):
        return
    ids = rows()[0]["ids"][:1]
    expected = model.double()(torch.tensor(ids).long()).logits.detach().numpy()

    def scores(params):
        hidden = net.hidden(params, ids)
        if head == "tokens":
            return net.token_scores(params, hidden)
        return net.scores(params, hidden, jnp.array([ids.shape[1]]))

    assert relative(quick_jit(scores)(params), expected) <= 1e-5
