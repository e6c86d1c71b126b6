"""Encoders with a classifier against transformers: scores, losses, gradients and files."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

from tests.models import encoder_cases as cases  # noqa: E402

cases.torch.set_num_threads(1)  # tiny matrices: a second thread only spins


@pytest.mark.parametrize("name", cases.CASES)
def test_scores_loss_gradients_and_files_equal_transformers(name):
    row = cases.measure(*cases.CASES[name])
    assert row.logits <= 1e-5, row
    assert row.loss <= 2e-6, row
    assert row.gradients <= 1e-5, row
    assert row.reload, row
