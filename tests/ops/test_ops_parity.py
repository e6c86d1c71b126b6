"""The same numbers from transformers' logits processors and TRL's fused head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops import sampling
from jrlhf.ops.logps import token_logps

pytestmark = pytest.mark.parity

CASES = [
    ("TemperatureLogitsWarper", {"temperature": 0.7}, lambda x: sampling.temperature(x, 0.7)),
    ("TopKLogitsWarper", {"top_k": 7}, lambda x: sampling.top_k(x, 7)),
    ("TopPLogitsWarper", {"top_p": 0.3}, lambda x: sampling.top_p(x, 0.3)),
    ("TopPLogitsWarper", {"top_p": 0.95}, lambda x: sampling.top_p(x, 0.95)),
    ("TopPLogitsWarper", {"top_p": 0.0}, lambda x: sampling.top_p(x, 0.0)),
    ("MinPLogitsWarper", {"min_p": 0.1}, lambda x: sampling.min_p(x, 0.1)),
    ("MinPLogitsWarper", {"min_p": 1.0}, lambda x: sampling.min_p(x, 1.0)),
]


@pytest.mark.parametrize(("name", "arguments", "ours"), CASES)
@pytest.mark.parametrize("vocab", [20, 500])
def test_processors_are_those_of_transformers(rng, name, arguments, ours, vocab):
    import torch
    from transformers.generation import logits_process

    logits = (rng.normal(size=(16, vocab)) * 3).astype(np.float32)
    theirs = getattr(logits_process, name)(**arguments)(None, torch.tensor(logits)).numpy()
    np.testing.assert_allclose(ours(jnp.array(logits)), theirs, rtol=1e-6)


def test_the_repetition_penalty_is_that_of_transformers(rng):
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = rng.normal(size=(5, 30)).astype(np.float32)
    ids = rng.integers(0, 30, (5, 8))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(logits)).numpy()
    seen = sampling.seen_tokens(jnp.array(ids), jnp.full(5, 8), vocab=30)
    found = sampling.repetition_penalty(jnp.array(logits), seen, 1.3)
    np.testing.assert_allclose(found, theirs, rtol=1e-6)


def test_the_whole_chain_is_that_of_generate(rng):
    """The processors in the order in which `generate` builds them."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1)  # fmt: skip
    model = LlamaForCausalLM(config)
    generation = GenerationConfig(do_sample=True, temperature=0.8, top_k=40, top_p=0.9, min_p=0.02,
                                  repetition_penalty=1.2)  # fmt: skip
    chain = model._get_logits_processor(
        generation_config=generation, input_ids_seq_length=6, logits_processor=[], device="cpu"
    )
    logits = (rng.normal(size=(8, 300)) * 3).astype(np.float32)
    ids = rng.integers(0, 300, (8, 6))
    theirs = chain(torch.tensor(ids), torch.tensor(logits)).numpy()
    seen = sampling.seen_tokens(jnp.array(ids), jnp.full(8, 6), vocab=300)
    found = sampling.repetition_penalty(jnp.array(logits), seen, 1.2)
    found = sampling.process(found, temperature=0.8, top_k=40, top_p=0.9, min_p=0.02)
    np.testing.assert_allclose(found, theirs, rtol=1e-6)


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 2.0)])
def test_log_probs_entropy_and_gradients_are_those_of_trls_fused_head(rng, temperature, softcap):
    import torch
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden = rng.normal(size=(11, 6)).astype(np.float32)
    head = rng.normal(size=(6, 40)).astype(np.float32)
    targets = rng.integers(0, 40, 11)
    a, c = rng.normal(size=(2, 11)).astype(np.float32)
    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head.T.copy()))
    logps, entropy, _, _, top = ChunkedLogProbFunction.apply(
        h, w, None, torch.tensor(targets), temperature, 16, softcap, 1.0,
        ("log_probs", "entropy", "is_top1"),
    )  # fmt: skip
    (torch.tensor(a) * logps + torch.tensor(c) * entropy).sum().backward()

    def loss(hidden, head):
        found = token_logps(
            hidden, head, jnp.array(targets, jnp.int32),
            temperature=temperature, softcap=softcap, chunk=4,
        )  # fmt: skip
        return jnp.sum(jnp.array(a) * found[0] + jnp.array(c) * found[1]), found

    gradients, found = jax.grad(loss, (0, 1), has_aux=True)(jnp.array(hidden), jnp.array(head))
    for ours, theirs in zip(found, (logps, entropy, top)):
        np.testing.assert_allclose(ours, theirs.detach().float().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[0], h.grad.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], w.grad.numpy().T, rtol=1e-4, atol=1e-5)
