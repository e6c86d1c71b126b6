"""Softmax attention with grouped key-value heads: causal over tokens, or over a cache.

Sliding windows, soft-caps and sinks are part of the same code, and absent from the program of a
model that has none.

Keys and values are never repeated: the query heads of one group are rows of the same matrix.
Queries are cut into a few static blocks, each of which meets only the keys up to its own end, so
most of the work above the diagonal is never done. The backward pass keeps queries, keys, values,
output and one log-sum-exp per row, and computes the weights again (as in FlashAttention).

Dots have operands of the compute dtype and float32 results; the softmax is float32.

References:
    Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jrlhf.ops.layout import written

# Finite, so that a row with no allowed key (there is none by construction) could not make nan.
BLOCKED = -1e30
# Blocks of at least this many queries, and at most so many blocks: each is unrolled into the graph.
MIN_BLOCK, MAX_BLOCKS = 64, 4


class Scoring(NamedTuple):
    """How scores are made of q·k (static).

    Attributes:
        scale: factor; None is 1/sqrt(e).
        softcap: c in c·tanh(score / c), or None.
    """

    scale: float | None = None
    softcap: float | None = None


PLAIN = Scoring()

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend_cache(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b k e t"],
    v: Float[Array, "b k t e"],
    valid: Bool[Array, "b t"],
    sinks: Float[Array, " h"] | None = None,
    *,
    dtype: str,
    scoring: Scoring = PLAIN,
) -> Float[Array, "b s h e"]:
    """Each query reads the slots of its row's cache that `valid` allows."""
    b, s, h, e = q.shape
    n = k.shape[1]
    rows = _grouped(q, n, dtype, scale=scoring.scale).reshape(b, n, (h // n) * s, e)
    raw = _einsum("bnme,bnet->bnmt", rows.astype(k.dtype), k)
    sink = _sink_rows(sinks, n, s)
    out, _ = _block(raw, v, valid[:, None, None, :], scoring.softcap, sink, dtype)
    return _merged(out.reshape(b, n, h // n, s, e)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_causal(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k e"],
    segments: Int[Array, "b s"] | None,
    window: Int[Array, ""] | None,
    sinks: Float[Array, " h"] | None,
    dtype: str,
    scoring: Scoring,
) -> Float[Array, "b s h e"]:
    """Each query reads the keys at and before it, of its own segment when segments are given.

    Args:
        q: queries, rotated.
        k: keys, rotated.
        v: values.
        segments: document of each token.
        window: keys that a query reads, its own included; None: all before it.
        sinks: a score per head that takes weight and gives no value.
        dtype: type of the dots' operands and of the result.
        scoring: scale and soft-cap.
    """
    return _forward(q, k, v, segments, window, sinks, dtype, scoring)[0]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    window: Array | None,
    sinks: Array | None,
    dtype: str,
    scoring: Scoring,
) -> tuple[Array, tuple[Array | None, ...]]:
    b, s, h, e = q.shape
    n = k.shape[2]
    g = h // n
    rows = written(_grouped(q, n, dtype, scale=scoring.scale))
    keys, values = (written(x.astype(dtype).swapaxes(1, 2)) for x in (k, v))
    outs, sums = [], []
    for start, end in _blocks(s):
        block = rows[:, :, :, start:end].reshape(b, n, g * (end - start), e)
        allowed = jnp.tile(_allowed(segments, window, start, end), (1, g, 1))[:, None]
        sink = _sink_rows(sinks, n, end - start)
        raw = _einsum("bnme,bnte->bnmt", block, keys[:, :, :end])
        out, lse = _block(raw, values[:, :, :end], allowed, scoring.softcap, sink, dtype)
        outs.append(out.reshape(b, n, g, end - start, e))
        sums.append(lse.reshape(b, n, g, end - start))
    out = checkpoint_name(_merged(jnp.concatenate(outs, axis=3)).astype(dtype), "attention")
    lse = checkpoint_name(jnp.concatenate(sums, axis=3), "attention")
    return out, (rows, keys, values, segments, window, sinks, out, lse)


def _backward(
    dtype: str, scoring: Scoring, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, Array, None, None, Array | None]:
    rows, keys, values, segments, window, sinks, out, lse = saved
    b, n, g, s, e = rows.shape
    d_rows = written(_grouped(d_out, n, dtype, scale=1.0))
    dots = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dots = dots.reshape(b, s, n, g).transpose(0, 2, 3, 1)
    d_queries = []
    d_keys = jnp.zeros(keys.shape, jnp.float32)
    d_values = jnp.zeros(values.shape, jnp.float32)
    for start, end in _blocks(s):
        m = g * (end - start)

        def cut(x: Array, start: int = start, end: int = end, m: int = m) -> Array:
            return x[:, :, :, start:end].reshape(b, n, m, *x.shape[4:])

        q, d_o, k, v = cut(rows), cut(d_rows), keys[:, :, :end], values[:, :, :end]
        allowed = jnp.tile(_allowed(segments, window, start, end), (1, g, 1))[:, None]
        raw = _einsum("bnme,bnte->bnmt", q, k)
        capped = _capped(raw, scoring.softcap)
        scores = jnp.where(allowed, capped, BLOCKED)
        weights = jnp.exp(scores - cut(lse)[..., None])
        d_weights = _einsum("bnme,bnte->bnmt", d_o, v)
        d_scores = weights * (d_weights - cut(dots)[..., None])
        if scoring.softcap is not None:
            d_scores = d_scores * (1.0 - jnp.square(capped / scoring.softcap))
        d_scores = d_scores.astype(dtype)
        d_v = _einsum("bntm,bnme->bnte", written(weights.astype(dtype).swapaxes(2, 3)), d_o)
        d_k = _einsum("bntm,bnme->bnte", written(d_scores.swapaxes(2, 3)), q)
        d_q = _einsum("bnmt,bnte->bnme", d_scores, k)
        d_values = d_values.at[:, :, :end].add(d_v)
        d_keys = d_keys.at[:, :, :end].add(d_k)
        d_queries.append(d_q.reshape(b, n, g, end - start, e))
    scale = e**-0.5 if scoring.scale is None else scoring.scale
    d_q = _merged(jnp.concatenate(d_queries, axis=3)) * scale
    d_sinks = None
    if sinks is not None:
        # The sink's own weight times minus what the row's other weights are worth together.
        taken = jnp.exp(sinks.astype(jnp.float32).reshape(n, g, 1) - lse)
        d_sinks = -jnp.sum(taken * dots, axis=(0, 3)).reshape(n * g).astype(sinks.dtype)
    return d_q, d_keys.swapaxes(1, 2), d_values.swapaxes(1, 2), None, None, d_sinks


attend_causal.defvjp(_forward, _backward)


def _block(
    raw: Float[Array, "b n m t"],
    v: Float[Array, "b n t e"],
    allowed: Bool[Array, "#b 1 #m t"],
    softcap: float | None,
    sink: Float[Array, "1 n m 1"] | None,
    dtype: str,
) -> tuple[Float[Array, "b n m e"], Float[Array, "b n m"]]:
    """Attention of query rows with these raw scores, and the log-sum-exp of each row's scores."""
    scores = jnp.where(allowed, _capped(raw, softcap), BLOCKED)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    if sink is not None:
        largest = jnp.maximum(largest, sink)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - largest)
    out = _einsum("bnmt,bnte->bnme", weights.astype(dtype).astype(v.dtype), v) / total
    return out, (largest + jnp.log(total))[..., 0]


def _capped(scores: Array, softcap: float | None) -> Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _sink_rows(sinks: Float[Array, " h"] | None, n: int, s: int) -> Float[Array, "1 n m 1"] | None:
    """Each query row's sink, where a group's rows are its heads times s queries."""
    if sinks is None:
        return None
    return jnp.repeat(sinks.astype(jnp.float32).reshape(n, -1), s, axis=1)[None, :, :, None]


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Cuts the queries: (start, end) of each block."""
    count = max(1, min(MAX_BLOCKS, length // MIN_BLOCK))
    size = -(-length // count)
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _allowed(
    segments: Int[Array, "b s"] | None, window: Int[Array, ""] | None, start: int, end: int
) -> Bool[Array, "#b m t"]:
    """Which of the keys 0 .. end-1 the queries start .. end-1 may read."""
    causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
    if window is not None:
        # Documents lie in one piece, so that a distance in the row is one in the document.
        causal &= jnp.arange(start, end)[:, None] - jnp.arange(end)[None] < window
    if segments is None:
        # Rows are right-padded: causality alone keeps real queries away from padding.
        return causal[None]
    return causal & (segments[:, start:end, None] == segments[:, None, :end])


def _grouped(
    q: Float[Array, "b s h e"], n: int, dtype: str, *, scale: float | None = None
) -> Float[Array, "b n g s e"]:
    """Query heads by the key-value head they share, scaled by 1/sqrt(e)."""
    b, s, h, e = q.shape
    q = (q * (e**-0.5 if scale is None else scale)).astype(dtype)
    return q.reshape(b, s, n, h // n, e).transpose(0, 2, 3, 1, 4)


def _merged(x: Float[Array, "b n g s e"]) -> Float[Array, "b s h e"]:
    b, n, g, s, e = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, s, n * g, e)
