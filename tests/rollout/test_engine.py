"""The engine: the same tokens however prompts are padded, ordered, cut into chunks or spread."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.errors import ConfigError, DataError, ModelError, PromptTooLongError
from jrlhf.rollout.engine import Engine, bucket
from jrlhf.rollout.generate import generate_like_transformers
from jrlhf.rollout.sampling import SamplingParams
from jrlhf.sharding import mesh as meshes
from jrlhf.sharding import place
from jrlhf.train.metrics import compiles
from tests.rollout.conftest import EOS, Model

SAMPLING = SamplingParams(max_new_tokens=8, eos_token_ids=(EOS, 3, 4, 5))


@pytest.fixture(scope="module")
def engine(policy: Model, tokenizer: Any) -> Engine:
    return Engine(policy.net, tokenizer, SAMPLING, rows=8)


@given(st.integers(1, 10**6), st.sampled_from([1, 16, 128]))
def test_buckets_are_few_and_waste_little(length: int, multiple: int) -> None:
    size = bucket(length, multiple)
    assert size >= length
    assert size % multiple == 0
    assert bucket(size, multiple) == size
    assert size <= max(multiple, length * 1.25 + multiple)
    assert bucket(length + 1, multiple) >= size


def test_rows_keep_their_samples_in_any_order_and_company(
    engine: Engine, policy: Model, prompts: list[list[int]]
) -> None:
    ids = [10, 11, 12, 13, 14, 15]
    base = engine.generate(policy.params, prompts, seed=1, row_ids=ids)
    order = [5, 2, 0, 4, 1, 3]
    moved = engine.generate(
        policy.params, [prompts[i] for i in order], seed=1, row_ids=[ids[i] for i in order]
    )
    assert moved == [base[i] for i in order]
    some = engine.generate(policy.params, prompts[2:4], seed=1, row_ids=ids[2:4])
    assert [c.ids for c in some] == [c.ids for c in base[2:4]]
    # More prompts than rows per call: three chunks, and nothing else changes.
    many = engine.generate(policy.params, prompts * 3, seed=1, row_ids=[*ids, *range(50, 62)])
    assert [c.ids for c in many[:6]] == [c.ids for c in base]
    for other in ({"seed": 2}, {"seed": 1, "role": "eval"}, {"seed": 1, "step": 1}):
        drawn = engine.generate(policy.params, prompts, row_ids=ids, **other)
        assert [c.ids for c in drawn] != [c.ids for c in base]


def test_completions_say_how_they_ended(
    engine: Engine, policy: Model, prompts: list[list[int]], tokenizer: Any
) -> None:
    done = engine.generate(policy.params, prompts * 4, seed=3)
    assert {c.finished for c in done} == {True, False}
    for completion in done:
        ended = completion.ids[-1] in SAMPLING.eos_token_ids
        assert completion.finished == ended
        assert ended or len(completion.ids) == 8
        assert len(completion.logps) == len(completion.ids)
        assert completion.text == tokenizer.decode(completion.ids, skip_special_tokens=True)


def test_stop_strings_cut_after_the_token_that_completes_them(
    engine: Engine, policy: Model, prompts: list[list[int]], tokenizer: Any
) -> None:
    base = engine.generate(policy.params, prompts, seed=1)
    whole = max(base, key=lambda c: len(c.ids))
    stop = f"{tokenizer.decode(whole.ids[2:4])}"  # two words, so that one token cannot complete it
    stopping = Engine(policy.net, tokenizer, SAMPLING, rows=8, stop_strings=[stop, "nothing else"])
    done = stopping.generate(policy.params, prompts, seed=1)
    cut = done[base.index(whole)]
    assert cut.ids == whole.ids[:4]
    assert cut.logps == whole.logps[:4]
    assert cut.finished
    assert cut.text.endswith(stop)
    others = [i for i, c in enumerate(base) if stop not in c.text]
    assert [done[i] for i in others] == [base[i] for i in others]


def test_nothing_compiles_after_each_bucket_was_seen_once(
    engine: Engine, policy: Model, prompts: list[list[int]]
) -> None:
    engine.generate(policy.params, prompts, seed=1)
    before = compiles()
    for step in range(3):
        engine.generate(policy.params, prompts[step:], seed=5, step=step, role="eval")
        engine.generate(policy.params, [[7] * (step + 9)], seed=5, max_new_tokens=step + 1)
    assert compiles() == before


def test_a_group_shares_its_prefill_and_nothing_else(
    engine: Engine, policy: Model, prompts: list[list[int]]
) -> None:
    """Groups of 3 in calls of 8 rows: 2 prompts each; groups of 16: the prompts are repeated."""
    for group in (3, 16):
        repeated = [prompt for prompt in prompts for _ in range(group)]
        base = engine.generate(policy.params, repeated, seed=1)
        done = engine.generate(policy.params, prompts, seed=1, group=group)
        assert [c.ids for c in done] == [c.ids for c in base]
        assert len({tuple(c.ids) for c in done[:group]}) > 1
        for one, other in zip(base, done, strict=True):
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def test_a_policy_that_is_not_finite_is_named(engine: Engine, policy: Model) -> None:
    broken = {**policy.params, "norm": {"scale": policy.params["norm"]["scale"] * np.nan}}
    with pytest.raises(ModelError, match="rollout 7"):
        engine.generate(broken, [[5, 6]], seed=1, step=7)


def test_bad_prompts_are_named_before_anything_runs(engine: Engine, policy: Model) -> None:
    with pytest.raises(DataError, match="Prompt 1 has no tokens"):
        engine.generate(policy.params, [[5], []], seed=0)
    with pytest.raises(PromptTooLongError, match=r"Prompt 0 has 121 tokens.*context of 128"):
        engine.generate(policy.params, [[5] * 121], seed=0)
    with pytest.raises(PromptTooLongError, match="prompt_length is 4"):
        engine.generate(policy.params, [[5] * 5], seed=0, prompt_length=4)
    with pytest.raises(DataError, match=r"Prompt 1 has tokens from 5 to 1000, the model 0 to"):
        engine.generate(policy.params, [[5], [5, 1000]], seed=0)
    with pytest.raises(DataError, match="2 prompts came with row_ids for 1"):
        engine.generate(policy.params, [[5], [6]], seed=0, row_ids=[1])
    with pytest.raises(DataError, match="tokenizer"):
        Engine(policy.net, None, SAMPLING, stop_strings=["x"])


def test_eight_devices_sample_what_one_does(
    engine: Engine, policy: Model, prompts: list[list[int]]
) -> None:
    base = engine.generate(policy.params, prompts, seed=1)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = place.params_shardings(policy.net, policy.params, mesh)
    params = jax.device_put(policy.params, shardings)
    spread = Engine(policy.net, None, SAMPLING, rows=5, mesh=mesh)  # rounded up to 8
    done = spread.generate(params, prompts, seed=1)
    assert [c.ids for c in done] == [c.ids for c in base]
    for one, other in zip(base, done, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def batched(prompts: list[list[int]], width: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(prompts), width), 9)
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[i, place], mask[i, place] = prompt, 1
    return ids, mask


@pytest.mark.parametrize("do_sample", [False, True])
def test_padding_side_and_amount_never_matter(
    policy: Model, prompts: list[list[int]], do_sample: bool
) -> None:
    tails = []
    for side, width in (("left", 12), ("right", 12), ("left", 14)):
        ids, mask = batched(prompts, width, side)
        out = generate_like_transformers(
            policy.net, policy.params, ids, mask, max_new_tokens=6, do_sample=do_sample,
            eos_token_id=[EOS, 3, 4, 5], pad_token_id=8, seed=2,
        )  # fmt: skip
        np.testing.assert_array_equal(out[:, :width], ids)
        tails.append(out[:, width:])
    np.testing.assert_array_equal(tails[0], tails[1])
    np.testing.assert_array_equal(tails[0], tails[2])
    assert tails[0].shape[1] <= 6


def test_generate_pads_with_the_first_eos_and_stops_where_the_longest_row_does(
    policy: Model, prompts: list[list[int]]
) -> None:
    everything = list(range(2, 61))
    out = generate_like_transformers(
        policy.net, policy.params, np.asarray([[7, 9]]), max_new_tokens=6, eos_token_id=everything
    )
    assert out.shape == (1, 3)
    with pytest.raises(DataError, match="differ in shape"):
        generate_like_transformers(policy.net, policy.params, [[1, 2]], [[1]])
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
        generate_like_transformers(policy.net, policy.params, [[1, 2]], max_new_tokens=0)
    with pytest.raises(DataError, match="rows, tokens"):
        generate_like_transformers(policy.net, policy.params, [1, 2])
