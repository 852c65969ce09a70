"""A stand-in for the Hugging Face Hub on 127.0.0.1, with the faults that a download must survive.

It speaks what fetching a file needs: `/{repo}/resolve/{revision}/{path}` answers with the file's commit, size and hash
and redirects to a second server, the "CDN", which knows ranges and must never see a token.
Protocol: https://huggingface.co/docs/hub, and the requests that huggingface_hub sends.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

COMMIT = "c0ffee" + "0" * 34
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class Seen:
    """One request, as it arrived."""

    server: str  # "hub" or "cdn"
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class FakeHub:
    """What the hub holds and how it misbehaves; tests set the fields, and read `seen` afterwards."""

    files: dict[str, bytes] = field(default_factory=dict)  # "owner/repo/path" -> content
    gated: set[str] = field(default_factory=set)  # "owner/repo"
    accounts: dict[str, set[str]] = field(default_factory=dict)  # token -> gated repositories it may read
    cut_after: list[int] = field(default_factory=list)  # bytes after which each of the next downloads breaks off
    status: int | None = None  # answered to everything
    damaged: bool = False  # the CDN's content has one byte changed
    knows_ranges: bool = True
    announces_hash: bool = True
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    cdn_url: str = ""

    def of(self, server: str, method: str) -> list[Seen]:
        return [request for request in self.seen if (request.server, request.method) == (server, method)]

    @property
    def ranges(self) -> list[str | None]:
        """What parts of files were asked for, in order; None is a whole file."""
        return [request.range for request in self.of("cdn", "GET")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    role: str

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.seen.append(Seen(self.role, self.command, self.path, self.headers.get("Range"), token))
        if self.hub.status is not None:
            self._send(self.hub.status)
        elif self.role == "cdn":
            self._send_content(self.hub.files[unquote(self.path.removeprefix("/"))])
        else:
            self._resolve(token)

    def _resolve(self, token: str | None) -> None:
        asked = RESOLVE.fullmatch(self.path)
        if asked is None:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        repo, path = asked["repo"], unquote(asked["path"])
        if token is not None and token not in self.hub.accounts:
            return self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repo in self.hub.gated and token is None:
            return self._send(401, {"X-Error-Code": "GatedRepo"})
        if repo in self.hub.gated and token is not None and repo not in self.hub.accounts[token]:
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        content = self.hub.files.get(f"{repo}/{path}")
        if content is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        about = {"X-Repo-Commit": COMMIT, "Location": f"{self.hub.cdn_url}/{repo}/{asked['path']}"}
        if self.hub.announces_hash:
            about |= {
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
        return self._send(302, about)

    def _send_content(self, content: bytes) -> None:
        if self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers = {"Content-Type": "application/octet-stream"}
        start = 0
        if asked and self.hub.knows_ranges:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        self.send_response(206 if "Content-Range" in headers else 200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.hub.cut_after:
            body = body[: self.hub.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def _send(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A running hub with its CDN, each on a free port of 127.0.0.1."""
    hub = FakeHub()
    servers = []
    for role in ("hub", "cdn"):
        handler = type(f"_{role.title()}Handler", (_Handler,), {"hub": hub, "role": role})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@contextmanager
def only_hub(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """huggingface_hub knows this hub alone, holds no login but `home/token`, and waits for nothing.

    `hub` starts sound and empty, whatever an earlier test made of it.
    """
    from huggingface_hub import close_session, constants

    vars(hub).update(vars(FakeHub(url=hub.url, cdn_url=hub.cdn_url)))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what a cut loses at most; 10 MB in earnest
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    try:
        yield hub
    finally:
        close_session()
