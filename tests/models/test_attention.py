"""Windows, soft-caps and sinks of attention, against float64 numpy and plain autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models.attention import MIN_BLOCK, Scoring, attend_cache, attend_causal

B, H, K, E = 2, 4, 2, 6
LENGTH = 2 * MIN_BLOCK + 3  # two blocks of queries
FLAGS = {
    "plain": {},
    "window": {"window": 7},
    "scale and cap": {"scale": 0.9, "softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 9, "scale": 0.7, "softcap": 2.0, "sinks": True},
}


def arrays(seed=0):
    draw = np.random.default_rng(seed)
    q, g = (draw.normal(size=(B, LENGTH, H, E)).astype(np.float32) for _ in range(2))
    k, v = (draw.normal(size=(B, LENGTH, K, E)).astype(np.float32) for _ in range(2))
    segments = np.ones((B, LENGTH), np.int32)
    segments[1, 40:] = 2
    return q, k, v, segments, draw.normal(size=H).astype(np.float32), g


def weights(xp, q, k, allowed, *, scale=None, softcap=None, sinks=None):
    """Attention's weights [b h s t], written the plain way."""
    scores = xp.einsum("bshe,bthe->bhst", q, xp.repeat(k, H // K, axis=2))
    scores = scores * (E**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * xp.tanh(scores / softcap)
    exps = xp.where(allowed[:, None], xp.exp(scores), 0.0)
    total = exps.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + xp.exp(sinks)[None, :, None, None]
    return exps / total


def causal(segments, window):
    behind = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    same = segments[:, :, None] == segments[:, None]
    return same & (behind >= 0) & (behind < (window or LENGTH))


def mixed(xp, p, v):
    return xp.einsum("bhst,bthe->bshe", p, xp.repeat(v, H // K, axis=2))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_attention_and_its_gradients_equal_the_plain_formula(flags):
    q, k, v, segments, sinks, g = arrays()
    sinks = sinks if flags.get("sinks") else None
    given = {name: flags.get(name) for name in ("scale", "softcap")}
    allowed = causal(segments, flags.get("window"))
    window = None if "window" not in flags else jnp.int32(flags["window"])

    def ours(q, k, v, sinks):
        out = attend_causal(q, k, v, segments, window, sinks, "float32", Scoring(**given))
        return jnp.sum(out * g), out

    def plain(q, k, v, sinks):
        return jnp.sum(mixed(jnp, weights(jnp, q, k, allowed, sinks=sinks, **given), v) * g)

    args, which = (q, k, v, sinks), (0, 1, 2, 3) if sinks is not None else (0, 1, 2)
    gradients, out = jax.jit(jax.grad(ours, which, has_aux=True))(*args)
    wide = [None if x is None else x.astype(np.float64) for x in args]
    expected = mixed(np, weights(np, wide[0], wide[1], allowed, sinks=wide[3], **given), wide[2])
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    for got, wanted in zip(gradients, jax.jit(jax.grad(plain, which))(*args), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_query_on_the_cache_reads_the_valid_slots_and_its_sink():
    q, k, v, _, sinks, _ = arrays()
    valid = np.random.default_rng(1).random((B, LENGTH)) < 0.3
    out = attend_cache(
        q[:, :1], k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), valid, sinks,
        dtype="float32", scoring=Scoring(0.8, 1.5),
    )  # fmt: skip
    p = weights(np, q[:, :1], k, valid[:, None], scale=0.8, softcap=1.5, sinks=sinks)
    np.testing.assert_allclose(out, mixed(np, p, v), rtol=0, atol=2e-6)
