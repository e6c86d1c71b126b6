"""Log-probs, entropy and top-1 flags of given tokens, without the [tokens, vocabulary] array.

The one log-prob function of the project (contract 3): float32 log-softmax of logits / temperature.
Logits exist for one chunk of rows at a time, in the forward and again in the backward pass, which
recomputes them (contract 4).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jrlhf.ops.layout import platform, rows_last, written
from jrlhf.ops.turned import Turned

# Of the float32 logits of one chunk: on a CPU in all, so that passes over them stay near the cache;
# elsewhere on each device. With smaller chunks the head is read, and its gradient accumulated and
# summed over devices, more often.
CHUNK_BYTES = {"cpu": 64 * 2**20}
CHUNK_BYTES_PER_DEVICE = 512 * 2**20

# Stands for a logit that cannot be: its probability is exactly 0, and 0 · finite is not NaN.
NEVER = -1e30


def head_logits(
    hidden: Float[Array, "t d"],
    head: Float[Array, "d v"] | Turned,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab: int | None = None,
    tied: bool = False,
) -> Float[Array, "t v"]:
    """The logits that samplers and scorers share: float32, soft-capped, divided by the temperature.

    Args:
        hidden: states after the final norm.
        head: output weights; their dtype is the dtype of the matmul, whose result is float32.
            Turned for a few rows at a time, on a CPU.
        temperature: divides the logits, after the cap.
        softcap: c in c·tanh(logits / c) (Gemma 2), or None.
        vocab: columns from here on are padding of the head and get probability 0.
        tied: the head is an embedding's table, transposed, and is read as the table lies.

    Returns:
        The logits. One row per token: for a chunk of a sequence, or one decoding step.
    """
    if isinstance(head, Turned):
        raw = head.dot(hidden)
    else:
        raw = _dot(hidden.astype(head.dtype), written(head.T) if tied else head, tied)
    return _bent(raw, temperature, softcap, vocab)


def _dot(x: Float[Array, "t n"], head: Array, across: bool) -> Float[Array, "t m"]:
    """x times the head, or times its transpose where `across`; float32."""
    axes = ((1,), (1 if across else 0,))
    return jax.lax.dot_general(x, head, (axes, ((), ())), preferred_element_type=jnp.float32)


def _bent(
    logits: Float[Array, "t v"], temperature: float, softcap: float | None, vocab: int | None
) -> Float[Array, "t v"]:
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if temperature != 1.0:
        logits = logits / temperature
    if vocab is not None and vocab < logits.shape[1]:
        logits = jnp.where(jnp.arange(logits.shape[1])[None, :] < vocab, logits, NEVER)
    return logits


def token_logps(
    hidden: Float[Array, "t d"],
    head: Float[Array, "d v"],
    targets: Int[Array, " t"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    entropy: bool = True,
    vocab: int | None = None,
    tied: bool = False,
) -> tuple[Float[Array, " t"], Float[Array, " t"], Float[Array, " t"]]:
    """Log-prob of each target token, entropy of its distribution, and whether it is the top one.

    Differentiable in `hidden` and `head` through the log-probs and the entropy. A gradient that
    nobody asks for costs nothing: with a frozen head its [d v] gradient is never computed.

    Args:
        hidden: states after the final norm, one per token.
        head: output weights.
        targets: token ids, in [0, vocab).
        temperature: divides the logits.
        softcap: c in c·tanh(logits / c), or None.
        chunk: rows whose logits exist at a time, over all devices; None chooses by `CHUNK_BYTES`.
        entropy: False saves a pass over the logits, and the entropy comes back as zeros.
        vocab: columns of the head from here on are padding.
        tied: the head is an embedding's table, transposed, and is read as the table lies.

    Returns:
        float32 arrays: log-probs in nats; entropies in nats, never negative; 1.0 where the target
        is the argmax of the logits (of equal ones the first).
    """
    tokens = targets.shape[0]
    scored = _Scored(
        temperature=float(temperature),
        softcap=None if softcap is None else float(softcap),
        vocab=vocab,
        entropy=entropy,
        chunks=_count_chunks(tokens, chunk or _default_chunk(head.shape[1])),
        tied=tied,
    )
    # Turned back here, so that it is done once for all chunks.
    head = written(head.T) if tied else head
    return _token_logps(scored, hidden.astype(head.dtype), head, targets)


class _Scored(NamedTuple):
    """The static arguments of `_token_logps`."""

    temperature: float
    softcap: float | None
    vocab: int | None
    entropy: bool
    chunks: int
    tied: bool  # the head is [v d]

    def logits(self, hidden: Array, head: Array) -> Array:
        return _bent(_dot(hidden, head, self.tied), self.temperature, self.softcap, self.vocab)


def _default_chunk(vocab: int) -> int:
    budget = CHUNK_BYTES.get(platform(), CHUNK_BYTES_PER_DEVICE * jax.device_count())
    return max(1, budget // (4 * vocab))


def _count_chunks(tokens: int, chunk: int) -> int:
    """Chunks of at most `chunk` rows; a few more where that makes them equal and spares padding."""
    fewest = max(1, -(-tokens // chunk))
    for count in range(fewest, min(2 * fewest, tokens) + 1):
        if tokens % count == 0:
            return count
    return fewest


def _split(x: Array, chunks: int) -> Array:
    """[t, ...] -> [chunks, rows, ...], where chunk i takes rows i, i + chunks, i + 2·chunks, ….

    Strided, because t is cut over devices in contiguous blocks: so every chunk has its share of
    rows on every device, and no device waits for another's chunk.
    """
    padding = -x.shape[0] % chunks
    if padding:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array, tokens: int) -> Array:
    """Undoes `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]


def _forward_chunk(scored: _Scored, head: Array, hidden: Array, targets: Array) -> tuple:
    logits = scored.logits(hidden, head)
    columns = jnp.arange(logits.shape[1], dtype=jnp.float32)[None, :]
    largest = jnp.max(logits, axis=1, keepdims=True)
    exps = jnp.exp(logits - largest)
    total = jnp.sum(exps, axis=1)
    log_z = largest[:, 0] + jnp.log(total)
    taken = jnp.take_along_axis(logits, targets[:, None], axis=1)
    # The target is the first of the largest. Not by `argmax` or a select, which XLA on CPUs makes a
    # pass of its own: before the target the limit is beyond every logit, from it on below all.
    ahead = targets[:, None].astype(jnp.float32) - 0.5 - columns
    before = jnp.max(jnp.minimum(logits, ahead * jnp.finfo(jnp.float32).max), axis=1)
    correct = (taken[:, 0] >= largest[:, 0]) & (taken[:, 0] > before)
    spread = jnp.zeros_like(log_z)
    if scored.entropy:
        # H = log Z - E[z] = log Σ e - E[z - max], which rounds less than with raw logits.
        inner = jnp.sum(exps * (logits - largest), axis=1) / total
        spread = jnp.maximum(jnp.log(total) - inner, 0.0)
    return taken[:, 0] - log_z, spread, correct.astype(jnp.float32), log_z


def _forward(scored: _Scored, hidden: Array, head: Array, targets: Array) -> tuple:
    chunk = functools.partial(_forward_chunk, scored, head)
    if scored.chunks == 1:
        return chunk(hidden, targets)
    rows = (_split(hidden, scored.chunks), _split(targets, scored.chunks))
    _, results = jax.lax.scan(lambda _, row: (None, chunk(*row)), None, rows)
    return tuple(_join(result, targets.shape[0]) for result in results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logps(scored: _Scored, hidden: Array, head: Array, targets: Array) -> tuple:
    return _forward(scored, hidden, head, targets)[:3]


def _save(scored: _Scored, hidden: Any, head: Any, targets: Any) -> tuple:
    *results, log_z = _forward(scored, hidden.value, head.value, targets.value)
    residuals = (hidden.value, head.value, targets.value, log_z, results[1])
    return tuple(results), (residuals, _Wanted(hidden.perturbed), _Wanted(head.perturbed))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Whether anybody differentiates by an argument: known while tracing."""

    yes: bool


def _backward(scored: _Scored, saved: tuple, cotangents: tuple) -> tuple:
    """d logps/dz = onehot - p;  d H/dz = -p (log p + H);  then through cap, temperature, matmul."""
    (hidden, head, targets, log_z, entropy), wants_hidden, wants_head = saved
    slopes = [None if isinstance(g, SymbolicZero) else g for g in cotangents[:2]]
    if not scored.entropy:
        slopes[1] = None
    if slopes == [None, None] or not (wants_hidden.yes or wants_head.yes):
        return jnp.zeros_like(hidden), jnp.zeros_like(head), None

    def chunk(head_gradient: Array | None, row: tuple) -> tuple:
        hidden, targets, log_z, entropy, slope, entropy_slope = row
        z_gradient = _logits_gradient(
            scored, hidden, head, targets, log_z, entropy, slope, entropy_slope
        ).astype(head.dtype)
        if head_gradient is not None:
            head_gradient = head_gradient + jnp.dot(
                rows_last(hidden), z_gradient, preferred_element_type=jnp.float32
            )
        hidden_gradient = None
        if wants_hidden.yes:
            hidden_gradient = _dot(z_gradient, head, not scored.tied).astype(hidden.dtype)
        return head_gradient, hidden_gradient

    whole = head.shape[::-1] if scored.tied else head.shape
    start = jnp.zeros(whole, jnp.float32) if wants_head.yes else None
    rows = (hidden, targets, log_z, entropy, *slopes)
    if scored.chunks == 1:
        head_gradient, hidden_gradient = chunk(start, rows)
    else:
        rows = jax.tree.map(lambda x: _split(x, scored.chunks), rows)
        head_gradient, hidden_gradient = jax.lax.scan(chunk, start, rows)
        if hidden_gradient is not None:
            hidden_gradient = _join(hidden_gradient, targets.shape[0])
    if hidden_gradient is None:
        hidden_gradient = jnp.zeros_like(hidden)
    if head_gradient is None:
        return hidden_gradient, jnp.zeros_like(head), None
    head_gradient = head_gradient.astype(head.dtype)
    # Turned after the cast: XLA on CPUs would fold it into a bfloat16 dot that it cannot run.
    return hidden_gradient, head_gradient.T if scored.tied else head_gradient, None


def _logits_gradient(
    scored: _Scored,
    hidden: Array,
    head: Array,
    targets: Array,
    log_z: Array,
    entropy: Array,
    slope: Array | None,
    entropy_slope: Array | None,
) -> Array:
    """Gradient by the raw logits hidden @ head of one chunk."""
    logits = scored.logits(hidden, head)
    log_p = logits - log_z[:, None]
    p = jnp.exp(log_p)
    gradient = jnp.zeros_like(logits)
    if slope is not None:
        taken = jnp.arange(logits.shape[1])[None, :] == targets[:, None]
        gradient = slope[:, None] * (taken.astype(jnp.float32) - p)
    if entropy_slope is not None:
        gradient = gradient - entropy_slope[:, None] * p * (log_p + entropy[:, None])
    if scored.softcap is not None:
        # logits = c·tanh(raw / c) / T; padded columns have p = 0, and with it gradient 0.
        bent = jnp.square(logits * (scored.temperature / scored.softcap))
        gradient = gradient * (1.0 - jnp.minimum(bent, 1.0))
    return gradient if scored.temperature == 1.0 else gradient / scored.temperature


_token_logps.defvjp(_save, _backward, symbolic_zeros=True)
