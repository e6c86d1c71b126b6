"""Sampling as one jitted function: prefill, then a `while_loop` that ends when all rows have ended.

Row `i` draws token `t` with `fold_in(keys[i], t)`, so what a row samples depends on its own key and
prompt alone, not on its neighbours, its place in the batch or the padding.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jrlhf.errors import ConfigError
from jrlhf.models.build import Net
from jrlhf.ops import sampling as ops
from jrlhf.ops.layout import platform
from jrlhf.ops.logps import head_logits
from jrlhf.ops.turned import Turned
from jrlhf.rollout.devices import active
from jrlhf.rollout.stops import Stops
from jrlhf.types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample; hashable, one executable per value.

    Attributes:
        max_new_tokens: longest completion, EOS included.
        do_sample: False takes the most probable token.
        temperature: divides the logits, also of the returned log-probs; no effect on greedy choice.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this mass; 1 keeps all.
        min_p: keep tokens with at least this share of the best one's probability; 0 keeps all.
        repetition_penalty: divides positive (multiplies negative) logits of tokens already in the
            prompt or the completion; 1 does nothing.
        min_new_tokens: no EOS before so many tokens.
        eos_token_ids: any of these ends a row.
        pad_token_id: written after the end of a row.
    """

    max_new_tokens: int = 20
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "must be at least 1"),
            "temperature": (
                self.temperature > 0,
                "must be positive (do_sample=False is greedy)",
            ),
            "top_k": (self.top_k >= 0, "must not be negative; 0 is off"),
            "top_p": (0 < self.top_p <= 1, "must lie in (0, 1]; 1 is off"),
            "min_p": (0 <= self.min_p <= 1, "must lie in [0, 1]; 0 is off"),
            "repetition_penalty": (self.repetition_penalty > 0, "must be positive; 1 is off"),
            "min_new_tokens": (self.min_new_tokens >= 0, "must not be negative"),
        }
        for name, (fine, rule) in rules.items():
            if not fine:
                raise ConfigError(f"{name} {rule}, got {getattr(self, name)!r}.")


class Sampled(NamedTuple):
    """Completions, right-padded with the pad token; everything after a row's end is exactly 0.

    Attributes:
        ids: sampled tokens.
        lengths: tokens of each row, EOS included.
        logps: log-prob of each token under softmax(logits / temperature) over the whole
            vocabulary, before top-k, top-p, min-p and penalties: what `score.outputs` computes.
        done: True where an EOS or a stop string ended the row.
        steps: tokens drawn before all rows had ended; the others cost nothing.
    """

    ids: Int[Array, "r n"]
    lengths: Int[Array, " r"]
    logps: Float[Array, "r n"]
    done: Bool[Array, " r"]
    steps: Int[Array, ""]


class _State(NamedTuple):
    out: Sampled
    last: Int[Array, " r"]  # the newest token, not yet in the cache
    cache: PyTree
    seen: Bool[Array, "r v"] | None  # tokens in prompt or completion; None without a penalty
    matched: Int[Array, " r"]  # state of the stop strings' automaton


