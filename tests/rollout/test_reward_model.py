"""A classifier as a reward reads the token that its training put the score on: the last one."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jrlhf.errors import ModelError, RewardError
from jrlhf.models.tokenizer import same_tokenizer
from jrlhf.rollout.reward_model import RewardModel
from jrlhf.rollout.rewards import Completions, RewardSuite
from jrlhf.train.metrics import compiles
from tests.rollout.conftest import EOS, PAD, VOCAB, Model, word_tokenizer

forward = jax.jit(lambda net, params, ids: net.hidden(params, ids), static_argnums=0)


def finished(tokenizer: Any, rows: list[tuple[list[int], list[int]]]) -> Completions:
    return Completions(
        prompts=[tokenizer.decode(p) for p, _ in rows],
        completions=[tokenizer.decode(c, skip_special_tokens=True) for _, c in rows],
        prompt_ids=[p for p, _ in rows],
        completion_ids=[c for _, c in rows],
        finished=[c[-1] == EOS for _, c in rows],
        columns={},
    )


def by_hand(classifier: Model, row: list[int]) -> float:
    """The score from the hidden state of the last token of the row alone."""
    ids = np.asarray([row + [3] * (20 - len(row))], np.int32)
    hidden = forward(classifier.net, classifier.params, ids)
    kernel = np.asarray(classifier.params["score"]["kernel"], np.float64)
    return float((np.asarray(hidden[0, len(row) - 1], np.float64) @ kernel)[0])


def test_the_score_stands_on_the_last_token_of_full_short_and_padded_rows(
    classifier: Model, tokenizer: Any
) -> None:
    model = RewardModel(classifier.net, classifier.params, tokenizer, rows=4)
    assert model.reads_ids
    rows = [
        ([4, 5], [6, 7, EOS]),  # ended
        ([4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17, 18, EOS]),  # fills its bucket of 16
        ([4, 5], [6, 7, 8]),  # cut off: no EOS
        ([4], [EOS]),  # ended at once
        ([4, PAD], [PAD, 6, PAD]),  # the pad token as text is text
    ]
    found = model.score(finished(tokenizer, rows))
    wanted = [by_hand(classifier, p + c) for p, c in rows]
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    before = compiles()
    again = model.score(finished(tokenizer, rows[::-1]))
    np.testing.assert_allclose(again, wanted[::-1], atol=2e-5)
    assert compiles() == before


def test_another_tokenizer_reads_the_decoded_text(classifier: Model, tokenizer: Any) -> None:
    reordered = word_tokenizer([f"w{i}" for i in reversed(range(3, VOCAB))])
    assert not same_tokenizer(tokenizer, reordered)
    model = RewardModel(
        classifier.net, classifier.params, reordered, policy_tokenizer=tokenizer, rows=4
    )
    assert not model.reads_ids

    def theirs(ids: list[int]) -> list[int]:
        return [VOCAB + 2 - i for i in ids]

    done = finished(tokenizer, [([4, 5], [6, 7, EOS]), ([4, 5], [6, 7, 8])])
    wanted = [by_hand(classifier, [*theirs([4, 5, 6, 7]), EOS]),
              by_hand(classifier, theirs([4, 5, 6, 7, 8]))]  # fmt: skip
    np.testing.assert_allclose(model.score(done), wanted, atol=2e-5)
    short = RewardModel(
        classifier.net, classifier.params, reordered, policy_tokenizer=tokenizer, rows=4,
        max_length=3,
    )  # fmt: skip
    wanted = [by_hand(classifier, [*theirs([6, 7]), EOS]), by_hand(classifier, theirs([6, 7, 8]))]
    np.testing.assert_allclose(short.score(done), wanted, atol=2e-5)
    assert reordered.truncation_side == "right"  # the caller's tokenizer is left alone


def test_conversations_go_through_the_models_own_template(
    classifier: Model, tokenizer: Any
) -> None:
    reordered = word_tokenizer([f"w{i}" for i in reversed(range(3, VOCAB))])
    reordered.chat_template = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
    model = RewardModel(
        classifier.net, classifier.params, reordered, policy_tokenizer=tokenizer, rows=4,
        append_eos=False,
    )  # fmt: skip
    done = finished(tokenizer, [([4, 5], [6, 7, EOS])])._replace(
        prompts=[[{"role": "user", "content": "w4 w5"}]],
        completions=[[{"role": "assistant", "content": "w6 w7"}]],
    )
    wanted = by_hand(classifier, [VOCAB + 2 - i for i in (9, 4, 5, 9, 6, 7)])
    np.testing.assert_allclose(model.score(done), [wanted], atol=2e-5)


def test_padding_options_do_not_make_another_tokenizer(tokenizer: Any) -> None:
    twin = word_tokenizer([f"w{i}" for i in range(3, VOCAB)])
    twin(["w3 w4", "w5"], padding=True, truncation=True, max_length=2)
    assert same_tokenizer(tokenizer, twin)


def test_a_reward_model_is_a_reward_function(classifier: Model, tokenizer: Any) -> None:
    model = RewardModel(classifier.net, classifier.params, tokenizer, rows=4, name="helpful")

    def one(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    suite = RewardSuite([model, one], weights=[2.0, 1.0])
    assert suite.names == ["helpful", "one"]
    done = finished(tokenizer, [([4, 5], [6, 7, EOS]), ([4, 5], [6, 7, 8])])
    wanted = 2 * model.score(done) + 1
    np.testing.assert_allclose(suite(done).total, wanted, rtol=1e-6)
    texts = model(prompts=["w4 w5 ", "w4 "], completions=["w6 w7", "w5"])
    wanted = [by_hand(classifier, [4, 5, 6, 7, EOS]), by_hand(classifier, [4, 5, EOS])]
    np.testing.assert_allclose(texts, wanted, atol=2e-5)


def test_what_cannot_be_a_reward_model_is_refused(
    policy: Model, classifier: Model, tokenizer: Any
) -> None:
    with pytest.raises(ModelError, match="causal"):
        RewardModel(policy.net, policy.params, tokenizer)
    model = RewardModel(classifier.net, classifier.params, tokenizer, rows=4)
    with pytest.raises(RewardError, match="text 1 has no tokens"):
        model.score_ids([[4], []])
