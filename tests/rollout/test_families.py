"""Sampler and scorer agree on caps and biases of logits, sliding windows, narrow embeddings."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jrlhf.models.build import Net
from jrlhf.models.families import spec_from_config
from jrlhf.rollout.sampling import SamplingParams, sample
from jrlhf.rollout.score import outputs

SIZES = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5,
    "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "sliding_window": 4,
    "ffn_dim": 24, "word_embed_proj_dim": 12, "do_layer_norm_before": False,  # OPT
    "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "logits_scaling": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("family", ["gemma2", "gptj", "opt"])
def test_the_sampler_says_the_log_probs_that_the_scorer_says(family):
    net = Net(spec_from_config({"model_type": family, **SIZES}))
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.2 * noise.normal(size=x.shape).astype(np.float32),
        jax.jit(net.init)(jax.random.key(0)),
    )
    prompts = noise.integers(0, 23, (2, 6)).astype(np.int32)
    lengths = np.array([6, 3], np.int32)
    keys = jax.random.split(jax.random.key(1), 2)
    drawn = sample(net, params, prompts, lengths, keys, SamplingParams(max_new_tokens=8))
    for row, length in enumerate(lengths):
        ids = np.concatenate((prompts[row, :length], drawn.ids[row]))
        ids = np.pad(ids, (0, 14 - len(ids)))[None]
        batch = {"ids": ids, "lengths": np.array([length + 8], np.int32)}
        logps = jax.jit(lambda params, batch: outputs(net, params, batch).logps)(params, batch)
        ours = logps[0, length : length + 8]
        np.testing.assert_allclose(ours, drawn.logps[row], rtol=0, atol=1e-5)
        # And both are those of all the logits, capped and biased.
        hidden = net.hidden(params, ids[:, : length + 8])
        whole = jax.nn.log_softmax(net.logits(params, hidden))[0, length - 1 : -1]
        expected = np.take_along_axis(np.asarray(whole), ids[0, length : length + 8, None], -1)
        np.testing.assert_allclose(ours, expected[:, 0], rtol=0, atol=1e-5)
