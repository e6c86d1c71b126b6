"""Processes of one run, joined over loopback."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def finish(started: Sequence[subprocess.Popen[str]], *, timeout: float) -> None:
    """Waits until all have ended well; where one has not, the others are ended too."""
    try:
        for process in started:
            _, err = process.communicate(timeout=timeout)
            assert process.returncode == 0, err[-3000:]
    finally:
        for process in started:
            process.kill()
