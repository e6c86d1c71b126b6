"""Logit processors and the draw: pure functions of float32 logits [b v].

Each processor means what transformers' processor of that name means, and `process` applies them in
transformers' order. None of them sorts the vocabulary: on a CPU a sort costs forty times the sums
used here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# The logit of a token that cannot be drawn.
BANNED = -jnp.inf

# Block of the two-level search in `draw`.
BLOCK = 256


def temperature(logits: Float[Array, "b v"], value: float) -> Float[Array, "b v"]:
    """logits / value."""
    return logits if value == 1.0 else logits / value


def top_k(logits: Float[Array, "b v"], k: int | None) -> Float[Array, "b v"]:
    """Keeps the k largest logits, and all that equal the k-th; 0 or None keeps everything."""
    if not k or k >= logits.shape[1]:
        return logits
    smallest_kept = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < smallest_kept, BANNED, logits)


def top_p(logits: Float[Array, "b v"], p: float | None) -> Float[Array, "b v"]:
    """Nucleus sampling: keeps a token when the tokens more probable than it have less mass than p.

    That is the smallest set of most probable tokens whose mass reaches p; of tokens that tie at its
    border, all stay (a sort would keep an arbitrary few). The most probable token always stays. The
    border is found by bisection over probabilities, to the last bit of float32.

    References:
        Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
    """
    if p is None or p >= 1.0:
        return logits
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    wanted = p * jnp.sum(weights, axis=1, keepdims=True)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        # Invariant: the mass above `low` reaches `wanted`, the mass above `high` does not.
        low, high = ends
        middle = low + (high - low) // 2
        border = jax.lax.bitcast_convert_type(middle, jnp.float32)
        above = jnp.sum(jnp.where(weights > border, weights, 0.0), axis=1, keepdims=True)
        reached = above >= wanted
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    # Non-negative floats are ordered like their bits, and 30 halvings bring 0 and 1 together. The
    # largest weight is 1: nothing lies above it. All mass lies above 0.
    one = jax.lax.bitcast_convert_type(jnp.ones_like(wanted), jnp.int32)
    _, border = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(one), one))
    border = jax.lax.bitcast_convert_type(border, jnp.float32)
    return jnp.where(weights < border, BANNED, logits)


def min_p(logits: Float[Array, "b v"], p: float | None) -> Float[Array, "b v"]:
    """Keeps tokens with at least p times the probability of the most probable one.

    References:
        Nguyen et al., "Min-p Sampling", 2024.
    """
    if not p:
        return logits
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return jnp.where(weights < p, BANNED, logits)


def repetition_penalty(
    logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: float
) -> Float[Array, "b v"]:
    """Divides positive logits of seen tokens by the penalty and multiplies negative ones by it.

    Args:
        logits: before the temperature.
        seen: which tokens the prompt and the completion so far hold (`seen_tokens`).
        penalty: above 1 discourages repetition; 1 does nothing.

    References:
        Keskar et al., "CTRL", 2019, §4.1.
    """
    if penalty == 1.0:
        return logits
    punished = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, punished, logits)


def seen_tokens(
    ids: Int[Array, "b s"], lengths: Int[Array, " b"], *, vocab: int
) -> Bool[Array, "b v"]:
    """Which tokens stand in the first `lengths` positions of each row; padding is not seen."""
    real = jnp.arange(ids.shape[1])[None, :] < lengths[:, None]
    rows = jnp.broadcast_to(jnp.arange(ids.shape[0])[:, None], ids.shape)
    counts = jnp.zeros((ids.shape[0], vocab), jnp.int32)
    return counts.at[rows, ids].add(real.astype(jnp.int32), mode="drop") > 0


def see(seen: Bool[Array, "b v"], tokens: Int[Array, " b"]) -> Bool[Array, "b v"]:
    """`seen` with one more token per row."""
    return seen.at[jnp.arange(tokens.shape[0]), tokens].set(True, mode="drop")


def ban(
    logits: Float[Array, "b v"], tokens: tuple[int, ...], *, where: Bool[Array, " b"]
) -> Float[Array, "b v"]:
    """Forbids the tokens in the rows `where` (EOS, while `min_new_tokens` is not reached)."""
    if not tokens:
        return logits
    columns = jnp.arange(logits.shape[1])[None, :]
    named = (columns[:, :, None] == jnp.array(tokens)[None, None, :]).any(axis=2)
    return jnp.where(named & where[:, None], BANNED, logits)


def process(
    logits: Float[Array, "b v"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[Array, "b v"]:
    """Temperature, top-k, top-p, min-p, in transformers' order (penalty and bans come before)."""
    logits = _temperature(logits, temperature)
    return _min_p(_top_p(_top_k(logits, top_k), top_p), min_p)


# `process` takes arguments of these names.
_temperature, _top_k, _top_p, _min_p = temperature, top_k, top_p, min_p


def draw(keys: Key[Array, " b"], logits: Float[Array, "b v"]) -> Int[Array, " b"]:
    """Draws one token per row from softmax(logits).

    Inverts the cumulative distribution in two levels, each with a uniform number of its own: a
    block of the vocabulary, then a token within it (so that improbable tokens are told apart, which
    the 24 bits of one number could not). A key belongs to its row, so a row draws the same token in
    any batch and on any number of devices. (Gumbel noise for the whole vocabulary would cost
    sixteen times as much on a CPU.)

    Args:
        keys: one typed PRNG key per row.
        logits: processed; -inf is never drawn. At least one logit of a row must be finite.

    Returns:
        Token ids, int32.
    """
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0), (0, -logits.shape[1] % BLOCK)])
    blocks = weights.reshape(weights.shape[0], -1, BLOCK)
    block = _invert(jnp.sum(blocks, axis=2), u[:, :1])
    inside = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    return (block * BLOCK + _invert(inside, u[:, 1:]))[:, 0]


def _invert(weights: Float[Array, "b m"], u: Float[Array, "b 1"]) -> Int[Array, "b 1"]:
    """The index at which the running sum of weights passes u times their total."""
    sums = jnp.cumsum(weights, axis=1)
    # Partial sums are rounded in different orders and need not grow with every term: the first past
    # the goal could else have weight 0, or not exist.
    passed = (sums > u * sums[:, -1:]) & (weights > 0)
    index = jnp.arange(weights.shape[1], dtype=jnp.int32)[None, :]
    beyond = weights.shape[1]
    first = jnp.min(jnp.where(passed, index, beyond), axis=1, keepdims=True)
    last = jnp.max(jnp.where(weights > 0, index, 0), axis=1, keepdims=True)
    return jnp.where(first == beyond, last, first)


def greedy(logits: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The most probable token; of equal ones the first."""
    return jnp.argmax(logits, axis=1).astype(jnp.int32)


def taken_logps(logits: Float[Array, "b v"], tokens: Int[Array, " b"]) -> Float[Array, " b"]:
    """log softmax(logits) of one token per row, the way `ops.logps` computes it."""
    largest = jnp.max(logits, axis=1, keepdims=True)
    log_z = largest[:, 0] + jnp.log(jnp.sum(jnp.exp(logits - largest), axis=1))
    return jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - log_z