@functools.partial(jax.jit, static_argnames=("net", "sampling", "mesh"))
def sample(
    net: Net,
    params: PyTree,
    prompt_ids: Int[Array, "b p"],
    prompt_lengths: Int[Array, " b"],
    keys: Key[Array, " r"],
    sampling: SamplingParams,
    limit: Int[Array, ""] | int | None = None,
    stops: Stops | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Sampled:
    """Samples completions for right-padded prompts.

    Args:
        net: a causal language model.
        params: its parameters.
        prompt_ids: prompts, padded on the right with anything.
        prompt_lengths: real tokens of each prompt; a row of length 0 is filler and samples nothing.
        keys: one typed key per completion, r = b · g of them: the completions of a prompt are
            neighbours, and its prefill is run once for all g.
        sampling: see `SamplingParams`.
        limit: stop after so many tokens, at most `max_new_tokens`; traced, so that near-by limits
            share one executable.
        stops: also ends a row; see `rollout.stops`.
        mesh: over which rows and parameters are cut; None: one device.
    """
    with active(mesh):
        return _sample(net, params, prompt_ids, prompt_lengths, keys, sampling, limit, stops)


def _sample(
    net: Net,
    params: PyTree,
    prompt_ids: Int[Array, "b p"],
    prompt_lengths: Int[Array, " b"],
    keys: Key[Array, " r"],
    sampling: SamplingParams,
    limit: Int[Array, ""] | int | None,
    stops: Stops | None,
) -> Sampled:
    (b, p), r, n = prompt_ids.shape, keys.shape[0], sampling.max_new_tokens
    limit = jnp.int32(n) if limit is None else jnp.minimum(jnp.asarray(limit, jnp.int32), n)
    lengths = jnp.maximum(prompt_lengths, 1)  # filler rows must not index position -1
    hidden, cache = net.prefill(params, prompt_ids, lengths, cache_size=p + n)
    last_hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    if r != b:
        per_prompt = (last_hidden, cache, lengths, prompt_ids, prompt_lengths)
        spread = jax.tree.map(lambda x: jnp.repeat(x, r // b, axis=0), per_prompt)
        last_hidden, cache, lengths, prompt_ids, prompt_lengths = spread
    light = net.unstack(params)
    head = Turned.of(net.head(light), 1) if platform() == "cpu" else net.head(light)

    in_prompt = jnp.arange(p)[None, :] < prompt_lengths[:, None]
    steps = jnp.arange(p + n)[None, :]
    in_cache = jnp.pad(in_prompt, ((0, 0), (0, n)))

    def draw(state: _State, hidden: Float[Array, "r d"]) -> _State:
        return _draw(net, head, keys, sampling, stops, state, hidden)

    def body(state: _State) -> _State:
        j = state.out.steps - 1  # this token's index in the completion
        valid = in_cache | ((steps >= p) & (steps <= p + j))
        hidden, cache = net.decode(
            light, state.last, lengths + j, state.cache, slot=p + j, valid=valid
        )
        return draw(state._replace(cache=cache), hidden)

    def running(state: _State) -> Bool[Array, ""]:
        return (state.out.steps < limit) & ~jnp.all(state.out.done)

    blank = Sampled(
        ids=jnp.full((r, n), sampling.pad_token_id, jnp.int32),
        lengths=jnp.zeros((r,), jnp.int32),
        logps=jnp.zeros((r, n), jnp.float32),
        done=prompt_lengths == 0,
        steps=jnp.int32(0),
    )
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = ops.seen_tokens(prompt_ids, prompt_lengths, vocab=head.shape[-1])
    none = jnp.zeros((r,), jnp.int32)
    first = _State(blank, none, cache, seen, none)
    out = jax.lax.while_loop(running, body, draw(first, last_hidden)).out
    return out._replace(done=out.done & (prompt_lengths > 0))


def _draw(
    net: Net,
    head: Float[Array, "d v"] | Turned,
    keys: Key[Array, " r"],
    sampling: SamplingParams,
    stops: Stops | None,
    state: _State,
    hidden: Float[Array, "r d"],
) -> _State:
    """Draws the next token of every row from its newest hidden state."""
    out = state.out
    t = out.steps
    spec = net.spec
    logits = head_logits(
        net.head_states(hidden), head, softcap=spec.final_softcap, vocab=spec.vocab_size
    )
    scaled = ops.temperature(logits, sampling.temperature)
    chosen = logits
    if state.seen is not None:
        chosen = ops.repetition_penalty(chosen, state.seen, sampling.repetition_penalty)
    if sampling.min_new_tokens:
        early = jnp.full(chosen.shape[:1], t < sampling.min_new_tokens)
        chosen = ops.ban(chosen, sampling.eos_token_ids, where=early)
    if sampling.do_sample:
        chosen = ops.process(
            chosen,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        token = ops.draw(jax.vmap(jax.random.fold_in, (0, None))(keys, t), chosen)
    else:
        token = ops.greedy(chosen)
    token = jnp.where(out.done, sampling.pad_token_id, token)
    logp = jnp.where(out.done, 0.0, ops.taken_logps(scaled, token))
    ended = jnp.isin(token, jnp.asarray(sampling.eos_token_ids, jnp.int32))
    seen = None if state.seen is None else ops.see(state.seen, token)
    matched = state.matched
    if stops is not None:
        matched = jnp.where(t == 0, stops.first[token], stops.following[matched, token])
        ended |= matched == len(stops.following) - 1
    out = Sampled(
        ids=jax.lax.dynamic_update_index_in_dim(out.ids, token, t, axis=1),
        lengths=out.lengths + ~out.done,
        logps=jax.lax.dynamic_update_index_in_dim(out.logps, logp, t, axis=1),
        done=out.done | ended,
        steps=t + 1,
    )
    return _State(out, token, state.cache, seen, matched)
