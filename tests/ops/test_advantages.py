from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.advantages import adaptive_kl, batch_std, gae, group_advantages, group_moments


def gae_oracle(rewards, values, gamma, lam):
    """Σ_k (γλ)^k δ_{t+k} from the definition, quadratic, float64, one row without padding."""
    n = len(rewards)
    values = np.append(values, 0.0)
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return np.array(
        [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
    )


def rows(rng, b=4, n=6):
    rewards, values = rng.normal(size=(2, b, n))
    mask = (rng.random((b, n)) < 0.6).astype(np.float32)
    mask[0] = 1
    mask[1] = 0
    return rewards, values, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_skips_masked_tokens_as_if_they_were_not_there(rng, gamma, lam):
    rewards, values, mask = rows(rng)
    advantages, returns = gae(
        *(jnp.array(x, jnp.float32) for x in (rewards, values, mask)), gamma=gamma, lam=lam
    )
    for i, kept in enumerate(mask > 0):
        expected = gae_oracle(rewards[i][kept], values[i][kept], gamma, lam)
        np.testing.assert_allclose(advantages[i][kept], expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(returns[i][kept], expected + values[i][kept], 2e-5, atol=1e-6)
        assert (np.asarray(advantages)[i][~kept] == 0).all()
        assert (np.asarray(returns)[i][~kept] == 0).all()


def test_gae_never_reads_what_is_masked(rng):
    rewards, values, mask = rows(rng)
    clean = gae(*(jnp.array(x, jnp.float32) for x in (rewards, values, mask)), gamma=1.0, lam=0.9)
    rewards, values = (np.where(mask > 0, x, np.nan) for x in (rewards, values))
    dirty = gae(*(jnp.array(x, jnp.float32) for x in (rewards, values, mask)), gamma=1.0, lam=0.9)
    np.testing.assert_array_equal(clean, dirty)


def test_lambda_one_is_the_reward_to_go_minus_the_value_and_lambda_zero_the_td_error(rng):
    rewards, values = (jnp.array(x, jnp.float32) for x in rng.normal(size=(2, 3, 5)))
    mask = jnp.ones((3, 5))
    monte_carlo, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(monte_carlo, to_go - values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, to_go, rtol=1e-4, atol=1e-5)
    td, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    later = jnp.pad(values[:, 1:], [(0, 0), (0, 1)])
    np.testing.assert_allclose(td, rewards + 0.9 * later - values, rtol=1e-5, atol=1e-6)


def test_perfect_values_leave_no_advantage(rng):
    rewards = jnp.array(rng.normal(size=(2, 5)), jnp.float32)
    values = jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    advantages, _ = gae(rewards, values, jnp.ones((2, 5)), gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, 0.0, atol=1e-5)


def group_oracle(rewards, group, scale):
    rewards = np.asarray(rewards, np.float64).reshape(-1, group)
    out = np.zeros_like(rewards)
    everything = rewards[~np.isnan(rewards)]
    for i, row in enumerate(rewards):
        scored = row[~np.isnan(row)]
        if len(scored) == 0:
            continue
        std = scored.std(ddof=1) if len(scored) > 1 else 0.0
        divisor = {
            "group": std + 1e-4,
            "batch": (everything.std(ddof=1) if len(everything) > 1 else 0.0) + 1e-4,
            "none": 1.0,
        }[scale]
        out[i] = np.nan_to_num((row - scored.mean()) / divisor)
    return out.reshape(-1)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("unscored", [(), (1,), (0, 1, 2, 3), (0, 1, 2, 5)])
def test_group_advantages_are_the_definition(rng, scale, unscored):
    rewards = rng.normal(5.0, 3.0, 12)
    rewards[list(unscored)] = np.nan
    found = group_advantages(jnp.array(rewards, jnp.float32), group=4, scale=scale)
    np.testing.assert_allclose(found, group_oracle(rewards, 4, scale), rtol=1e-4, atol=1e-5)
    assert (np.asarray(found)[list(unscored)] == 0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -7.7])
def test_equal_rewards_give_an_advantage_of_exactly_zero(scale, value):
    """0.1 is no float, and the mean of three of them need not be it: measured from the minimum."""
    rewards = jnp.array([value] * 3 + [value, value, np.nan], jnp.float32)
    advantages = group_advantages(rewards, group=3, scale=scale)
    np.testing.assert_array_equal(advantages, 0.0)


def test_advantages_of_a_group_sum_to_zero_and_ignore_a_common_offset(rng):
    rewards = jnp.array(rng.integers(0, 10, 8), jnp.float32)
    plain = group_advantages(rewards, group=4)
    np.testing.assert_allclose(plain.reshape(2, 4).sum(1), 0.0, atol=1e-5)
    np.testing.assert_array_equal(plain, group_advantages(rewards + 4096.0, group=4))


def test_a_row_that_nobody_scored_changes_nothing_for_its_group(rng):
    rewards = np.append(rng.normal(size=3), np.nan).astype(np.float32)
    with_it = group_advantages(jnp.array(rewards), group=4)
    without = group_advantages(jnp.array(rewards[:3]), group=3)
    np.testing.assert_allclose(with_it[:3], without, rtol=1e-6)


def test_group_moments_report_mean_and_std_per_row():
    deviation, mean, std = group_moments(jnp.array([1.0, 3.0, 5.0, 5.0]), group=2)
    np.testing.assert_allclose(deviation, [-1, 1, 0, 0])
    np.testing.assert_allclose(mean, [2, 2, 5, 5])
    np.testing.assert_allclose(std, [np.sqrt(2), np.sqrt(2), 0, 0], rtol=1e-6)
    np.testing.assert_allclose(batch_std(jnp.array([1.0, 3.0, np.nan])), np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (12.0, 1.02), (600.0, 1.02), (0.0, 0.98), (6.6, 1.01), (5.4, 0.99)],
)
def test_the_adaptive_coefficient_follows_zieglers_table(kl, factor):
    """1000 of 10000 episodes: a tenth of the error, which is clipped at ±20 %."""
    found = adaptive_kl(0.2, kl, target=6.0, horizon=10000.0, episodes=1000.0)
    np.testing.assert_allclose(found, 0.2 * factor, rtol=1e-5)


def test_the_adaptive_coefficient_settles_where_the_kl_meets_the_target():
    """A toy policy whose KL is 3 / β: the fixed point is β = 3 / target."""
    beta = 0.02
    for _ in range(400):
        beta = float(adaptive_kl(beta, 3 / beta, target=6.0, horizon=1000.0, episodes=100.0))
    np.testing.assert_allclose(beta, 0.5, rtol=1e-3)
