"""No program of a training run holds logits of all tokens: its buffers, as the compiler laid them.

Looked at is every program that a run compiles: step, scorer, sampler and evaluation.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.vocabulary_programs import CHUNK, LENGTH, ROWS, VOCAB

BUFFERS = "*.cpu_after_optimizations-buffer-assignment.txt"
NAMES = {
    "sft": {"jit_step", "jit_sums"},
    "dpo": {"jit_step", "jit_sums"},
    "ppo": {"jit_step", "jit_score", "jit_sample"},
    "grpo": {"jit_step", "jit_score", "jit_sample"},
}


def vocabulary_rows(dump: Path) -> dict[str, set[int]]:
    """Per program, the sizes of its arrays that have an axis of the vocabulary, over that axis."""
    found: dict[str, set[int]] = {}
    for file in dump.glob(BUFFERS):
        sizes = {
            math.prod(int(n) for n in shape.split(","))
            for shape in re.findall(r"\w\d+\[([\d,]+)\]", file.read_text())
        }
        rows = {size // VOCAB for size in sizes if size % VOCAB == 0}
        found.setdefault(file.name.split(".")[1], set()).update(rows)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("face", NAMES)
def test_logits_are_there_for_a_chunk_of_tokens_only(face: str, tmp_path: Path, repository: Path):
    flags = f"--xla_dump_to={tmp_path / 'dump'} --xla_backend_optimization_level=0"
    given = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "",  # what comes from a cache is not dumped
        "PYTHONPATH": str(repository),
        "XLA_FLAGS": flags,
    }
    command = [sys.executable, "-m", "tests.trainers.vocabulary_programs", face, "run"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | given, check=True, capture_output=True)
    found = vocabulary_rows(tmp_path / "dump")
    assert NAMES[face] <= found.keys()
    assert ROWS * LENGTH > 2 * CHUNK
    assert CHUNK in found["jit_step"]  # the buffers of a chunk are seen
    assert {name: max(rows) for name, rows in found.items() if rows and max(rows) > CHUNK} == {}
