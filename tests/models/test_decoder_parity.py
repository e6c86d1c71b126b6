"""The decoder against transformers' Llama: logits, gradients and greedy continuations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models.build import Net
from jrlhf.models.families import config_from_spec, family_of, spec_from_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
# Tiny matrices: a second thread only spins.
torch.set_num_threads(1)

BASE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
CASES = {
    "untied": {},
    "tied, gqa": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "llama3 rope, multi-query, wide heads, tanh gelu": {
        "rope_parameters": LLAMA3,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "linear rope, biases, gelu": {
        "rope_parameters": LINEAR,
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 2,
        "hidden_act": "gelu",
    },
}
LENGTHS = (21, 13)


def perturbed(kind, *, scale=0.15, **changes):
    """A float64 transformers model with every parameter, norms and biases too, off its start."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**BASE, **changes})
    config._attn_implementation = "eager"
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.double()


def tree_of(net, tensors):
    """Tensors by checkpoint name -> our tree, through the family's weight table."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), net.abstract())
    for weight in family_of(net.spec).weights(net.spec):
        for name, path, index in weight.places(net.spec):
            node = params
            for key in path[:-1]:
                node = node[key]
            value = weight.from_hf(tensors[name].detach().numpy())
            node[path[-1]][... if index is None else index] = value
    return params


def net_of(model, **choices):
    return Net(spec_from_config(model.config.to_dict(), **choices))


def close(ours, theirs, *, tolerance=1e-5):
    theirs = np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(scope="module")
def rows():
    ids = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, max(LENGTHS)))
    return ids.astype(np.int32), np.array(LENGTHS, np.int32)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_equal_transformers(changes, rows):
    ids, lengths = rows
    model = perturbed(transformers.LlamaForCausalLM, **changes)
    net = net_of(model)
    params = tree_of(net, dict(model.named_parameters()))
    real = (np.arange(ids.shape[1]) < lengths[:, None])[..., None]
    shape = (*ids.shape, BASE["vocab_size"])
    weights = np.random.default_rng(1).normal(size=shape) * real

    theirs = model(
        torch.tensor(ids).long(), attention_mask=torch.tensor(real[..., 0]).long()
    ).logits
    (theirs * torch.tensor(weights)).sum().backward()

    def objective(params):
        hidden = net.hidden(params, ids, lengths=lengths)
        logits = hidden @ net.head(params)
        return jnp.sum(logits * weights.astype(np.float32)), logits

    gradients, ours = jax.jit(jax.grad(objective, has_aux=True))(params)
    close(ours * real, theirs.detach().numpy() * real)
    expected = tree_of(net, {name: p.grad for name, p in model.named_parameters()})
    for leaf, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        close(leaf, other)


@pytest.mark.parametrize("name", list(CASES)[1:])
def test_64_of_64_greedy_tokens_equal_transformers_generate(name, rows):
    ids, lengths = rows
    count, width = 64, ids.shape[1]
    model = perturbed(transformers.LlamaForCausalLM, scale=0.4, **CASES[name])
    net = net_of(model)
    params = jax.jit(net.unstack)(tree_of(net, dict(model.named_parameters())))

    # One row at a time: transformers then has no padding to get wrong.
    theirs = [
        model.generate(
            torch.tensor(ids[row : row + 1, :length]).long(),
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[0, length:].numpy()
        for row, length in enumerate(lengths)
    ]
    assert min(len(np.unique(row)) for row in theirs) > 16  # not a row of one token

    @jax.jit
    def greedy(params):
        head, slots = net.head(params), jnp.arange(width + count)
        hidden, cache = net.prefill(params, ids, lengths, cache_size=width + count)
        first = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

        def step(carry, j):
            state, cache = carry
            token = jnp.argmax(state @ head, axis=-1).astype(jnp.int32)
            valid = (slots < lengths[:, None]) | ((slots >= width) & (slots <= width + j))
            state, cache = net.decode(
                params, token, lengths + j, cache, slot=width + j, valid=valid
            )
            return (state, cache), token

        return jax.lax.scan(step, (first, cache), jnp.arange(count))[1].T

    np.testing.assert_array_equal(greedy(params), theirs)


def test_classifier_scores_equal_transformers(rows):
    ids, lengths = rows
    pad = 0
    ids = np.where(ids == pad, 1, ids)
    ids = np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, pad)
    model = perturbed(transformers.LlamaForSequenceClassification, num_labels=3, pad_token_id=pad)
    net = net_of(model, head="classifier")
    assert net.spec.num_labels == 3
    params = tree_of(net, dict(model.named_parameters()))
    ours = net.scores(params, net.hidden(params, ids, lengths=lengths), lengths)
    close(ours, model(torch.tensor(ids).long()).logits.detach().numpy())


@pytest.mark.parametrize("name", CASES.keys())
def test_a_config_written_back_is_read_alike_by_both_libraries(name):
    config = transformers.LlamaConfig(**{**BASE, **CASES[name]})
    spec = spec_from_config(config.to_dict())
    written = config_from_spec(spec)
    assert spec_from_config(written) == spec
    theirs = transformers.LlamaConfig.from_dict(dict(written)).to_dict()
    assert spec_from_config(theirs) == spec
