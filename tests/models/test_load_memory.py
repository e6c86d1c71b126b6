"""Loading takes little besides what it loads: the bound of benchmarks/bench_load.py, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.modules import module_at


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
def test_loading_onto_eight_devices_takes_a_file_besides_its_slice(
    tmp_path: Path, repository: Path
) -> None:
    bench = module_at(repository / "benchmarks" / "bench_load.py")
    largest = bench.write_checkpoint(tmp_path, bench.QUICK)
    row = bench.judge(bench.measure(tmp_path, "float32"), largest)
    assert row["devices"] == 8
    assert row["own_slice_bytes"] > 6 * largest  # so that a second copy of it would be found
    assert row["besides_in_shards"] < bench.BOUND, row
