"""What sits on a decoder's hidden states, against transformers: classifiers of texts and of tokens,
and a value head.

Rows are padded on the right and on the left; transformers reads one text at a time, without any
padding.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_calls")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from jrlhf import (  # noqa: E402
    AutoModelForCausalLMWithValueHead,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from jrlhf.models.families import DECODERS  # noqa: E402
from tests.models.decoder_cases import BASE, CASES  # noqa: E402
from tests.models.decoder_measure import relative, reload, same, theirs, torch  # noqa: E402

OURS = {
    "SequenceClassification": AutoModelForSequenceClassification,
    "TokenClassification": AutoModelForTokenClassification,
}
THEIRS = {
    "SequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}
# What docs/models.md says that transformers has not.
MISSING = {
    "SequenceClassification": {"cohere", "granite"},
    "TokenClassification": {"cohere", "gemma3_text", "gptj", "granite", "olmo2", "opt"},
}
CLASSIFIERS = [
    (family, kind) for kind, missing in MISSING.items() for family in CASES if family not in missing
]
# Each family's first case, and one whose hidden states are narrower inside than where they end.
VALUES = [(family, next(iter(cases))) for family, cases in CASES.items()] + [
    ("opt", "opt-350m: norms after, narrow embeddings")
]
# Texts longer than windows, and where each begins in its row.
LENGTHS, STARTS, WIDTH = (9, 9, 13, 7), (0, 4, 0, 6), 13


def padded():
    """Rows with anything but zeros as padding, and their mask."""
    ids = np.random.default_rng(3).integers(1, BASE["vocab_size"], (len(LENGTHS), WIDTH))
    column, start = np.arange(WIDTH), np.array(STARTS)[:, None]
    return ids, (column >= start) & (column < start + np.array(LENGTHS)[:, None])


def one_by_one(model, read):
    """What is read of the oracle's answer to each text alone, in float64."""
    model.double()
    ids, mask = padded()
    with torch.no_grad():
        return [
            read(model(torch.tensor(row[real])[None], output_hidden_states=True))[0].numpy()
            for row, real in zip(ids, mask, strict=True)
        ]


def drawn(model, name):
    """Random weights for a head, which the model takes up: its own bias would be zero."""
    draw = np.random.default_rng(4)
    head = {key: draw.normal(size=leaf.shape) for key, leaf in model.params[name].items()}
    head = {key: value.astype(np.float32) for key, value in head.items()}
    model.params = {**model.params, name: jax.device_put(head)}
    return head


def test_transformers_lacks_the_classifiers_that_are_named():
    assert CASES.keys() == DECODERS.keys()
    for kind, missing in MISSING.items():
        assert {family for family in CASES if family not in THEIRS[kind]} == missing


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize(("family", "kind"), CLASSIFIERS)
def test_classifiers_pass_both_ways_with_the_same_scores(family, kind, labels, tmp_path):
    model = theirs(family, next(iter(CASES[family].values())), kind=kind, num_labels=labels)
    model.save_pretrained(tmp_path / "theirs")
    ours = OURS[kind].from_pretrained(tmp_path / "theirs")
    assert ours.net.spec.num_labels == labels
    ours.save_pretrained(tmp_path / "ours")
    assert same(reload(kind, tmp_path / "ours").state_dict(), model.state_dict())
    ids, mask = padded()
    scores = np.asarray(ours(ids, mask).logits)
    expected = one_by_one(model, lambda out: out.logits)
    if kind == "TokenClassification":
        scores, expected = scores[mask], np.concatenate(expected)
    assert scores.shape == (*scores.shape[:1], labels)
    assert relative(scores, expected) <= 1e-5


@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for kind in MISSING for family in sorted(MISSING[kind])]
)
def test_classifiers_that_transformers_lacks_score_its_hidden_states(family, kind, tmp_path):
    model = theirs(family, next(iter(CASES[family].values())))
    model.save_pretrained(tmp_path / "theirs")
    ours = OURS[kind].from_pretrained(tmp_path / "theirs", num_labels=3)
    head = drawn(ours, "score")
    ours.save_pretrained(tmp_path / "ours")
    again = OURS[kind].from_pretrained(tmp_path / "ours")
    assert again.net.spec == ours.net.spec
    ids, mask = padded()
    scores = np.asarray(again(ids, mask).logits)
    states = one_by_one(model, lambda out: out.hidden_states[-1])
    if kind == "TokenClassification":
        scores, read = scores[mask], np.concatenate(states)
    else:
        read = np.stack([text[-1] for text in states])
    expected = read @ head["kernel"].astype(float) + head.get("bias", 0)
    assert relative(scores, expected) <= 1e-5


@pytest.mark.parametrize(("family", "flags"), VALUES)
def test_a_value_is_a_linear_map_of_transformers_last_hidden_state(family, flags, tmp_path):
    model = theirs(family, CASES[family][flags])
    model.save_pretrained(tmp_path)
    ours = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    head = drawn(ours, "value")
    assert head.keys() == {"kernel", "bias"}
    ids, mask = padded()
    out = ours(ids, mask)
    states = one_by_one(model, lambda out: out.hidden_states[-1])
    expected = np.concatenate(states) @ head["kernel"][:, 0].astype(float) + head["bias"]
    assert relative(np.asarray(out.value)[mask], expected) <= 1e-5
    logits = np.concatenate(one_by_one(model, lambda out: out.logits))
    assert relative(np.asarray(out.logits)[mask], logits) <= 1e-5
