"""Reward functions: TRL's signature, and an error that names the function for every misuse."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import numpy as np
import pytest

from jrlhf.errors import RewardError
from jrlhf.rollout.rewards import Completions, RewardSuite

DONE = Completions(
    prompts=["a", "b", "c"],
    completions=["x", "yy", ""],
    prompt_ids=[[3], [4], [5]],
    completion_ids=[[6], [7, 7], [2]],
    finished=[True, False, True],
    columns={"answer": [1, 2, 3]},
)


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) for c in completions]


class Judge:
    def __call__(self, prompts: list[str], completions: list[str], answer: list[int]) -> Any:
        return np.asarray(answer) * 2


def scaled(completions: list[str], factor: float, **_: Any) -> list[float]:
    return [factor * len(c) for c in completions]


async def slow(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if len(ids) == 2 else 1.0 for ids in completion_ids]


def test_functions_objects_partials_and_coroutines_are_called_by_what_they_ask_for() -> None:
    suite = RewardSuite([length, Judge(), functools.partial(scaled, factor=3.0), slow, length])
    assert suite.names == ["length", "Judge", "scaled", "slow", "length_2"]
    found = suite(DONE)
    nan = np.nan
    wanted = [[1, 2, 3, 1, 1], [2, 4, 6, nan, 2], [0, 6, 0, 1, 0]]
    np.testing.assert_array_equal(found.table, np.asarray(wanted, np.float32))
    np.testing.assert_array_equal(found.total, [8, 14, 7])


def test_weights_multiply_and_a_row_without_any_opinion_stays_nan() -> None:
    def half(completions: list[str]) -> list[float | None]:
        return [1.0, None, float("nan")]

    def other(completions: list[str]) -> list[float | None]:
        return [2.0, 5.0, None]

    found = RewardSuite([half, other], weights=[10.0, -1.0])(DONE)
    np.testing.assert_array_equal(found.total, [8.0, -5.0, np.nan])
    np.testing.assert_array_equal(RewardSuite(half)(DONE).total, [1.0, np.nan, np.nan])


def test_functions_receive_everything_that_trl_gives() -> None:
    got: dict[str, Any] = {}

    def curious(**given: Any) -> list[float]:
        got.update(given)
        given["log_metric"]("hits", 2.0)
        given["log_extra"]("note", ["p", "q", "r"])
        return [0, True, np.float32(1)]  # ints, bools and numpy scalars are numbers

    found = RewardSuite(curious)(DONE, trainer_state="state")
    assert {k: got[k] for k in ("prompts", "completions", "completion_ids", "answer")} == {
        "prompts": DONE.prompts,
        "completions": DONE.completions,
        "completion_ids": DONE.completion_ids,
        "answer": [1, 2, 3],
    }
    assert got["trainer_state"] == "state"
    assert found.logged == {"hits": 2.0}
    assert found.extra == {"note": ["p", "q", "r"]}
    np.testing.assert_array_equal(found.total, [0, 1, 1])


def test_coroutines_run_side_by_side_also_inside_an_event_loop() -> None:
    order: list[str] = []

    def waiting(name: str) -> Any:
        async def judge(**_: Any) -> list[float]:
            order.append(f"{name} starts")
            await asyncio.sleep(0.01)
            order.append(f"{name} ends")
            return [1.0, 2.0, 3.0]

        return judge

    async def notebook() -> Any:
        return RewardSuite([waiting("one"), waiting("two")])(DONE)

    np.testing.assert_array_equal(asyncio.run(notebook()).total, [2.0, 4.0, 6.0])
    assert order[:2] == ["one starts", "two starts"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        (np.ones(1), "returned 1 rewards for 3 completions"),
        (np.ones((3, 1)), "for completion 0; expected a finite number"),
        (1.5, "must return a list of 3 numbers, got float"),
        ("abc", "must return a list of 3 numbers, got str"),
        (None, "must return a list of 3 numbers, got NoneType"),
        ({"a": 1, "b": 2, "c": 3}, "got dict"),
        ([1.0, "2", 3.0], "returned '2' for completion 1"),
        ([1.0, 2.0, float("inf")], "returned inf for completion 2"),
        ([1.0, [2.0], 3.0], "completion 1"),
    ],
)
def test_wrong_answers_are_named(answer: Any, message: str) -> None:
    def judge(**_: Any) -> Any:
        return answer

    async def late(**_: Any) -> Any:
        return answer

    with pytest.raises(RewardError, match="judge") as error:
        RewardSuite([length, judge])(DONE)
    assert message in str(error.value)
    with pytest.raises(RewardError, match="late"):
        RewardSuite([length, late])(DONE)


def test_an_exception_in_a_function_names_it_and_keeps_its_cause() -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("gold")

    async def broken_too(**_: Any) -> list[float]:
        raise KeyError("gold")

    for function in (broken, broken_too):
        with pytest.raises(RewardError, match=f"{function.__name__} raised KeyError") as error:
            RewardSuite(function)(DONE)
        assert isinstance(error.value.__cause__, KeyError)


def test_an_argument_that_is_no_column_is_named_with_the_nearest_one() -> None:
    def judge(completions: list[str], anser: list[int]) -> list[float]:
        return [0.0] * 3

    with pytest.raises(RewardError, match=r"judge wants an argument 'anser'.*\"answer\""):
        RewardSuite(judge)(DONE)


def test_suites_that_cannot_work_are_refused() -> None:
    with pytest.raises(RewardError, match="No reward function"):
        RewardSuite([])
    with pytest.raises(RewardError, match="callable"):
        RewardSuite(["a/model"])
    with pytest.raises(RewardError, match="1 entries for 2"):
        RewardSuite([length, length], weights=[1.0])
