"""What is measured of a tiny decoder against transformers.

Norms and biases are off their starting values; the oracle runs in float64, one document at a time,
so that it has no padding to get wrong.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jrlhf.models.load import load_pretrained
from jrlhf.models.save import save_pretrained
from jrlhf.ops.logps import token_logps
from tests.models.decoder_cases import BASE
from tests.models.quick import quick_jit

# Tiny matrices: a second thread only spins.
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()

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


def theirs(family, changes, *, kind="CausalLM", scale=0.15, seed=0, **more):
    """A float32 transformers model with every parameter, norms and biases too, off its start."""
    torch.manual_seed(seed)
    # A copy: transformers adds to dictionaries that it is given.
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy({**BASE, **changes, **more}))
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


def worst_gradient(ours, expected, spec):
    """The largest difference relative to its tensor's maximum.

    Without rotation a bias on keys has no gradient at all (it adds the same to all scores of a
    query), and neither has the router where the one chosen expert's weight is divided by itself:
    those tensors alone are compared with the largest gradient of the model.
    """
    ours = jax.device_get(jax.tree.leaves(ours))
    expected = jax.device_get(jax.tree_util.tree_leaves_with_path(expected))
    top = max(np.abs(leaf).max() for _, leaf in expected)
    nothing = set()
    if spec.positions != "rotary" or set(spec.layer_ropes) == {-1}:
        nothing.add("['k']['bias']")
    if spec.moe is not None and spec.moe.experts_per_token == 1 and spec.moe.normalize:
        nothing |= {"['router']['kernel']", "['router']['bias']"}

    def size(path, leaf):
        zero = jax.tree_util.keystr(path).endswith(tuple(nothing))
        return top if zero else np.abs(leaf).max()

    return max(
        float(np.abs(got - wanted).max() / size(path, wanted))
        for got, (path, wanted) in zip(ours, expected, strict=True)
    )


def measure(family, changes, jit=quick_jit):
    """Differences of logits, loss and gradients, and whether an export comes back bit by bit."""
    with tempfile.TemporaryDirectory() as directory:
        return _measure(family, changes, jit, Path(directory))


def _measure(family, changes, jit, directory):
    model = theirs(family, changes)
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

    gradients, (logps, ours) = jit(jax.grad(objective, has_aux=True))(params)
    loss_here = -float(np.sum(np.asarray(logps), where=scored, dtype=np.float64)) / scored.sum()
    expected = load_pretrained(directory / "gradients")[1]
    save_pretrained(directory / "ours", net, params, source=source)
    again = reload("CausalLM", directory / "ours")
    return {
        "logits": relative(np.asarray(ours)[real], logits[real]),
        "loss": abs(loss_here - loss),
        "gradients": worst_gradient(gradients, expected, net.spec),
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


def greedy_agreement(family, changes):
    """Of 64 greedy tokens through the cache, the fewest that a row has in common with theirs."""
    lengths, width = np.array(PROMPTS, np.int32), max(PROMPTS)
    ids = np.random.default_rng(2).integers(1, BASE["vocab_size"], (2, width)).astype(np.int32)
    # Some draws say one token for ever, which proves little. Tied and scaled up, a token's own
    # vector is its own best successor: then the embedding is made small.
    small = 0.1 if family.startswith("gemma") else 1.0
    scales = ((0.4, small), (0.8, 0.1), (1.5, 0.01))
    draws = [(seed, *scale) for scale in scales for seed in range(40)]
    norms_after = not changes.get("do_layer_norm_before", True)
    if norms_after:
        # Each layer's norm takes the place of what went in: positions have to speak up.
        draws = [(seed, 0.15, 1.0) for seed in range(40)]
    best = (0, None, None)  # how varied, ours, theirs
    for seed, scale, shrink in draws:
        model = theirs(family, changes, scale=scale, seed=seed)
        if shrink != 1.0:
            model.get_input_embeddings().weight.data.mul_(shrink)
        if norms_after:
            model.model.decoder.embed_positions.weight.data.mul_(8.0)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            net, params, _ = load_pretrained(directory)
        ours = np.asarray(greedy(net, params, jnp.asarray(ids), jnp.asarray(lengths)))
        variety = min(len(np.unique(row)) for row in ours)
        if variety <= best[0]:
            continue
        model.double()
        rows = [generate(model, row[:n]) for row, n in zip(ids, lengths, strict=True)]
        # Two tokens that are nearer than logits may differ prove nothing.
        if min(margin for _, margin in rows) > 2e-5:
            best = variety, ours, np.stack([tokens for tokens, _ in rows])
        if best[0] > 8:
            break
    variety, ours, expected = best
    assert variety > 4, f"no draw of {family} ({changes}) gives varied rows"
    return int((ours == expected).sum(axis=1).min())


def generate(model, prompt):
    """Their tokens, and by how much the best was better: the least, in the largest logit."""
    ids = torch.tensor(prompt)[None].long()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.cat(out.logits)
    first, second = logits.topk(2).values.T
    return out.sequences[0, len(prompt) :].numpy(), float(
        (first - second).min() / logits.abs().max()
    )


@functools.partial(quick_jit, static_argnums=0)
def greedy(net, params, ids, lengths):
    params, width = net.unstack(params), ids.shape[1]
    slots = jnp.arange(width + NEW)
    hidden, cache = net.prefill(params, ids, lengths, cache_size=width + NEW)
    first = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def step(carry, j):
        state, cache = carry
        token = jnp.argmax(net.logits(params, state), axis=-1).astype(jnp.int32)
        valid = (slots < lengths[:, None]) | ((slots >= width) & (slots <= width + j))
        state, cache = net.decode(params, token, lengths + j, cache, slot=width + j, valid=valid)
        return (state, cache), token

    return jax.lax.scan(step, (first, cache), jnp.arange(NEW))[1].T
