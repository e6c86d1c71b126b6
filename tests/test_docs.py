"""The documents say what is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def layers_of_the_contract() -> list[str]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = config["tool"]["importlinter"]["contracts"][0]
    names = [re.findall(r"\w+", layer) for layer in contract["layers"]]
    return [name for group in names for name in group]


def test_the_architecture_page_lists_the_enforced_layers_in_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("## Layers")[1].split("## Ten contracts")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    shown = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(shown) == sorted(layers_of_the_contract())
    rank = {name: i for i, name in enumerate(layers_of_the_contract())}
    above = [max(rank[n] for n in re.findall(r"`(\w+)`", cell)) for cell in cells]
    assert above == sorted(above)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_every_path_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:jrlhf|tests|scripts|configs|docs|benchmarks)/[\w./-]*)`", text)
    linked = re.findall(r"\]\((?!http|#)([^)#]+)\)", text)
    missing = [path for path in {*named, *linked} if not (ROOT / path).exists()]
    assert not missing
