"""The sampler against its definitions: the scorer, a full forward per token, float64 softmax."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jrlhf.errors import ConfigError
from jrlhf.ops import sampling as ops
from jrlhf.rollout import score
from jrlhf.rollout.engine import row_keys
from jrlhf.rollout.sampling import Sampled, SamplingParams, sample
from tests.rollout.conftest import PAD, VOCAB, Model, model, padded

P, N = 12, 8
ENDS = tuple(range(3, 9))
outputs = jax.jit(score.outputs, static_argnums=0, static_argnames="temperature")
forward = jax.jit(lambda net, params, ids: net.hidden(params, ids) @ net.head(params),
                  static_argnums=0)  # fmt: skip


def run(
    policy: Model,
    prompts: list[list[int]],
    sampling: SamplingParams,
    *,
    width: int = P,
    ids: np.ndarray | None = None,
    limit: int | None = None,
    step: int = 0,
) -> Sampled:
    batch = padded(prompts, width)
    ids = np.arange(len(prompts)) if ids is None else ids
    keys = row_keys(np.uint32(3), np.uint32(1), np.uint32(step), np.asarray(ids, np.uint32))
    limit = np.int32(sampling.max_new_tokens if limit is None else limit)
    out = sample(policy.net, policy.params, batch["ids"], batch["lengths"], keys, sampling, limit)
    return jax.tree.map(np.asarray, out)


def joined(prompts: list[list[int]], out: Sampled) -> dict[str, np.ndarray]:
    rows = [p + out.ids[i, : out.lengths[i]].tolist() for i, p in enumerate(prompts)]
    slots = np.zeros(out.ids.shape, np.int32)
    for i, p in enumerate(prompts):
        slots[i, : out.lengths[i]] = len(p) + np.arange(out.lengths[i])
    return {**padded(rows, P + N), "slots": slots}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_scorer_gives_the_samplers_log_probs(
    policy: Model, prompts: list[list[int]], temperature: float
) -> None:
    sampling = SamplingParams(max_new_tokens=N, temperature=temperature, eos_token_ids=ENDS)
    out = run(policy, prompts, sampling)
    found = outputs(policy.net, policy.params, joined(prompts, out), temperature=temperature)
    assert out.logps.dtype == np.float32
    np.testing.assert_allclose(out.logps, found.logps, atol=1e-5)
    assert len(set(out.lengths.tolist())) > 1
    # Lengths count the EOS, nothing before it is one, and only pad and zeros follow.
    for ids, logps, length, done in zip(out.ids, out.logps, out.lengths, out.done, strict=True):
        assert done == (ids[length - 1] in ENDS)
        assert not set(ids[: length - 1]) & set(ENDS)
        assert (ids[length:] == PAD).all()
        assert not logps[length:].any()


def test_token_t_is_drawn_with_the_rows_key_and_t(policy: Model, prompts: list[list[int]]) -> None:
    sampling = SamplingParams(max_new_tokens=N, temperature=1.0, eos_token_ids=ENDS)
    out = run(policy, prompts, sampling)
    batch = joined(prompts, out)
    logits = np.asarray(forward(policy.net, policy.params, batch["ids"]))
    keys = row_keys(np.uint32(3), np.uint32(1), np.uint32(0), np.arange(6, dtype=np.uint32))
    for t in range(N):
        before = np.maximum(batch["slots"][:, t] - 1, 0)
        key_t = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        token = ops.draw(key_t, jax.numpy.asarray(logits[np.arange(6), before]))
        running = t < out.lengths
        np.testing.assert_array_equal(out.ids[running, t], np.asarray(token)[running])


def test_greedy_is_the_argmax_of_a_full_forward_per_token(
    policy: Model, prompts: list[list[int]]
) -> None:
    """Also with the penalty for tokens of prompt and completion, and EOS held back at first."""
    ends = (0, *range(3, 30))
    sampling = SamplingParams(
        max_new_tokens=N,
        do_sample=False,
        repetition_penalty=1.7,
        min_new_tokens=3,
        eos_token_ids=ends,
    )
    out = run(policy, prompts, sampling)
    rows = [list(p) for p in prompts]
    for t in range(N):
        ids = padded(rows, P + N)["ids"]
        logits = np.asarray(forward(policy.net, policy.params, ids), np.float64)
        for i, row in enumerate(rows):
            if t >= out.lengths[i]:
                continue
            last = logits[i, len(row) - 1]
            seen = np.unique(row)
            last[seen] = np.where(last[seen] < 0, last[seen] * 1.7, last[seen] / 1.7)
            if t < 3:
                last[list(ends)] = -np.inf
            assert out.ids[i, t] == last.argmax(), (i, t)
            row.append(int(out.ids[i, t]))
    assert out.lengths.min() > 3
    assert out.done.any()


def test_the_loop_ends_when_every_row_has(policy: Model, prompts: list[list[int]]) -> None:
    sampling = SamplingParams(max_new_tokens=N, temperature=0.5, eos_token_ids=ENDS)
    # Filler rows neither sample nor keep the loop running.
    rows = [prompts[1], *([[]] * 5)]
    for step in range(20):
        out = run(policy, rows, sampling, step=step)
        assert out.steps == out.lengths[0]
        assert not out.lengths[1:].any()
        assert not out.done[1:].any()
        if out.done[0] and out.lengths[0] < N:
            break
    else:
        pytest.fail("no row ended early; the test shows nothing")
    assert run(policy, rows, sampling, step=step, limit=1).steps == 1


def test_a_row_samples_by_its_own_key_and_prompt_alone(
    policy: Model, prompts: list[list[int]]
) -> None:
    sampling = SamplingParams(max_new_tokens=N, eos_token_ids=ENDS)
    ids = np.asarray([3, 1, 4, 15, 9, 2])
    base = run(policy, prompts, sampling, ids=ids)
    order = np.asarray([4, 0, 5, 3, 1, 2])
    shuffled = run(policy, [prompts[i] for i in order], sampling, ids=ids[order])
    np.testing.assert_array_equal(shuffled.ids, base.ids[order])
    neighbours = [prompts[0], *([[9, 9]] * 5)]
    others = run(policy, neighbours, sampling, ids=np.asarray([3, 50, 51, 52, 53, 54]))
    np.testing.assert_array_equal(others.ids[0], base.ids[0])
    np.testing.assert_array_equal(run(policy, prompts, sampling, width=20, ids=ids).ids, base.ids)
    assert (run(policy, prompts, sampling, ids=ids, step=1).ids != base.ids).any()
    assert len({tuple(row) for row in others.ids[1:]}) == 5


def kept(p: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """The tokens that the filters leave, by sorting."""
    order = np.argsort(-p)
    keep = np.ones(len(p), bool)
    if sampling.top_k:
        keep[order[sampling.top_k :]] = False
    p = np.where(keep, p, 0) / p[keep].sum()
    if sampling.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= sampling.top_p]] = False
        p = np.where(keep, p, 0) / p[keep].sum()
    return keep & (p >= sampling.min_p * p.max())


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.15}], ids=["all", "k", "p", "min_p"]
)
def test_samples_follow_the_distribution(filters: dict) -> None:
    policy = model(num_hidden_layers=1)
    sampling = SamplingParams(max_new_tokens=1, temperature=1.5, **filters)
    rows = 4096
    out = run(policy, [[5, 9, 11]] * rows, sampling, width=3)
    logits = np.asarray(forward(policy.net, policy.params, np.asarray([[5, 9, 11]])), np.float64)
    p = np.exp(logits[0, -1] / 1.5 - (logits[0, -1] / 1.5).max())
    p /= p.sum()
    # The log-probs are those of the whole distribution, whatever the filters leave of it.
    np.testing.assert_allclose(out.logps[:, 0], np.log(p)[out.ids[:, 0]], atol=1e-5)
    keep = kept(p, sampling)
    assert keep.all() == (not filters)
    counts = np.bincount(out.ids[:, 0], minlength=VOCAB)
    assert not counts[~keep].any()
    wanted = rows * p[keep] / p[keep].sum()
    common = wanted >= 5  # the rule of thumb for the chi-square approximation; the rest in one bin
    observed = np.append(counts[keep][common], counts[keep][~common].sum())
    wanted = np.append(wanted[common], wanted[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi2, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert freedom >= 3
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)  # mean + 4 standard deviations


@pytest.mark.parametrize(("name", "value"), [
    ("max_new_tokens", 0), ("temperature", 0.0), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1),
    ("min_p", -0.1), ("repetition_penalty", 0.0), ("min_new_tokens", -1),
])  # fmt: skip
def test_impossible_parameters_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(SamplingParams(), **{name: value})
