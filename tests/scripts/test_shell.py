"""The shell scripts: they parse, explain themselves and refuse what they do not know."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ["scripts/setup.sh", "scripts/test.sh", "scripts/quickstart.sh", ".ci/run"]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_parses_and_is_executable(script: str) -> None:
    assert call("-n", script).returncode == 0
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_help_is_shown_and_nothing_is_installed(script: str) -> None:
    done = call(script, "--help")
    assert done.returncode == 0
    assert f"{script} [--" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_an_unknown_argument_is_refused(script: str) -> None:
    done = call(script, "--farst")
    assert done.returncode == 2
    assert "unknown argument --farst" in done.stderr


def test_setup_refuses_a_python_that_does_not_fit(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = call("scripts/setup.sh", "--venv", str(tmp_path / "venv"), "--python", str(old))
    assert done.returncode == 2
    assert "is not a Python 3.11 to 3.13" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_refuses_an_unknown_machine(tmp_path: Path) -> None:
    done = call("scripts/setup.sh", "--venv", str(tmp_path / "venv"), "--machine", "abacus")
    assert done.returncode == 2
    assert "there are cpu, cuda and tpu" in done.stderr
