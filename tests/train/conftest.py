"""The toy problem as a fixture: a module, loaded from its file because it is also a program."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """tests/train/toy.py"""
    path = Path(__file__).with_name("toy.py")
    spec = importlib.util.spec_from_file_location("jrlhf_toy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["jrlhf_toy"] = module
    spec.loader.exec_module(module)
    return module
