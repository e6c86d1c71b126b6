"""Every decoder family against transformers, with each flag of its config on and off somewhere.

`python -m tests.models.table` measures all cases, and all combinations of flags, and writes
docs/models.md.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

from tests.models.decoder_cases import CASES, GREEDY, NAMED  # noqa: E402
from tests.models.decoder_measure import (  # noqa: E402
    NEW,
    greedy_agreement,
    measure,
)


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
