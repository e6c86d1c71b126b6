"""The toy problem as a fixture: a module, loaded from its file because it is also a program."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.modules import module_at


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """tests/train/toy.py"""
    return module_at(Path(__file__).with_name("toy.py"))
