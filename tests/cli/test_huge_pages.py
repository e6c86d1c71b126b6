"""The program asks for huge pages by starting itself again, once, where that can help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jrlhf import cli

SETTING = "glibc.malloc.hugetlb=1"
PROGRAM = """
import os, sys
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), flush=True)
import jrlhf.cli
sys.argv = ["jrlhf", *sys.argv[1:]]
code = jrlhf.cli.run()
text = b"x" * 2**26
maps = open("/proc/self/smaps_rollup").read() if sys.platform == "linux" else ""
print([line.split()[1] for line in maps.splitlines() if "AnonHuge" in line][0], flush=True)
sys.exit(code)
"""
asked = pytest.mark.skipif(
    not cli.huge_pages_on_request(), reason="this kernel or libc gives no huge pages on request"
)


def lines(*words: str, tunables: str | None = None) -> list[str]:
    """What the program above prints; one line of pid and setting for each of its starts."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stdout.splitlines() if line[:1].isdigit()]


@asked
def test_it_starts_again_once_as_the_same_process_and_gets_huge_pages() -> None:
    first, second, huge = lines("sft", "--no_such_field", "1")
    assert first.split() == [second.split()[0], "None"]
    assert second.split()[1] == SETTING
    assert int(huge) > 2**15  # kB: half of what it took


@asked
def test_other_tunables_stay() -> None:
    _, second, _ = lines("sft", "--no_such_field", "1", tunables="glibc.malloc.tcache_count=8")
    assert second.split()[1] == f"glibc.malloc.tcache_count=8:{SETTING}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
@pytest.mark.parametrize(
    ("words", "tunables"),
    [(["sft", "--no_such_field", "1"], "glibc.malloc.hugetlb=0"), (["--help"], None),
     (["no_such_verb"], None), (["report", "--help"], None)],
)  # fmt: skip
def test_it_goes_on_at_once(words: list[str], tunables: str | None) -> None:
    starts = [line.split() for line in lines(*words, tunables=tunables)]
    assert [start[1] for start in starts if len(start) == 2] == [str(tunables)]


@pytest.mark.parametrize(
    ("libc", "modes"),
    [("glibc 2.34", "always [madvise] never"), ("glibc 2.36", "[always] madvise never"),
     ("glibc 2.36", "always madvise [never]"), ("", "always [madvise] never")],
)  # fmt: skip
def test_nothing_is_asked_of_who_gives_nothing(
    libc: str, modes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "confstr", lambda _: libc, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: modes)
    assert not cli.huge_pages_on_request()
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.35", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "always [madvise] never")
    assert cli.huge_pages_on_request()
