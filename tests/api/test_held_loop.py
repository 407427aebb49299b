"""No request of any kind holds the event loop for more than 50 ms: others are answered in the meantime.

The loop is held by its own thread, between two waits for its sockets, and by a worker thread, in a call that keeps the
interpreter's lock. Both are measured in CPU time of the thread, which a busy machine does not count; as it still slows a
thread down, the best of a few tries counts, and a machine that parses plain text more slowly has more time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from types import FrameType
from typing import Any

import numpy as np
import orjson
import pytest
import uvicorn

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Model
from gateway.server import server_config
from gateway.types import Embeddings, EmbedJob, ModelKind, Timings
from tests.listener import make_listener

MIB = 1 << 20
MAX_HELD_S = 0.05
PATIENCE_S = 60.0
WIDTH = 1024
WORKERS = ("json", "tokens")


class ReadyBackend(FakeBackend):
    """A fake whose work takes no time, however long the texts are."""

    async def embed(self, job: EmbedJob) -> Embeddings:
        num_texts = len(job.texts)
        vectors = np.full((num_texts, self._info.width), 0.1234567, np.float32)
        return Embeddings(vectors=vectors, num_tokens=[1] * num_texts, truncated=(), timings=Timings(0.0, 0.0, 0.0))


class LoopTurns(selectors.DefaultSelector):
    """Waits for sockets, and keeps the longest time that the loop computed between two waits."""

    longest_s = 0.0
    _since: float | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._since is not None:
            self.longest_s = max(self.longest_s, time.thread_time() - self._since)
        ready = super().select(timeout)
        self._since = time.thread_time()
        return ready


class Calls:
    """A profiler of the worker threads: keeps the longest call into C, which may hold the interpreter's lock."""

    longest_s = 0.0
    longest = ""

    def __init__(self) -> None:
        self._started = threading.local()

    def __call__(self, _frame: FrameType, event: str, called: Any) -> None:
        if not threading.current_thread().name.startswith(WORKERS):
            return
        if event == "c_call":
            self._started.at = time.thread_time()
        elif event in ("c_return", "c_exception"):
            held_s = time.thread_time() - getattr(self._started, "at", time.thread_time())
            if held_s > self.longest_s:
                self.longest_s, self.longest = held_s, getattr(called, "__qualname__", repr(called))


Ask = Callable[[str, bytes], tuple[int, int]]


@pytest.fixture
def turns() -> LoopTurns:
    return LoopTurns()


@pytest.fixture
def calls() -> Iterator[Calls]:
    calls = Calls()
    threading.setprofile(calls)
    yield calls
    threading.setprofile(None)


