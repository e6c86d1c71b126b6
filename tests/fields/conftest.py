"""One bench for all tests of fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fields.bench import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fields"))


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers without output_dir write into the working directory."""
    monkeypatch.chdir(tmp_path)
