"""The stop strings' automaton against the decoded text, and what it saves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jrlhf.model import Model
from jrlhf.rollout.engine import Engine, role_id, row_keys
from jrlhf.rollout.sampling import SamplingParams, sample
from jrlhf.rollout.stops import Stops, stops_of

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level() -> Any:
    """One token per byte, and some of several; "é" is two tokens, neither of which is text."""
    words = {c: i for i, c in enumerate([*ALPHABET, "ab", "aba", "Ġb", "ba", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def metaspace() -> Any:
    """As sentencepiece's: a text's first space is no part of it."""
    words = {w: i for i, w in enumerate(["▁a", "▁b", "a", "b", "▁", "ab", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def words() -> Any:
    """No decoder: spaces between tokens."""
    table = {f"w{i}": i for i in range(12)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w11")


CASES = {
    "overlapping": (byte_level, ["abab", "bb", "aab a"]),
    "a special token and half characters": (byte_level, ["<end>", "éa"]),
    "a leading space": (metaspace, [" a", "ba b"]),
    "between words": (words, ["w3 w4", " w5"]),
}


def walked(stops: Stops, ids: list[int]) -> list[bool]:
    """Whether it is a match after each token."""
    state, out = stops.first[ids[0]], []
    for i, token in enumerate(ids):
        state = stops.following[state, token] if i else state
        out.append(bool(state == len(stops.following) - 1))
    return out


@pytest.mark.parametrize("case", CASES)
def test_it_matches_where_the_text_does(case: str) -> None:
    make, strings = CASES[case]
    tokenizer = make()
    stops = stops_of(tokenizer, strings, len(tokenizer) + 3)
    assert stops is not None
    draw, matches = np.random.default_rng(0), 0
    likely = [
        i for i in range(len(tokenizer)) if set(tokenizer.decode([i])) & set("".join(strings))
    ]
    for _ in range(300):
        ids = draw.choice(likely, 12).tolist()
        texts = [tokenizer.decode(ids[:n]) for n in range(1, 13)]
        wanted = [any(s in text for s in strings) for text in texts]
        found = walked(stops, ids)
        if "half" in case:  # it may miss one, and never invents one
            assert all(w or not f for w, f in zip(wanted, found, strict=True))
        else:
            assert found == wanted
        matches += found[-1]
    assert 20 < matches < 300


def test_half_a_character_forgets_what_was_matched() -> None:
    tokenizer = byte_level()
    stops = stops_of(tokenizer, ["ab"], len(tokenizer))
    assert stops is not None
    a, half, b = (tokenizer.convert_tokens_to_ids(t) for t in ("a", "Ã", "b"))
    assert not walked(stops, [a, half, b])[-1]
    assert walked(stops, [half, a, b])[-1]


def test_a_tokenizer_that_rewrites_its_text_has_none() -> None:
    rewriting = Tokenizer(models.WordLevel({"a": 0, "b": 1, " .": 2}, unk_token="a"))
    rewriting.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    assert stops_of(PreTrainedTokenizerFast(tokenizer_object=rewriting), ["ab"], 3) is None
    assert stops_of(byte_level(), [], 9) is None


@pytest.mark.assets
def test_smollm2s_tokenizer_has_one(smollm2: Any) -> None:
    from jrlhf.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    strings = ["\n\nHuman:", "<|im_end|>", "the end."]
    stops = stops_of(tokenizer, strings, len(tokenizer))
    assert stops is not None
    for text in ("So it is the end. And", "Yes.\n\nHuman: no", "well<|im_end|>\n"):
        ids = tokenizer(text)["input_ids"]
        texts = [tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
        assert walked(stops, ids) == [any(s in t for s in strings) for t in texts]


def test_a_call_ends_when_every_row_has_met_a_stop_string(
    policy: Model, prompts: list[list[int]], tokenizer: Any
) -> None:
    sampling = SamplingParams(max_new_tokens=32)
    vocabulary = policy.net.spec.vocab_size
    strings = [tokenizer.decode([i]) for i in range(5, vocabulary, 2)]  # one word in two
    engine = Engine(policy.net, tokenizer, sampling, rows=8, stop_strings=strings)
    stops = stops_of(tokenizer, strings, vocabulary)
    keys = row_keys(1, role_id("rollout"), 0, jnp.arange(4))
    ids, lengths = jnp.asarray([prompts[0][:4]] * 4), jnp.full(4, 4)
    out = jax.device_get(
        sample(policy.net, policy.params, ids, lengths, keys, sampling, None, stops)
    )
    whole = jax.device_get(sample(policy.net, policy.params, ids, lengths, keys, sampling))
    assert whole.steps == 32
    assert out.steps == out.lengths.max() < 32
    assert out.done.all()
    for row in range(4):
        n = out.lengths[row]
        np.testing.assert_array_equal(out.ids[row, :n], whole.ids[row, :n])
        np.testing.assert_array_equal(out.logps[row, :n], whole.logps[row, :n])

    found = engine.generate(policy.params, prompts, seed=1)
    engine._automaton = None  # the host cuts alone
    assert found == engine.generate(policy.params, prompts, seed=1)
