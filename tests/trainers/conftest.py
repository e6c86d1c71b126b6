"""Real small models for the trainers: glassllm, and rows that look like users' datasets."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

TEXTS = [
    "Alice was beginning to get very tired of sitting by her sister on the bank.",
    "The Hatter opened his eyes very wide on hearing this.",
    "It was much pleasanter at home, thought poor Alice.",
    "The Queen turned crimson with fury, and began screaming.",
    "Would you tell me, please, which way I ought to go from here?",
    "The Mock Turtle sighed deeply, and began in a voice choked with sobs.",
    "Begin at the beginning, the King said gravely.",
    "Curiouser and curiouser! cried Alice.",
]


def asset(repository: Path, name: str) -> str:
    """The path of one of the real models; skips with the reason where it cannot be had."""
    spec = importlib.util.spec_from_file_location("assets", repository / "scripts" / "assets.py")
    assert spec is not None
    assert spec.loader is not None
    assets = importlib.util.module_from_spec(spec)
    sys.modules["assets"] = assets
    spec.loader.exec_module(assets)
    try:
        return str(assets.fetch(name))
    except assets.AssetError as error:
        pytest.skip(f"the model {name} cannot be had here: {error}")


@pytest.fixture(scope="session")
def glassllm(repository: Path) -> str:
    """A real small model."""
    return asset(repository, "glassllm")


@pytest.fixture(scope="session")
def smollm2(repository: Path) -> str:
    """SmolLM2-135M-Instruct."""
    return asset(repository, "smollm2")


@pytest.fixture
def texts() -> list[dict[str, Any]]:
    """Rows of text and label, as sentiment datasets have them."""
    return [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS * 2)]


@pytest.fixture
def hh() -> list[dict[str, str]]:
    """HH-RLHF shaped: chosen and rejected alone, their prompt is the shared beginning."""
    turn = "\n\nHuman: Tell me more.\n\nAssistant:"
    return [{"chosen": f"{turn} {t}", "rejected": f"{turn} {t[::-1]}"} for t in TEXTS * 2]


@pytest.fixture
def prompts() -> list[dict[str, str]]:
    return [{"prompt": " ".join(text.split()[:4])} for text in TEXTS * 2]


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers without output_dir write into the working directory."""
    monkeypatch.chdir(tmp_path)
