"""What every test shares: eight fake devices, no hub, shapes checked at run time.

Environment variables are set before anything imports jax, and only where nobody has chosen:
`JAX_PLATFORMS=cuda pytest …` runs on the GPU.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FAKE = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAKE}".strip()
# Tests reach no hub, read no user's cache and leave nothing in it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
if "HF_HOME" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="jrlhf-hf-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest  # noqa: E402

from tests.modules import module_at  # noqa: E402

if TYPE_CHECKING:
    from tests.standin_hub import StandInHub

TESTS = Path(__file__).parent
# Rooms whose tests also run on the newest Python and JAX.
UNIT = ("ops", "algos", "models", "sharding", "data", "rollout", "train", "report")

if importlib.util.find_spec("beartype") and importlib.util.find_spec("jaxtyping"):
    # In tests, every annotated shape of the pure rooms is checked at each call.
    from jaxtyping import install_import_hook

    install_import_hook(["jrlhf.ops", "jrlhf.algos"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_torch = any(importlib.util.find_spec(name) is None for name in ("torch", "trl"))
    skip = pytest.mark.skip(reason="needs the extra `parity` (torch, trl, peft)")
    for item in items:
        if TESTS in item.path.parents and item.path.relative_to(TESTS).parts[0] in UNIT:
            item.add_marker("unit")
        if without_torch and item.get_closest_marker("parity"):
            item.add_marker(skip)
    # Files with slow tests begin, so that no worker is left alone with one at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def standin_hub() -> Iterator[StandInHub]:
    """A hub on this machine, to which uploads go and from which downloads come."""
    from tests.standin_hub import standing_in

    with standing_in() as hub:
        yield hub


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return TESTS.parent


@pytest.fixture(scope="session")
def assets(repository: Path) -> ModuleType:
    """scripts/assets.py as a module."""
    return module_at(repository / "scripts" / "assets.py")


def _fetch(assets: ModuleType, name: str) -> Path:
    try:
        return assets.fetch(name)
    except assets.AssetError as error:
        pytest.skip(f"the model {name} cannot be had here: {error}")


@pytest.fixture(scope="session")
def smollm2(assets: ModuleType) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return _fetch(assets, "smollm2")


@pytest.fixture(scope="session")
def glassllm(assets: ModuleType) -> Path:
    """glassllm-en, a directory."""
    return _fetch(assets, "glassllm")
