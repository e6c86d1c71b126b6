"""Datasets by their names on the hub, which a stand-in on this machine answers for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.standin_hub import StandInHub

# In a process of its own: the client reads the hub's address when it is imported.
LOAD = """
import json, sys
from jrlhf.data.sources import load_rows
from jrlhf.errors import JrlhfError
try:
    rows = load_rows(sys.argv[1], split=sys.argv[2], streaming=sys.argv[3] == "True")
    print(json.dumps([type(rows).__name__, list(rows)]))
except JrlhfError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def load(hub: StandInHub, home: Path, *arguments: str) -> tuple[str, object]:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    kind, found = json.loads(done.stdout.splitlines()[-1])
    return kind, found


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_from_the_hub_by_name(
    streaming: bool, standin_hub: StandInHub, tmp_path: Path
) -> None:
    standin_hub.files["datasets/someone/reviews"] = {
        "README.md": b"# Reviews",
        "train.jsonl": b'{"text": "fine"}\n{"text": "dull"}\n',
        "test.jsonl": b'{"text": "kept apart"}\n',
    }
    kind, rows = load(standin_hub, tmp_path, "someone/reviews", "train", str(streaming))
    assert kind == ("IterableDataset" if streaming else "Dataset")
    assert rows == [{"text": "fine"}, {"text": "dull"}]


def test_a_name_that_the_hub_does_not_have_is_named(
    standin_hub: StandInHub, tmp_path: Path
) -> None:
    kind, message = load(standin_hub, tmp_path, "someone/typo", "train", "False")
    assert kind == "MissingFileError"
    assert "someone/typo" in str(message)