@pytest.fixture
def _frozen() -> Iterator[None]:
    """Hide the objects of the test session from the garbage collector: a gateway's process has fewer."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def ask(
    make_model: Callable[..., Model], make_fleet: Callable[..., Any], turns: LoopTurns, calls: Calls, _frozen: None
) -> Iterator[Ask]:
    """Return a function that posts a body to a gateway, and gives status and length of the answer."""
    mini = ReadyBackend(fake_info("mini", width=WIDTH, max_tokens=8192))
    ranker = ReadyBackend(fake_info("ranker", width=1, kind=ModelKind.RERANK))
    registry, fleet = make_fleet(
        make_model("mini", backend=mini, width=WIDTH),
        make_model("ranker", backend=ranker, width=1, kind=ModelKind.RERANK),
        aliases={"default": "mini"},
    )
    settings = Settings()
    app = create_app(Deployment(registry, settings, fleet))
    server = uvicorn.Server(server_config(app, settings))

    async def run(listener: socket.socket) -> None:
        for model in fleet:
            await model.backend.start()
        fleet.started.set()
        await server.serve(sockets=[listener])

    def serve(listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(turns)) as runner:
            runner.run(run(listener))

    with make_listener() as listener:
        thread = threading.Thread(target=serve, args=(listener,), name="loop")
        thread.start()

        def ask(head: str, body: bytes) -> tuple[int, int]:
            with socket.create_connection(listener.getsockname(), timeout=PATIENCE_S) as connection:
                lines = f"POST {head}\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
                connection.sendall(lines.encode() + body)
                return receive(connection)

        try:
            ask("/v1/embeddings HTTP/1.1", b'{"input": [[1]]}')  # loads the vocabulary of token ids
            yield ask
        finally:
            server.should_exit = True
            thread.join()


def receive(connection: socket.socket) -> tuple[int, int]:
    """Read an answer to its end; return its status and length."""
    start, length = connection.recv(MIB), 0
    status = int(start.split(b" ", 2)[1])
    with contextlib.suppress(ConnectionResetError):
        while received := connection.recv(MIB):
            length += len(received)
    return status, len(start) + length


def filled(before: bytes, unit: bytes, after: bytes) -> bytes:
    """Return a body of almost 16 MiB."""
    return before + unit * ((16 * MIB - len(before) - len(after)) // len(unit)) + after


def texts(num_characters: int, **fields: object) -> bytes:
    """Return a request for 2,048 texts."""
    return orjson.dumps({"input": ["a" * num_characters] * 2048, **fields})


EMBED = "/v1/embeddings HTTP/1.1"
GZIP = f"{EMBED}\r\ncontent-encoding: gzip"
BODIES = {
    "many short texts": (EMBED, filled(b'{"input": ["a"', b',"a"', b"]}"), 400),
    "as many texts as are allowed": (EMBED, texts(8_000), 200),
    "one long text": (EMBED, filled(b'{"input": "', b"a", b'"}'), 200),
    "one text of escapes": (EMBED, filled(b'{"input": "', rb"\u00e4", b'"}'), 200),
    "one text of mixed escapes": (EMBED, filled(b'{"input": "', rb"\u00e4\"\\", b'"}'), 400),
    "one text of lone surrogates": (EMBED, filled(b'{"input": "', rb"\ud800", b'"}'), 400),
    "one text of quotes": (EMBED, filled(b'{"input": "', rb"\"", b'"}'), 400),
    "as many backslashes as are allowed": (EMBED, filled(b'{"input": "' + rb"\"" * 3_000_000, b"a", b'"}'), 200),
    "token ids": (EMBED, filled(b'{"input": [1', b",1", b"]}"), 400),
    "as many numbers as are allowed": (EMBED, orjson.dumps({"input": [[1] * 400] * 1_200, "dimensions": "a"}), 400),
    "token ids that are decoded": (EMBED, orjson.dumps({"input": [[1] * 20] * 2_000}), 200),
    "deep nesting": (EMBED, filled(b'{"input": ', b"[", b""), 400),
    "deep objects": (EMBED, filled(b"", b'{"input":', b""), 400),
    "many fields": (EMBED, filled(b'{"input": "a"', b',"b":1', b"}"), 400),
    "no JSON": (EMBED, filled(b"", b"a", b""), 400),
    "no UTF-8": (EMBED, filled(b'{"input": "', b"\xff", b'"}'), 400),
    "gzip of texts": (GZIP, gzip.compress(texts(8_000)), 200),
    "gzip of zeros": (GZIP, gzip.compress(bytes(512 * MIB), 1), 413),
    "documents": ("/v1/rerank HTTP/1.1", orjson.dumps({"query": "a" * MIB, "documents": ["b" * 7_000] * 2048}), 200),
    "TEI's texts": ("/embed HTTP/1.1", orjson.dumps({"inputs": ["a" * 8_000] * 2048}), 200),
    "TEI's tokens": ("/tokenize HTTP/1.1", orjson.dumps({"inputs": "a " * 20_000}), 200),
    "the tokens of a text": ("/v1/tokenize HTTP/1.1", orjson.dumps({"input": "a " * 100_000}), 200),
    "Ollama's texts": ("/api/embed HTTP/1.1", orjson.dumps({"model": "mini", "input": ["a" * 8_000] * 2048}), 200),
}


@cache
def slowness() -> float:
    """Return how many times as long as 25 ms this machine takes to parse 16 MiB of plain text, and at least 1."""
    body = filled(b'"', b"a", b'"')

    def parse_s() -> float:
        began = time.thread_time()
        orjson.loads(body)
        return time.thread_time() - began

    return max(1.0, min(parse_s() for _ in range(5)) / 0.025)


def check(ask: Ask, turns: LoopTurns, calls: Calls, head: str, content: bytes) -> tuple[int, int]:
    """Send a request until one holds the loop for no longer than is allowed; return status and length of its answer."""
    most_s = MAX_HELD_S * slowness()
    for is_last in (False, False, True):
        turns.longest_s = calls.longest_s = 0.0
        answer = ask(head, content)
        if is_last or max(turns.longest_s, calls.longest_s) <= most_s:
            break
    assert turns.longest_s <= most_s
    assert calls.longest_s <= most_s, calls.longest
    return answer


@pytest.mark.parametrize("body", BODIES)
def test_a_large_body_does_not_hold_the_loop(ask: Ask, turns: LoopTurns, calls: Calls, body: str) -> None:
    head, content, status = BODIES[body]

    assert check(ask, turns, calls, head, content)[0] == status


@pytest.mark.parametrize(("encoding", "least_bytes"), [("float", 16 * MIB), ("base64", 8 * MIB), ("binary", MIB // 4)])
def test_a_large_answer_does_not_hold_the_loop(
    ask: Ask, turns: LoopTurns, calls: Calls, encoding: str, least_bytes: int
) -> None:
    status, num_bytes = check(ask, turns, calls, EMBED, texts(1, encoding_format=encoding))

    assert status == 200
    assert num_bytes > least_bytes


def test_work_that_holds_the_loop_is_noticed(ask: Ask, turns: LoopTurns, calls: Calls, monkeypatch: Any) -> None:
    """The probe itself: the same body, parsed on the loop, or in a thread without the limit on its parts."""
    numbers = filled(b'{"input": [1', b",1", b"]}")
    monkeypatch.setattr("gateway.api.json_body._MAX_VALUES", 16 * MIB)
    ask(EMBED, numbers)
    assert calls.longest_s > MAX_HELD_S

    monkeypatch.setattr("gateway.api.endpoint.SMALL_BYTES", 16 * MIB)
    ask(EMBED, numbers)
    assert turns.longest_s > MAX_HELD_S
