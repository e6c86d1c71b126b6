"""A stand-in for the Hugging Face hub on this machine: the calls by which files go up and down.

It speaks the hub's protocol over loopback (make a repository or a branch, ask how to send, commit;
describe a repository, list its files, send one), and keeps everything in memory. A commit changes
what lies in its branch, as on the hub: what it neither sends nor deletes stays.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# Every repository's one commit.
REVISION = "0123456789abcdef0123456789abcdef01234567"


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
        refuse: set, every upload is answered with 403.
        files: {id: {path: content}} of what can be downloaded, by "id@branch" beside main; an id
            begins with "datasets/" where it is no model's.
        sent: paths that were downloaded, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Any] = {}
        self.branches: list[tuple[str, str]] = []
        self.commits: list[Commit] = []
        self.refuse = False
        self.files: dict[str, dict[str, bytes]] = {}
        self.sent: list[str] = []
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

            def do_HEAD(self) -> None:
                self._get(body=False)

            def do_GET(self) -> None:
                self._get(body=True)

            def _get(self, *, body: bool) -> None:
                found = hub.describe(self.path.partition("?")[0], sending=body)
                content = b'{"error": "not found"}' if found is None else found
                self.send_response(404 if found is None else 200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", REVISION)
                if found is None:
                    known = any(f"/{repo}/" in self.path for repo in hub.files)
                    self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                self.end_headers()
                if body:
                    self.wfile.write(content)

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

    def describe(self, path: str, *, sending: bool) -> bytes | None:
        """What a GET is answered with; None: there is no such thing."""
        if found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path
        ):
            kind, repo, what, revision = found.groups()
            repo_files = self.files.get(repo if kind == "models" else f"datasets/{repo}")
            files = self.files.get(f"{repo}@{revision}", repo_files)
            if files is None:
                return None
            if what == "tree":
                said: Any = [listed(name, content) for name, content in files.items()]
            else:
                siblings = [{"rfilename": name} for name in files]
                said = {"id": repo, "sha": REVISION, "siblings": siblings, "tags": []}
            return json.dumps(said).encode()
        if found := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path):
            repo, name = found.groups()
            content = self.files.get(repo, {}).get(name)
            if sending and content is not None:
                self.sent.append(name)
            return content
        return None

    def answer(self, path: str, body: bytes, token: str) -> tuple[int, Any]:
        if self.refuse:
            return 403, {"error": "this token may not write"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo not in self.repos:
                private = asked.get("private", asked.get("visibility"))
                self.repos[repo] = private in (True, "private")
                self.files.setdefault(repo, {})
            return 200, {"url": f"{self.url}/{repo}", "name": repo, "id": repo}
        if path == "/api/validate-yaml":  # the head of a README.md
            text = json.loads(body)["content"]
            errors = [] if text.startswith("---\n") else [{"message": "it has no head"}]
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/.+", path):
            asked = urllib.parse.parse_qs(body.decode())["paths"]
            files = self.files[f"datasets/{found[1]}"]
            return 200, [listed(name, files[name]) for name in asked if name in files]
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path)
        assert found is not None, path
        repo, action, revision = found.groups()
        if action == "branch":
            self.branches.append((repo, revision))
            self.files.setdefault(f"{repo}@{revision}", dict(self.files.get(repo, {})))
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
        branch = self.files.setdefault(repo if revision == "main" else f"{repo}@{revision}", {})
        for line in lines:
            if line["key"] == "deletedFile":
                del branch[line["value"]["path"]]
        branch |= sent
        self.commits.append(Commit(repo, revision, message, token, sent))
        url = f"{self.url}/{repo}/commit/{len(self.commits)}"
        return 200, {"success": True, "commitOid": f"{len(self.commits):040x}", "commitUrl": url}


def listed(name: str, content: bytes) -> dict[str, Any]:
    """What the hub says of a file."""
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}


@contextlib.contextmanager
def standing_in() -> Iterator[StandInHub]:
    """While the block lasts, this process takes a stand-in for the hub."""
    from huggingface_hub import constants

    hub = StandInHub()
    with pytest.MonkeyPatch.context() as patch:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        try:
            yield hub
        finally:
            hub.close()
