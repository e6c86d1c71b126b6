"""Every decoder family against transformers, with each flag of its config on and off somewhere.

`python -m tests.models.table` measures all cases, and all combinations of flags, and writes
docs/models.md.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

import jax.numpy as jnp  # noqa: E402
import transformers  # noqa: E402

from jrlhf.models.load import load_pretrained  # noqa: E402
from jrlhf.models.save import save_pretrained  # noqa: E402
from tests.models.decoder_cases import CASES, GREEDY, NAMED  # noqa: E402
from tests.models.decoder_measure import (  # noqa: E402
    NEW,
    greedy_agreement,
    measure,
    relative,
    reload,
    rows,
    same,
    theirs,
    torch,
)
from tests.models.quick import quick_jit  # noqa: E402


@pytest.mark.parametrize(("family", "flags"), NAMED)
def test_logits_loss_gradients_and_export_equal_transformers(family, flags):
    found = measure(family, CASES[family][flags])
    assert found["logits"] <= 1e-5
    assert found["loss"] <= 2e-6
    assert found["gradients"] <= 1e-5
    assert found["reload"]


@pytest.mark.parametrize(("family", "flags"), GREEDY)
def test_64_of_64_greedy_tokens_equal_transformers_generate(family, flags):
    assert greedy_agreement(family, CASES[family][flags]) == NEW


def classifiers():
    for family in CASES:
        names = type(transformers.AutoConfig.for_model(family)).__name__.removesuffix("Config")
        for kind in ("SequenceClassification", "TokenClassification"):
            if hasattr(transformers, f"{names}For{kind}"):
                yield family, kind


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize(("family", "kind"), list(classifiers()))
def test_classifiers_pass_both_ways(family, kind, labels, tmp_path):
    """Names and shapes for all; scores for four that differ in how they name or run things."""
    changes = next(iter(CASES[family].values()))
    head = "classifier" if kind.startswith("Seq") else "tokens"
    model = theirs(family, changes, kind=kind, num_labels=labels)
    model.save_pretrained(tmp_path / "theirs")
    net, params, source = load_pretrained(tmp_path / "theirs", head=head)
    assert net.spec.num_labels == labels
    save_pretrained(tmp_path / "ours", net, params, source=source)
    assert same(reload(kind, tmp_path / "ours").state_dict(), model.state_dict())
    if family not in ("gemma2", "gpt2", "gpt_neox", "gpt_oss"):
        return
    ids = rows()[0]["ids"][:1]
    expected = model.double()(torch.tensor(ids).long()).logits.detach().numpy()

    def scores(params):
        hidden = net.hidden(params, ids)
        if head == "tokens":
            return net.token_scores(params, hidden)
        return net.scores(params, hidden, jnp.array([ids.shape[1]]))

    assert relative(quick_jit(scores)(params), expected) <= 1e-5
