"""Prompts that come as a stream: the same rollouts as ever, with sizes that must be given."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from jrlhf.errors import ConfigError
from tests.fields.bench import PROMPTS, Bench

FIELDS: dict[str, Any] = {"max_prompt_length": 8, "max_steps": 5, "per_device_train_batch_size": 8}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("streams"))


def trainer(bench: Bench, **fields: Any) -> Any:
    stream = datasets.Dataset.from_list(PROMPTS).to_iterable_dataset()
    return bench.trainer("grpo", data=stream, **{**FIELDS, **fields})


def texts(made: Any, rollout: int) -> list[str]:
    return [row["prompt"] for row in made._loop.source._prompts(rollout)]


def test_a_stream_is_read_in_order_and_again(bench: Bench) -> None:
    made = trainer(bench, shuffle_dataset=False)
    wanted = [row["prompt"] for row in PROMPTS]
    # Rollouts of four prompts; the last two of ten do not fill one.
    assert [texts(made, i) for i in range(3)] == [wanted[:4], wanted[4:8], wanted[:4]]
    assert made._loop.steps_per_epoch is None
    assert made._loop.source.plan.prompt_length == 16  # a bucket for 8 tokens


def test_a_shuffled_stream_depends_on_the_seed_and_can_be_entered_anywhere(bench: Bench) -> None:
    made = trainer(bench, data_seed=3)
    rollouts = [texts(made, i) for i in range(5)]
    assert rollouts != [texts(trainer(bench, data_seed=4), i) for i in range(5)]
    assert rollouts[:2] != rollouts[2:4]  # another order in the next pass
    resumed = trainer(bench, data_seed=3)
    assert [texts(resumed, i) for i in (3, 4)] == rollouts[3:]


@pytest.mark.parametrize(
    ("missing", "value"), [("max_prompt_length", None), ("max_steps", -1)], ids=["length", "steps"]
)
def test_what_a_stream_does_not_know_must_be_given(missing: str, value: Any, bench: Bench) -> None:
    with pytest.raises(ConfigError, match=missing):
        trainer(bench, **{missing: value})


def test_a_stream_of_prompts_trains(bench: Bench) -> None:
    made = trainer(bench, max_steps=2, per_device_train_batch_size=4, save_strategy="no")
    assert made.train().global_step == 2
