"""A stand-in for the Hugging Face hub on this machine: the calls by which files are uploaded.

It speaks the hub's protocol (make a repository or a branch, ask how to send, commit) over loopback,
and keeps what it was sent in memory.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclasses.dataclass
class Commit:
    """One commit: its repository, branch, message, token and files."""

    repo: str
    revision: str
    message: str
    token: str
    files: dict[str, bytes]


class StandInHub:
    """The server.

    Attributes:
        url: where it listens.
        repos: {id: whether it is private} of what was made.
        branches: (id, name) of branches that were made.
        commits: in order.
        refuse: set, everything is answered with 403.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Any] = {}
        self.branches: list[tuple[str, str]] = []
        self.commits: list[Commit] = []
        self.refuse = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else self._chunks()
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                status, answer = hub.answer(self.path.partition("?")[0], body, token)
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def _chunks(self) -> bytes:
                parts = []
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return b""
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, Any]]:
        if self.refuse:
            return 403, {"error": "this token may not write"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo not in self.repos:
                private = asked.get("private", asked.get("visibility"))
                self.repos[repo] = private in (True, "private")
            return 200, {"url": f"{self.url}/{repo}", "name": repo, "id": repo}
        if path == "/api/validate-yaml":  # the head of a README.md
            text = json.loads(body)["content"]
            errors = [] if text.startswith("---\n") else [{"message": "it has no head"}]
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path)
        assert found is not None, path
        repo, action, revision = found.groups()
        if action == "branch":
            self.branches.append((repo, revision))
            return 200, {}
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        assert action == "commit", path
        lines = [json.loads(line) for line in body.splitlines()]
        sent = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.commits.append(Commit(repo, revision, message, token, sent))
        url = f"{self.url}/{repo}/commit/{len(self.commits)}"
        return 200, {"success": True, "commitOid": f"{len(self.commits):040x}", "commitUrl": url}


@contextlib.contextmanager
def standing_in() -> Iterator[StandInHub]:
    """While the block lasts, this process's uploads go to a stand-in."""
    from huggingface_hub import constants

    hub = StandInHub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        try:
            yield hub
        finally:
            hub.close()
