"""Real small models for the trainers: glassllm, and rows that look like users' datasets."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def glassllm(glassllm: Path) -> str:
    """As users write it."""
    return str(glassllm)


@pytest.fixture(scope="session")
def smollm2(smollm2: Path) -> str:
    """As users write it."""
    return str(smollm2)


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
