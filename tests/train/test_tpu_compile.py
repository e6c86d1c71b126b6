"""The TPU's compiler takes the training step and the sampling loop; it needs libtpu, not a TPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the TPU's compiler (200 MB): pip install jrlhf[tpu]",
)
def test_a_step_and_the_sampling_loop_compile_for_sixteen_chips(
    repository: Path, tmp_path: Path
) -> None:
    # In a process of its own: libtpu wants to be the first to look at the machine.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment.pop("XLA_FLAGS", None)
    found = tmp_path / "found.json"
    command = [sys.executable, "compile_tpu.py", "--quick", "--output", str(found)]
    subprocess.run(
        command, cwd=repository / "benchmarks", env=environment, check=True, capture_output=True
    )
    rows = {(row["program"], row["attention"]): row for row in json.loads(found.read_text())[
        "results"
    ]}  # fmt: skip
    # Forward, forward again (remat), the gradient of q, those of k and v: once, for all layers.
    assert rows["sft", "auto"]["Pallas calls"] == 4
    assert rows["sft", "xla"]["Pallas calls"] == 0
    assert rows["sample", "auto"]["Pallas calls"] == 1  # the prefill
    for row in rows.values():
        assert 0 < row["peak GiB"] < 0.1
        assert row["collectives"] > 0  # it really is cut
