"""Some combinations of each family's flags; `python -m tests.models.table` measures all of them."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

from tests.models import encoder_cases, flag_products  # noqa: E402
from tests.models.decoder_measure import measure  # noqa: E402

encoder_cases.torch.set_num_threads(1)  # tiny matrices: a second thread only spins
EACH = 2


def drawn(families):
    """Combinations that no case has, the same in every run."""
    for family, flags in families.items():
        every = list(flag_products.products(flags))
        for changes in random.Random(family).sample(every, EACH):
            yield pytest.param(family, changes, id=f"{family}-{every.index(changes)}")


def assert_within_bounds(found):
    assert found["logits"] <= 1e-5
    assert found["loss"] <= 2e-6
    assert found["gradients"] <= 1e-5
    assert found["reload"]


@pytest.mark.parametrize(("family", "changes"), list(drawn(flag_products.DECODERS)))
def test_flags_of_a_decoder_combine(family, changes):
    assert_within_bounds(measure(family, changes))


@pytest.mark.parametrize(("family", "changes"), list(drawn(flag_products.ENCODERS)))
def test_flags_of_an_encoder_combine(family, changes):
    assert_within_bounds(encoder_cases.measure(family, changes)._asdict())


def test_every_family_has_its_flags():
    from tests.models.decoder_cases import CASES

    assert flag_products.DECODERS.keys() == CASES.keys()
    assert flag_products.ENCODERS.keys() == {prefix for prefix, _ in encoder_cases.CASES.values()}
