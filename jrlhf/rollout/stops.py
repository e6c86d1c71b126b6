"""Stop strings on the device: an automaton over tokens, so that a row ends where its text does.

The text decides (`Engine` cuts it on the host, by decoding); what is here only keeps the sampler
from going on. So it may miss a stop string, one that begins in half a character, but it may never
see one that the text does not have. A tokenizer whose tokens do not simply follow one another in
the text has no automaton.

References:
    Aho and Corasick, "Efficient String Matching: An Aid to Bibliographic Search", 1975.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

# Half a character decodes to this.
_PARTIAL = "\ufffd"
# Random texts on which the pieces must be the decoder's text, and their tokens.
_TRIALS, _TRIAL = 32, 24


class Stops(NamedTuple):
    """The automaton. State 0 has matched nothing; the last one is a match, and stays.

    Attributes:
        first: the state after a completion's first token.
        following: the state after any other, from the state before it.
    """

    first: Int[np.ndarray, " v"]
    following: Int[np.ndarray, "states v"]


def stops_of(tokenizer: Any, strings: Sequence[str], vocab_size: int) -> Stops | None:
    """The automaton that finds any of the strings; None if the tokenizer allows none."""
    if not strings:
        return None
    size = min(vocab_size, len(tokenizer))
    first, following = _pieces(tokenizer, size)
    if not _follow_one_another(tokenizer, first, following):
        return None
    delta, classes = _automaton(strings)
    # Ids that the tokenizer does not have lead to state 0, and a match stays one.
    stops = Stops(np.zeros(vocab_size, np.int32), np.zeros((len(delta), vocab_size), np.int32))
    stops.following[-1] = len(delta) - 1
    stops.first[:size] = _run(delta, classes, first, 1)[0]
    stops.following[:, :size] = _run(delta, classes, following, len(delta))
    return stops


def _pieces(tokenizer: Any, size: int) -> tuple[list[str], list[str]]:
    """What each token adds to a text: as its first token, and after another one."""
    first = [_text(tokenizer, [i]) for i in range(size)]
    anchor = next((i for i, text in enumerate(first) if text.isalnum() and text.isascii()), None)
    if anchor is None:
        return first, []
    start = len(first[anchor])
    return first, [_text(tokenizer, [anchor, i])[start:] for i in range(size)]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def _follow_one_another(tokenizer: Any, first: list[str], following: list[str]) -> bool:
    """Whether a text is its tokens' pieces: tried on random texts of whole characters."""
    whole = [i for i, text in enumerate(following) if _PARTIAL not in text + first[i]]
    if not whole:
        return False
    random = np.random.default_rng(0)
    for _ in range(_TRIALS):
        ids = random.choice(whole, _TRIAL).tolist()
        if _text(tokenizer, ids) != first[ids[0]] + "".join(following[i] for i in ids[1:]):
            return False
    return True


def _automaton(strings: Sequence[str]) -> tuple[np.ndarray, dict[str, int]]:
    """Next state by (state, class of character), and the classes; class 0 is any other one."""
    classes = {c: i for i, c in enumerate(sorted(set("".join(strings))), start=1)}
    prefixes = sorted({s[:n] for s in strings for n in range(len(s))}, key=lambda p: (len(p), p))
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    match = len(prefixes)
    delta = np.zeros((match + 1, len(classes) + 1), np.int32)
    delta[match] = match
    for prefix, state in number.items():
        for character, column in classes.items():
            text = prefix + character
            if any(text.endswith(s) for s in strings):
                delta[state, column] = match
            else:
                suffixes = (text[i:] for i in range(len(text) + 1))
                delta[state, column] = next(number[s] for s in suffixes if s in number)
    return delta, classes


def _run(
    delta: np.ndarray, classes: dict[str, int], pieces: list[str], states: int
) -> Int[np.ndarray, "states v"]:
    """The states that the pieces lead to, from each of the first so many."""
    # Classes of a piece's characters; -1 after its end. Half a character is "any other one".
    columns = np.full((max(map(len, pieces)), len(pieces)), -1, np.int32)
    for i, piece in enumerate(pieces):
        read = [0] if _PARTIAL in piece else [classes.get(c, 0) for c in piece]
        columns[: len(read), i] = read
    now = np.repeat(np.arange(states, dtype=np.int32)[:, None], len(pieces), axis=1)
    for column in columns:
        moved = np.flatnonzero(column >= 0)
        now[:, moved] = delta[now[:, moved], column[moved]]
    return now
