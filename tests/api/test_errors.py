"""After every kind of failure, the client gets an answer with the reason, and no other client notices."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.access.keyring import Keyring
from gateway.access.memory import MemoryBudget
from gateway.app import layers
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Experiment, ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import (
    DeadlineExceeded,
    InferenceFailed,
    Overloaded,
    RequestError,
    ShuttingDown,
)
from gateway.fleet import Model
from gateway.http import middleware
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, Timings

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
MakeModel = Callable[..., Model]
Serve = Callable[..., contextlib.AbstractContextManager[tuple[str, int]]]

SECRET = "secret detail"
MIB = 1024 * 1024


@pytest.fixture
def log_of_errors(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Return the middleware's log, one JSON object per line."""
    lines = io.StringIO()
    processors = [structlog.processors.add_log_level, structlog.processors.format_exc_info]
    logger = structlog.wrap_logger(
        structlog.PrintLogger(lines), processors=[*processors, structlog.processors.JSONRenderer()]
    )
    monkeypatch.setattr(middleware, "log", logger)
    return lines


def entries(lines: io.StringIO, event: str) -> list[dict[str, object]]:
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    return [entry for entry in found if entry["event"] == event]


class StubBackend(FakeBackend):
    """Returns the vectors that it was given."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        super().__init__(fake_info("broken"))

    async def embed(self, job: EmbedJob) -> Embeddings:
        return Embeddings(self._vectors, [1] * len(job.texts), [], Timings(0, 0, 0))


def failing(error: Exception) -> FakeBackend:
    """Return a backend that fails for the text ``bad`` only."""

    def fail(job: EmbedJob) -> None:
        if "bad" in job.texts:
            raise error

    return FakeBackend(fake_info("mini"), on_embed=fail)


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


# ------------------------------------------------------------------------------------------------ the model's errors


@pytest.mark.parametrize("error", [RuntimeError(SECRET), KeyError(SECRET), TimeoutError(SECRET), OSError(5, SECRET)])
async def test_an_unexpected_exception_is_only_in_the_log(
    connect: Connect, make_model: MakeModel, check_error: CheckError, log_of_errors: io.StringIO, error: Exception
) -> None:
    client = await connect(make_model("mini", backend=failing(error)), aliases={})

    response = await client.post(
        "/v1/embeddings", json={"input": "bad", "model": "mini"}, headers={"x-request-id": "my-id"}
    )

    message = check_error(response, 500, "internal_error", type_="server_error")
    assert message == "internal error; the log has more under request id my-id"
    [entry] = entries(log_of_errors, "unexpected_error")
    assert entry["request_id"] == "my-id"
    assert SECRET in str(entry["exception"])
    assert "Traceback" in str(entry["exception"])
    assert [entry["status"] for entry in entries(log_of_errors, "request")] == [500]


@pytest.mark.usefixtures("log_of_errors")
async def test_the_requests_next_to_and_after_a_failed_one_are_answered(
    connect: Connect, make_model: MakeModel
) -> None:
    backend = failing(RuntimeError(SECRET))
    backend._delay_s = 0.01
    client = await connect(make_model("mini", backend=backend), aliases={"default": "mini"})

    texts = ["good", "bad", "good", "bad", "good"]
    responses = await asyncio.gather(*(client.post("/v1/embeddings", json={"input": text}) for text in texts))
    after = await client.post("/v1/embeddings", json={"input": "good"})

    assert [response.status_code for response in responses] == [200, 500, 200, 500, 200]
    assert after.status_code == 200


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        pytest.param(np.full((2, 8), np.nan, np.float32), "not finite", id="NaN"),
        pytest.param(np.array([[1] * 8, [np.inf] * 8], np.float32), "not finite", id="infinity in one of two"),
        pytest.param(np.ones((2, 4), np.float32), "shape (2, 4) instead of 2 vectors of 8 dimensions", id="width"),
        pytest.param(np.ones((1, 8), np.float32), "shape (1, 8) instead of 2 vectors of 8 dimensions", id="count"),
        pytest.param(np.zeros((2, 8), np.float32), "length is zero", id="zero"),
    ],
)
@pytest.mark.parametrize("encoding", ["float", "base64", "binary"])
async def test_vectors_that_are_not_right_are_never_handed_out(
    connect: Connect, make_model: MakeModel, check_error: CheckError, vectors: np.ndarray, message: str, encoding: str
) -> None:
    client = await connect(make_model("broken", backend=StubBackend(vectors)), aliases={})

    response = await client.post(
        "/v1/embeddings", json={"input": ["a", "b"], "model": "broken", "encoding_format": encoding}
    )

    assert message in check_error(response, 500, "invalid_vectors", type_="server_error")
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("error", "status", "type_", "headers"),
    [
        pytest.param(Overloaded("full", retry_after_s=7), 429, "rate_limit_error", {"retry-after": "7"}, id="full"),
        pytest.param(Overloaded("full", retry_after_s=0), 429, "rate_limit_error", {"retry-after": "1"}, id="at least 1"),
        pytest.param(
            Overloaded("full", retry_after_s=9000), 429, "rate_limit_error", {"retry-after": "120"}, id="at most 120"
        ),
        pytest.param(ShuttingDown("bye", retry_after_s=5), 503, "server_error", {"retry-after": "5"}, id="stopping"),
        pytest.param(DeadlineExceeded("late"), 504, "server_error", {}, id="late"),
        pytest.param(InferenceFailed("no"), 500, "server_error", {}, id="failed"),
        pytest.param(
            InferenceFailed("no", is_permanent=True), 500, "server_error", {"x-should-retry": "false"}, id="permanent"
        ),
    ],
)  # fmt: skip
async def test_a_deliberate_error_has_the_headers_that_steer_retries(
    connect: Connect,
    make_model: MakeModel,
    check_error: CheckError,
    error: RequestError,
    status: int,
    type_: str,
    headers: dict[str, str],
) -> None:
    client = await connect(make_model("mini", backend=failing(error)), aliases={"default": "mini"})

    response = await client.post("/v1/embeddings", json={"input": "bad"})

    assert check_error(response, status, error.code, type_=type_) == error.message
    steering = {name: response.headers[name] for name in ("retry-after", "x-should-retry") if name in response.headers}
    assert steering == headers


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        pytest.param({}, 300, id="the limit"),
        pytest.param({"x-stainless-read-timeout": "20"}, 20, id="the client's patience"),
        pytest.param({"x-stainless-read-timeout": "600"}, 300, id="more than the limit"),
        pytest.param({"x-stainless-read-timeout": "0"}, 300, id="zero"),
        pytest.param({"x-stainless-read-timeout": "-1"}, 300, id="negative"),
        pytest.param({"x-stainless-read-timeout": "nan"}, 300, id="NaN"),
        pytest.param({"x-stainless-read-timeout": "soon"}, 300, id="no number"),
    ],
)
async def test_work_is_given_up_when_its_client_has_stopped_waiting(
    connect: Connect, make_model: MakeModel, headers: dict[str, str], expected_s: float
) -> None:
    deadlines = []
    backend = FakeBackend(fake_info("mini"), on_embed=lambda job: deadlines.append(job.deadline))
    client = await connect(make_model("mini", backend=backend), aliases={"default": "mini"})
    before = time.monotonic()

    await client.post("/v1/embeddings", json={"input": "a"}, headers=headers)

    assert before + expected_s <= deadlines[0] <= time.monotonic() + expected_s


# ------------------------------------------------------------------------------------------------------ on the wire


def exchange(address: tuple[str, int], request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes unchanged, and return status, headers and body of the answer."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, dict(response.headers), response.read()


def post(body: bytes, path: bytes = b"/v1/embeddings", *headers: bytes) -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_paths_and_bytes_arrive_as_they_were_sent(serve: Serve) -> None:
    with serve() as address:
        slashes = exchange(address, post(b'{"input": "a", "model": "mini"}', b"//v1///embeddings/"))
        latin = exchange(address, post(b'{"input": "\xe9", "model": "mini"}'))
        model = exchange(address, b"GET /v1/models/team%2Fsmall HTTP/1.1\r\nHost: x\r\n\r\n")
        doubled = exchange(address, b"GET //v1/models//team/small/ HTTP/1.1\r\nHost: x\r\n\r\n")
        not_utf8 = exchange(address, b"GET /v1/models/%ff HTTP/1.1\r\nHost: x\r\n\r\n")
        odd_host = exchange(address, b"GET /nothing HTTP/1.1\r\nHost: a[b\r\n\r\n")

    assert slashes[0] == 200
    assert (latin[0], json.loads(latin[2])["error"]["code"]) == (400, "invalid_input")
    assert json.loads(model[2])["id"] == json.loads(doubled[2])["id"] == "team/small"
    assert (not_utf8[0], json.loads(not_utf8[2])["error"]["code"]) == (404, "model_not_found")
    assert (odd_host[0], json.loads(odd_host[2])["error"]["code"]) == (404, "not_found")


def test_a_connection_is_kept_after_an_error(serve: Serve) -> None:
    with serve() as address, httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as client:
        statuses = []
        ports = set()
        for body in ({"input": []}, {"input": "a", "model": "mini"}):
            with client.stream("POST", "/v1/embeddings", json=body) as response:
                statuses.append(response.status_code)
                ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
                response.read()

    assert statuses == [400, 200]
    assert len(ports) == 1


def dripping(body: bytes) -> Iterator[bytes]:
    for i in range(0, len(body), 8):
        time.sleep(0.002)
        yield body[i : i + 8]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"model": "mini", "input": "a text"}', 200, id="right"),
        pytest.param(b'{"model": "mini", "input": "a text"', 400, id="cut off"),
        pytest.param(b'{"model": "nothing", "input": "a text"}', 404, id="unknown model"),
    ],
)
def test_a_slow_upload_is_answered_when_it_has_ended(serve: Serve, body: bytes, status: int) -> None:
    with serve() as (host, port):
        response = httpx.post(f"http://{host}:{port}/v1/embeddings", content=dripping(body))

    assert response.status_code == status


def large_body() -> bytes:
    return b'{"input": "%s"}' % (b"x" * 20 * MIB)


def in_chunks(body: bytes) -> Iterator[bytes]:
    for i in range(0, len(body), MIB):
        yield body[i : i + MIB]


@pytest.mark.parametrize("headers", [{}, {"connection": "close"}], ids=["keep-alive", "close"])
@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "in chunks"])
def test_httpx_reads_why_a_body_was_too_large(
    serve: Serve, check_error: CheckError, is_declared: bool, headers: dict[str, str]
) -> None:
    with serve() as (host, port):
        content = large_body() if is_declared else in_chunks(large_body())
        response = httpx.post(f"http://{host}:{port}/v1/embeddings", content=content, headers=headers)

    assert "the limit is 16777216" in check_error(response, 413, "body_too_large")


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "in chunks"])
def test_urllib_reads_why_a_body_was_too_large(serve: Serve, is_declared: bool) -> None:
    with serve() as (host, port):
        request = urllib.request.Request(
            f"http://{host}:{port}/v1/embeddings", data=large_body() if is_declared else in_chunks(large_body())
        )
        with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(request):  # noqa: S310  our own address
            pass
        with caught.value as response:
            body = json.loads(response.read())

    assert (caught.value.code, body["error"]["code"]) == (413, "body_too_large")


def test_a_client_reads_that_it_needs_a_key_although_it_sends_a_large_body(serve: Serve) -> None:
    with serve(api_keys="sk-right") as (host, port):
        response = httpx.post(f"http://{host}:{port}/v1/embeddings", content=large_body())

    assert response.status_code == 401


def test_a_client_that_asks_before_it_sends_is_spared_the_upload(serve: Serve, log_of_errors: io.StringIO) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 17000000\r\n\r\n"
    with serve() as address, socket.create_connection(address, timeout=10) as connection:
        connection.sendall(head)
        answer = connection.recv(1000)

        assert wait_until(lambda: entries(log_of_errors, "request") != [])  # the upload is not awaited

    assert answer.startswith(b"HTTP/1.1 413 ")


# ------------------------------------------------------------------------------------------------------ disconnects


class SlowBackend(FakeBackend):
    """Takes a minute for the text ``slow``, and reports when such a job begins and when it is canceled."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.was_cancelled = threading.Event()
        super().__init__(fake_info("mini"))

    async def embed(self, job: EmbedJob) -> Embeddings:
        if "slow" in job.texts:
            self.has_begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.was_cancelled.set()
                raise
        return await super().embed(job)


