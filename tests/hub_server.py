"""A small Hub on loopback: enough of its HTTP for huggingface_hub's own client, and for all that can go wrong.

    with serving(Hub()) as hub:
        hub.add("org/name", {"config.json": b"..."}, licence="mit")   # hub.url is for HF_ENDPOINT
        hub.cut["model.safetensors"] = [1000]                          # close after 1,000 bytes, once
        hub.refuse["/model.safetensors"] = [0, 503]                    # answer the second request so
        hub.requests                                                   # what came: method, path, headers

Files that the real Hub keeps in large-file storage are redirected to another host name with their SHA-256 as ETag.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

CLOSED = "http://127.0.0.1:9"  # the discard service, which nobody runs
LARGE = (".safetensors", ".bin", ".pt")


@dataclass
class Repo:
    """A repository: a set of files for every commit, and names for commits."""

    revisions: dict[str, str]
    files: dict[str, dict[str, bytes]]
    card: dict[str, Any]
    gated: bool = False
    private: str | None = None  # the token that opens it


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """The repositories, what shall go wrong, and what was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    refuse: dict[str, list[int]] = field(default_factory=dict)  # by a path's end, a status a request; 0 is none
    down: int = 0  # the status of all answers
    page: bytes = b""  # what all answers are: those of a proxy, say
    etag: str = ""  # of large files, in place of the true one
    headers: dict[str, str] = field(default_factory=dict)  # of refusals
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def add(self, name: str, files: dict[str, bytes], *, licence: str | None = "mit", **more: Any) -> str:
        """Put files into a repository, as its next commit on main; returns the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}, {}, **more))
        repo.card = {"license": licence} if licence else {}
        repo.files[commit] = files
        repo.revisions["main"] = commit
        return commit

    def asked(self, end: str, method: str = "GET") -> list[Request]:
        """The requests whose path ends so."""
        return [request for request in self.requests if request.method == method and request.path.endswith(end)]


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        try:
            refused = [codes.pop(0) for end, codes in self.hub.refuse.items() if path.endswith(end) and codes]
            if status := max(refused, default=self.hub.down):
                raise Refusal(status)
            if self.hub.page:
                self._reply(200, {"Content-Type": "text/html"}, self.hub.page)
            elif found := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
                self._info(found[1], found[2] or "main")
            elif found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
                self._file(found[1], found[2], found[3])
            elif found := re.fullmatch(r"/large/(.+)/(.+)/(.+)", path):
                self._send(found[3], self.hub.repos[found[1]].files[found[2]][found[3]], {})
            else:
                raise Refusal(404)
        except Refusal as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._reply(error.status, {k: v for k, v in headers.items() if v} | self.hub.headers, b"")

    def _find(self, name: str, revision: str, *, listing: bool = False) -> tuple[str, dict[str, bytes]]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == "expired":
            raise Refusal(401, message="Invalid credentials in Authorization header")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private is not None and token != repo.private):
            raise Refusal(401 if not token else 404, "RepoNotFound", "Repository not found")
        if repo.gated and not listing:
            raise Refusal(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.files:
            raise Refusal(404, "RevisionNotFound", "Invalid rev id")
        return commit, repo.files[commit]

    def _info(self, name: str, revision: str) -> None:
        commit, files = self._find(name, revision, listing=True)
        siblings = [
            {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            for file, data in files.items()
        ]
        info = {"id": name, "sha": commit, "siblings": siblings, "cardData": self.hub.repos[name].card, "tags": []}
        self._reply(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _file(self, name: str, revision: str, file: str) -> None:
        commit, files = self._find(name, revision)
        if file not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        data = files[file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if not file.endswith(LARGE):
            self._send(file, data, headers)
            return
        port = urlsplit(self.hub.url).port
        headers["X-Linked-Etag"] = f'"{self.hub.etag or hashlib.sha256(data).hexdigest()}"'
        headers["X-Linked-Size"] = str(len(data))
        headers["Location"] = f"http://localhost:{port}/large/{name}/{commit}/{file}"
        self._reply(302, headers, b"")

    def _send(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(found[1]), 206
            if start >= len(data):
                raise Refusal(416)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["Accept-Ranges"] = "bytes"
        cuts = self.hub.cut.get(file, []) if self.command == "GET" else []
        self._reply(status, headers, data[start:], cuts.pop(0) if cuts else None)

    def _reply(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port for as long as this lasts."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def apart(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Give huggingface_hub an empty cache, no token, nobody to talk to, small chunks, and no pauses."""
    ours = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "CLIPCLI_OFFLINE")
    for name in [name for name in os.environ if name.startswith(ours)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    for name, value in (("HF_TOKEN_PATH", str(home / "token")), ("HF_HUB_DISABLE_TELEMETRY", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)  # read at import
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda _: None))
