from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops import sampling
from jrlhf.ops.logps import token_logps

B, V = 6, 700  # more than two blocks of the draw, and not a multiple of one


def logits_of(rng, b=B, v=V, scale=3.0):
    return jnp.array(rng.normal(size=(b, v)) * scale, jnp.float32)


def kept(logits):
    return np.isfinite(np.asarray(logits))


def nucleus(row, p):
    """Indices of the smallest set of most probable tokens whose mass reaches p, float64."""
    probabilities = np.exp(row.astype(np.float64) - row.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    return set(order[before < p]) | {order[0]}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_whose_mass_reaches_p(rng, p):
    logits = logits_of(rng)
    found = kept(sampling.top_p(logits, p))
    for row, mask in zip(np.asarray(logits), found, strict=True):
        assert set(np.flatnonzero(mask)) == nucleus(row, p)


@pytest.mark.parametrize("p", [None, 1.0])
def test_top_p_of_everything_keeps_everything(rng, p):
    logits = logits_of(rng)
    np.testing.assert_array_equal(sampling.top_p(logits, p), logits)


def test_top_p_keeps_all_that_tie_at_its_border():
    assert kept(sampling.top_p(jnp.zeros((1, 5)), 0.5)).all()
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1]]))
    np.testing.assert_array_equal(kept(sampling.top_p(logits, 0.6)), [[1, 1, 1, 0]])


def test_top_p_after_other_bans_never_revives_a_token(rng):
    logits = sampling.top_k(logits_of(rng), 5)
    assert (kept(sampling.top_p(logits, 0.99)) <= kept(logits)).all()
    alone = jnp.full((1, 4), -jnp.inf).at[0, 2].set(0.0)
    np.testing.assert_array_equal(kept(sampling.top_p(alone, 0.9)), [[0, 0, 1, 0]])


@pytest.mark.parametrize("k", [1, 5, V])
def test_top_k_keeps_the_k_largest(rng, k):
    logits = logits_of(rng)
    found = kept(sampling.top_k(logits, k))
    assert (found.sum(axis=1) == k).all()
    for row, mask in zip(np.asarray(logits), found, strict=True):
        assert set(np.flatnonzero(mask)) == set(np.argsort(-row)[:k])


@pytest.mark.parametrize("k", [None, 0, V + 1])
def test_top_k_that_is_off_keeps_everything(rng, k):
    logits = logits_of(rng)
    np.testing.assert_array_equal(sampling.top_k(logits, k), logits)


def test_min_p_keeps_what_is_probable_enough_relative_to_the_best(rng):
    logits = logits_of(rng)
    probabilities = np.asarray(jax.nn.softmax(logits))
    expected = probabilities >= 0.05 * probabilities.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(kept(sampling.min_p(logits, 0.05)), expected)
    np.testing.assert_array_equal(sampling.min_p(logits, None), logits)


def test_a_processor_leaves_kept_logits_as_they_were(rng):
    logits = logits_of(rng)
    for f in (
        lambda x: sampling.top_k(x, 7),
        lambda x: sampling.top_p(x, 0.8),
        lambda x: sampling.min_p(x, 0.1),
    ):
        found = f(logits)
        np.testing.assert_array_equal(found, jnp.where(kept(found), logits, -jnp.inf))
        assert 0 < kept(found).sum() < kept(found).size


def test_process_applies_temperature_first_and_then_the_filters(rng):
    """Top-p of tempered logits keeps more tokens than top-p of raw ones at a high temperature."""
    logits = logits_of(rng)
    found = sampling.process(logits, temperature=2.0, top_k=50, top_p=0.9, min_p=0.01)
    expected = sampling.min_p(sampling.top_p(sampling.top_k(logits / 2.0, 50), 0.9), 0.01)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(sampling.process(logits), logits)


def test_the_repetition_penalty_punishes_seen_tokens_of_either_sign():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    found = sampling.repetition_penalty(logits, seen, 2.0)
    np.testing.assert_array_equal(found, [[1.0, -4.0, 2.0, -2.0]])
    np.testing.assert_array_equal(sampling.repetition_penalty(logits, seen, 1.0), logits)


def test_seen_tokens_are_those_within_the_length_and_later_ones():
    seen = sampling.seen_tokens(jnp.array([[1, 2, 0], [3, 3, 4]]), jnp.array([2, 2]), vocab=5)
    np.testing.assert_array_equal(seen, [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]])
    more = sampling.see(seen, jnp.array([4, 0]))
    np.testing.assert_array_equal(more, [[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]])


def test_banned_tokens_are_banned_only_where_asked():
    logits = jnp.zeros((2, 4))
    found = sampling.ban(logits, (1, 3), where=jnp.array([True, False]))
    np.testing.assert_array_equal(kept(found), [[1, 0, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(sampling.ban(logits, (), where=jnp.array([True, True])), logits)


COUNT = 8192


@jax.jit
def _draws(logits):
    keys = jax.random.split(jax.random.key(0), COUNT)
    return sampling.draw(keys, jnp.broadcast_to(logits[None, :], (COUNT, V)))


def draws(row):
    """Many draws from one row of at most V logits (the rest impossible: one shape compiles)."""
    return np.asarray(_draws(jnp.pad(row, (0, V - row.shape[0]), constant_values=-jnp.inf)))


@pytest.mark.parametrize("v", [3, 256, V])
def test_draws_follow_the_softmax(rng, v):
    """Pearson's statistic of 8192 draws, over cells of at least ten expected, below five sigma."""
    logits = (rng.normal(size=v) * 1.5).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    seen = np.bincount(draws(jnp.array(logits)), minlength=v)
    expected = probabilities * COUNT
    big = expected >= 10
    seen = np.append(seen[big], seen[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    usable = expected > 0
    statistic = (((seen - expected) ** 2)[usable] / expected[usable]).sum()
    freedom = usable.sum() - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_banned_token_is_never_drawn(rng):
    logits = sampling.top_k(logits_of(rng), 3)
    assert kept(logits)[0][draws(logits[0])].all()


def test_the_only_possible_token_is_always_drawn():
    for place in (0, 255, 256, V - 1):
        row = np.full(V, -np.inf, np.float32)
        row[place] = -3.0
        assert (draws(jnp.array(row)) == place).all()


def test_a_row_draws_the_same_token_in_any_company(rng):
    logits, keys = logits_of(rng), jax.random.split(jax.random.key(1), B)
    draw = jax.jit(sampling.draw)
    together = draw(keys, logits)
    assert together.dtype == jnp.int32
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_array_equal(draw(keys[order], logits[order]), together[order])
    np.testing.assert_array_equal(draw(keys[2:3], logits[2:3]), together[2:3])


def test_greedy_takes_the_first_of_the_largest():
    np.testing.assert_array_equal(sampling.greedy(jnp.array([[0.0, 2.0, 2.0]])), [1])


def test_the_log_prob_of_a_drawn_token_is_what_the_scorer_says(rng):
    hidden = jnp.array(rng.normal(size=(B, 4)), jnp.float32)
    head = jnp.array(rng.normal(size=(4, 50)), jnp.float32)
    logits = hidden @ head
    tokens = sampling.draw(jax.random.split(jax.random.key(0), B), logits)
    found = sampling.taken_logps(logits, tokens)
    np.testing.assert_allclose(found, token_logps(hidden, head, tokens)[0], rtol=1e-5, atol=1e-6)
