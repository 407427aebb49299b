"""A model hub on this machine: the requests that huggingface_hub sends for a download, answered from memory."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 100_000
"""Files of this size or more are in Git LFS, and served by redirection, as on the real hub."""


@dataclass
class Repo:
    """A repository with one commit.

    Attributes:
        card: the metadata of its model card.
        token: the token that may read it; empty if all may.
    """

    files: Mapping[str, bytes]
    card: Mapping[str, str] = field(default_factory=dict)
    token: str = ""
    is_gated: bool = False

    def sibling(self, name: str) -> dict[str, object]:
        content = self.files[name]
        found: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
        if len(content) >= LARGE:
            found["lfs"] = {"size": len(content), "sha256": sha256(content), "pointerSize": 134}
        return found

    def entry_of_tree(self, name: str) -> dict[str, object]:
        content = self.files[name]
        found: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
        if len(content) >= LARGE:
            found["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return found


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324  as git names it


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint by name, for a repository that holds it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Hub:
    """A running hub.

    Attributes:
        repos: its repositories, by name; all at :data:`COMMIT`.
        requests: method, path and the header ``Range`` of each request.
        with_token: method and path of each request that had a token.
        cuts: after how many bytes of the next answers with a large file the connection is closed.
        corrupts: whether large files are served with one byte changed.
        on_content: called before the content of a file is sent.
    """

    def __init__(self, url: str = "") -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.with_token: list[tuple[str, str]] = []
        self.cuts: list[int] = []
        self.corrupts = False
        self.on_content: Callable[[], object] = lambda: None

    @property
    def cdn(self) -> str:
        """Where the large files are: another host by name, to which the client must not send its token."""
        return f"{self.url.replace('127.0.0.1', 'localhost')}/cdn"

    def ranges(self) -> list[str]:
        """Return the header ``Range`` of each request for the content of a large file."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.startswith("/cdn/")]

    def fetched(self) -> list[str]:
        """Return the names of the files whose content was sent, sorted."""
        return sorted(
            path.split(f"/resolve/{COMMIT}/")[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        )


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub on a free port of 127.0.0.1."""
    hub = Hub()

    class Handler(_Handler):
        pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Print nothing about a client that stops in the middle of a file."""

    Handler.hub = hub
    with Server(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub ask a hub and keep its files in a folder, as with ``HF_ENDPOINT`` and ``HF_HOME``."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    # Small pieces, as the files are small, and no pauses between two attempts of a download.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _seconds: None, time=time.time))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if "Authorization" in self.headers:
            self.hub.with_token.append((self.command, path))
        if path.startswith("/cdn/"):
            self._send_large(path.removeprefix("/cdn/"))
            return
        if path == "/api/whoami-v2":
            is_known = self.headers.get("Authorization") == "Bearer right"
            self._send(200 if is_known else 401, b'{"name": "ada"}', {"Content-Type": "application/json"})
            return
        name = path.removeprefix("/api/models/").removeprefix("/")
        owner, repo_name, kind, *rest = [*name.split("/", 3), "", ""]
        repo = self.hub.repos.get(f"{owner}/{repo_name}")
        if repo is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if self._refuses(repo, rest[0].partition("/")[0]):
            return
        if path.startswith("/api/"):
            self._send_json(repo, f"{owner}/{repo_name}", kind)
        else:
            self._send_file(repo, rest[0].partition("/")[2])

    def _refuses(self, repo: Repo, revision: str) -> bool:
        if revision != COMMIT:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif self.headers.get("Authorization") == "Bearer expired":
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            code = "GatedRepo" if repo.is_gated else "RepoNotFound"
            self._send(403 if repo.is_gated else 401, b"{}", {"X-Error-Code": code})
        else:
            return False
        return True

    def _send_json(self, repo: Repo, name: str, kind: str) -> None:
        if kind == "tree":
            body: object = [repo.entry_of_tree(file) for file in repo.files]
        else:
            siblings = [repo.sibling(file) for file in repo.files]
            body = {"id": name, "sha": COMMIT, "siblings": siblings, "cardData": dict(repo.card)}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repo: Repo, file: str) -> None:
        if file not in repo.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = repo.files[file]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{blob_id(content)}"'}
        if len(content) < LARGE:
            self._send(200, content, headers)
            return
        digest = sha256(content)
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/{digest}"})

    def _send_large(self, digest: str) -> None:
        contents = {sha256(content): content for repo in self.hub.repos.values() for content in repo.files.values()}
        content = contents[digest]
        if self.hub.corrupts:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._send(206 if start else 200, content[start:], headers, self.hub.cuts.pop(0) if self.hub.cuts else None)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if "X-Repo-Commit" in headers:
                self.hub.on_content()
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None
