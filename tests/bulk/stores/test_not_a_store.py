"""A server that is not a store, or does not respond: one plain error in a bounded time, for every store."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BulkError
from gateway.bulk.stores.protocol import CollectionInfo
from tests.bulk.stores.rows import count, read

HTTP = b"HTTP/1.1 %s\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\nboom"
RESPONSES: dict[str, bytes | None] = {
    "silence": None,
    "nothing": b"",
    "garbage": b"\x00\xffgarbage\r\n\r\n",
    "500": HTTP % b"500 Internal Server Error",
    "404": HTTP % b"404 Not Found",
    "a web page": HTTP % b"200 OK",
}


@contextmanager
def serving(response: bytes | None) -> Iterator[int]:
    """Respond to every request in the same way, on a free port; ``None`` for never."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                if response is not None:
                    threading.Thread(target=respond, args=(connection, response), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


def test_a_chroma_server_that_answers_its_first_request_alone_is_one_error() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), StalledDatabase) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"chroma://127.0.0.1:{server.server_port}/docs"
        problem = problem_of(lambda: read(url))
        STALLED.set()
        server.shutdown()
    assert problem.startswith(url.removesuffix("/docs"))
    assert "cannot be reached" in problem


STALLED = threading.Event()


class StalledDatabase(BaseHTTPRequestHandler):
    """Answers what needs no database."""

    def do_GET(self) -> None:
        """Answer a request for the client's identity."""
        if not self.path.endswith("/auth/identity"):
            STALLED.wait(30)
            return
        content = b'{"user_id": "", "tenant": "default_tenant", "databases": ["default_database"]}'
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def respond(connection: socket.socket, response: bytes) -> None:
    try:
        while connection.recv(65_536):
            connection.sendall(response)
            if not response.startswith(b"HTTP"):
                connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.stores.qdrant_connection._TIMEOUT_S", 1)
    monkeypatch.setattr("gateway.bulk.stores.chroma_connection._TIMEOUT_S", 1.0)
    monkeypatch.setattr("gateway.bulk.stores.milvus.TIMEOUT_S", 1.0)
    monkeypatch.setattr("gateway.bulk.stores.pgvector_connection._CONNECT_S", 2)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("kind", ["qdrant", "chroma", "milvus", "pgvector"])
def test_a_server_that_is_not_a_store_is_one_error(kind: str, response: str) -> None:
    with serving(RESPONSES[response]) as port:
        store = f"{kind}://127.0.0.1:{port}"
        url = f"{store}/shop/docs" if kind == "pgvector" else f"{store}/docs"
        problems = [problem_of(lambda: read(url)), problem_of(lambda: count(url))]
        if kind != "chroma":
            problems.append(problem_of(lambda: describe(url)))
    for problem in problems:
        assert problem.startswith(store), problem
        assert any(words in problem for words in (
            "cannot be reached", f"does not respond like {kind.capitalize()}", "fails with status 500: boom", "status 404",
        )), problem  # fmt: skip
        assert "\n" not in problem


def describe(url: str) -> CollectionInfo:
    """Look at a collection, as the first step of a move does."""
    place = read_place(url)
    assert place is not None
    with closing(open_movable(place)) as store:
        return store.describe(place.collection)


def problem_of(act: Callable[[], object]) -> str:
    with pytest.raises(BulkError) as caught:
        act()
    return str(caught.value)