def count(status: int) -> float:
    labels = {"path": "/v1/embeddings", "status": str(status)}
    return metrics.REGISTRY.get_sample_value("gateway_requests_total", labels) or 0


def test_the_work_of_a_client_that_has_gone_is_canceled(
    serve: Serve, make_model: MakeModel, log_of_errors: io.StringIO
) -> None:
    backend = SlowBackend()
    before = count(499)
    with serve(make_model("mini", backend=backend)) as address:
        connection = socket.create_connection(address)
        connection.sendall(post(b'{"input": "slow", "model": "mini"}'))
        assert backend.has_begun.wait(5)
        beside = exchange(address, post(b'{"input": "a", "model": "mini"}'))

        connection.close()

        assert backend.was_cancelled.wait(5)
        after = exchange(address, post(b'{"input": "a", "model": "mini"}'))
        assert wait_until(lambda: count(499) == before + 1)
        [gone] = [entry for entry in entries(log_of_errors, "request") if entry["status"] == 499]
        assert gone["error_code"] == "client_disconnected"

    assert (beside[0], after[0]) == (200, 200)
    assert entries(log_of_errors, "unexpected_error") == []


def test_who_does_not_wait_for_a_slow_arm_is_its_failure(serve: Serve, make_model: MakeModel) -> None:
    backend = SlowBackend()
    arms = ({"model": "mini", "weight": 1}, {"model": "other", "weight": 0})
    split = Experiment.model_validate({"id": "exp", "kind": "cross_space", "unit": ("body:user",), "arms": arms})
    models = make_model("mini", backend=backend), make_model("other")
    with serve(*models, experiments=[split], tokens_per_minute=1000) as address:
        with socket.create_connection(address) as connection:
            connection.sendall(post(b'{"input": "slow", "model": "exp", "user": "ann"}'))
            assert backend.has_begun.wait(5)
        assert backend.was_cancelled.wait(5)

        def control() -> dict[str, object]:
            shown = httpx.get(f"http://{address[0]}:{address[1]}/v1/experiments/exp").json()
            return {name: shown["evidence"][0][name] for name in ("requests", "errors")}

        assert wait_until(lambda: control() == {"requests": 1, "errors": 1}), control()


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"Content-Length: 1000", id="declared"),
        pytest.param(b"Transfer-Encoding: chunked", id="in chunks"),
    ],
)
def test_a_client_that_leaves_in_the_middle_of_its_upload_is_not_an_internal_error(
    serve: Serve, log_of_errors: io.StringIO, head: bytes
) -> None:
    before = count(499), count(500)
    with serve() as address:
        with socket.create_connection(address) as connection:
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n" + head + b'\r\n\r\n5\r\n{"inp')
            time.sleep(0.05)
        assert wait_until(lambda: (count(499), count(500)) != before)

    assert (count(499), count(500)) == (before[0] + 1, before[1])
    assert entries(log_of_errors, "unexpected_error") == []
    assert [entry["error_code"] for entry in entries(log_of_errors, "request")] == ["client_disconnected"]


async def test_an_answer_that_has_begun_is_cut_off_rather_than_repaired(log_of_errors: io.StringIO) -> None:
    """A client must not mistake the first half of an answer for the whole."""

    async def half(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError(SECRET)

    settings = Settings()
    guarded: ASGIApp = half
    memory = MemoryBudget(settings.memory_budget_bytes)
    registry = Registry(path=Path("models.yaml"), version=1, models=(ModelEntry(id="a", source="./a", enabled=False),))
    for layer in reversed(layers(Deployment(registry, settings), Keyring(settings), memory)):
        guarded = layer.cls(guarded, *layer.args, **layer.kwargs)
    transport = httpx.ASGITransport(guarded)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        with pytest.raises(RuntimeError, match=SECRET):
            await client.get("/v1/models")

    assert len(entries(log_of_errors, "unexpected_error")) == 1
