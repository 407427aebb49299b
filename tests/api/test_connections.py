"""Requests in pieces, half-closed connections and other odd uses of a connection always get an answer."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.fleet import Model
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob

Serve = Callable[..., AbstractContextManager[tuple[str, int]]]
MakeModel = Callable[..., Model]

PATIENCE_S = 20
BODY = b'{"input": "hello", "model": "mini"}'
LIVE = b"GET /health/live HTTP/1.1\r\nhost: gateway\r\n\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n"


def post(*headers: bytes, host: bytes = b"host: gateway", body: bytes = BODY) -> bytes:
    lines = (b"POST /v1/embeddings HTTP/1.1", *([host] if host else []), *headers, b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class HeldBackend(FakeBackend):
    """Takes its time for the text ``slow``, until it is released or canceled."""

    def __init__(self) -> None:
        super().__init__(fake_info("mini"))
        self.has_begun, self.let_go, self.was_cancelled = threading.Event(), threading.Event(), threading.Event()

    async def embed(self, job: EmbedJob) -> Embeddings:
        if "slow" in job.texts:
            self.has_begun.set()
            try:
                while not self.let_go.is_set():  # noqa: ASYNC110  the test sets it in another thread
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.was_cancelled.set()
                raise
        return await super().embed(job)


SLOW = post(body=b'{"input": "slow", "model": "mini"}')


@pytest.fixture
def backend() -> HeldBackend:
    return HeldBackend()


@pytest.fixture
def connect(serve: Serve, make_model: MakeModel, backend: HeldBackend) -> Iterator[Callable[..., socket.socket]]:
    """Return a function that serves with some settings, and connects."""
    with contextlib.ExitStack() as stack:
        addresses: list[tuple[str, int]] = []
        stack.callback(backend.let_go.set)

        def connect(**settings: object) -> socket.socket:
            if not addresses:
                addresses.append(stack.enter_context(serve(make_model("mini", backend=backend), **settings)))
            connection = stack.enter_context(socket.create_connection(addresses[0]))
            connection.settimeout(PATIENCE_S)
            return connection

        yield connect


def answer_of(connection: socket.socket, method: str = "GET") -> tuple[int, bytes]:
    answer = http.client.HTTPResponse(connection, method=method)
    answer.begin()
    return answer.status, answer.read()


def is_silent(connection: socket.socket, seconds: float) -> bool:
    """Return whether nothing arrives for so long, not even the end of the connection."""
    connection.settimeout(seconds)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(PATIENCE_S)
    return False


def answers_of(connection: socket.socket, number: int) -> list[int]:
    """Read answers that may arrive in one packet; return their statuses."""
    with connection.makefile("rb") as file:
        statuses = []
        for _ in range(number):
            statuses.append(int(file.readline().split()[1]))
            headers = http.client.parse_headers(file)
            file.read(int(headers["content-length"] or 0))
        return statuses


def receive(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def code(body: bytes) -> str:
    value: str = json.loads(body)["error"]["code"]
    return value


def wait_until(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()


def sample(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0


# ------------------------------------------------------------------------------------------------- offers of protocols

OFFERS = [
    (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
    (b"connection: upgrade", b"uPgRaDe: h2c"),
    (b"UPGRADE: h2c", b"CONNECTION: keep-alive, UPGRADE"),
    (b"connection: Upgrade", b"upgrade: websocket", b"sec-websocket-version: 13", b"sec-websocket-key: abc"),
]


@pytest.mark.parametrize("offer", OFFERS, ids=lambda offer: offer[1].decode())
def test_an_offer_is_declined_wherever_the_bytes_are_cut(
    connect: Callable[..., socket.socket], offer: tuple[bytes, ...]
) -> None:
    request = post(*offer)
    connection = connect()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    begins = request.lower().index(b"upgrade:") if b"upgrade:" in request.lower() else 0
    cuts = {
        *range(begins - 3, begins + 12),
        request.index(b"\r\n\r\n") + 2,
        request.index(b"\r\n\r\n") + 4,
        len(request) - 3,
    }

    for cut in sorted(cuts):
        connection.sendall(request[:cut])
        time.sleep(0.01)
        connection.sendall(request[cut:])
        status, body = answer_of(connection, "POST")
        assert (status, len(json.loads(body)["data"])) == (200, 1)


def test_an_offer_with_a_body_in_chunks_is_declined(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: h2c\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    connection.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))

    assert answer_of(connection, "POST")[0] == 200


def test_offers_in_a_row_are_declined_one_after_the_other(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    connection.sendall((post(*OFFERS[0]) + LIVE) * 200)

    assert answers_of(connection, 400) == [200] * 400


def test_a_body_that_looks_like_an_offer_is_left_alone(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    body = b'{"model": "mini",\r\nupgrade: h2c\r\n "input": "a"}'
    connection.sendall(post(body=body))

    status, error = answer_of(connection, "POST")

    assert status == 400
    assert b"not valid JSON" in error


def test_http_2_without_an_offer_gets_an_error(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")

    status, body = answer_of(connection)

    assert (status, code(body)) == (400, "invalid_http")


# ---------------------------------------------------------------------------------------------------- half-closed clients


def test_a_client_that_has_only_finished_sending_gets_its_answer(
    connect: Callable[..., socket.socket], backend: HeldBackend
) -> None:
    connection = connect()
    connection.sendall(SLOW)
    assert backend.has_begun.wait(PATIENCE_S)
    connection.shutdown(socket.SHUT_WR)
    time.sleep(0.2)
    backend.let_go.set()

    assert answer_of(connection, "POST")[0] == 200
    assert connection.recv(1) == b""


def test_it_gets_it_however_long_that_takes(
    connect: Callable[..., socket.socket], backend: HeldBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.protocol._FIRST_PROBE_S", 0.1)
    monkeypatch.setattr("gateway.http.protocol._SECOND_PROBE_S", 0.1)
    connection = connect()
    connection.sendall(SLOW)
    connection.shutdown(socket.SHUT_WR)
    assert backend.has_begun.wait(PATIENCE_S)
    time.sleep(0.6)
    backend.let_go.set()

    received = receive(connection)

    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\n" * 2 + b"HTTP/1.1 200 OK\r\n")
    assert not backend.was_cancelled.is_set()


def test_a_client_of_http_1_0_gets_nothing_that_it_does_not_know(
    connect: Callable[..., socket.socket], backend: HeldBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.protocol._FIRST_PROBE_S", 0.05)
    connection = connect()
    connection.sendall(SLOW.replace(b"HTTP/1.1", b"HTTP/1.0"))
    connection.shutdown(socket.SHUT_WR)
    assert backend.has_begun.wait(PATIENCE_S)
    time.sleep(0.2)
    backend.let_go.set()

    assert receive(connection).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("is_reset", [False, True])
def test_the_work_for_a_client_that_has_left_is_canceled(
    connect: Callable[..., socket.socket], backend: HeldBackend, is_reset: bool
) -> None:
    connection = connect()
    connection.sendall(SLOW)
    assert backend.has_begun.wait(PATIENCE_S)
    if is_reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()

    assert backend.was_cancelled.wait(PATIENCE_S)


def test_so_are_earlier_requests_of_the_connection(connect: Callable[..., socket.socket], backend: HeldBackend) -> None:
    before = sample("gateway_requests_total", path="/v1/embeddings", status="499")
    connection = connect()
    connection.sendall(SLOW + LIVE)
    assert backend.has_begun.wait(PATIENCE_S)
    connection.close()

    assert backend.was_cancelled.wait(PATIENCE_S)
    assert wait_until(lambda: sample("gateway_requests_total", path="/v1/embeddings", status="499") == before + 1)


def test_half_a_request_behind_another_does_not_cost_that_its_answer(
    connect: Callable[..., socket.socket], backend: HeldBackend
) -> None:
    for half in (b"GET /health", post()[:-5]):
        backend.has_begun.clear()
        backend.let_go.clear()
        connection = connect()
        connection.sendall(SLOW + half)
        assert backend.has_begun.wait(PATIENCE_S)
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
        backend.let_go.set()

        assert answer_of(connection, "POST")[0] == 200
        assert connection.recv(1) == b""


def test_so_does_half_a_request_behind_more_requests_than_may_wait(
    connect: Callable[..., socket.socket], backend: HeldBackend
) -> None:
    """The end of the client's data is processed only after everything before it has been read."""
    connection = connect()
    connection.sendall(SLOW + LIVE * 200 + b"GET /health")
    assert backend.has_begun.wait(PATIENCE_S)
    connection.shutdown(socket.SHUT_WR)
    time.sleep(0.1)
    backend.let_go.set()

    received = receive(connection)

    assert (received.count(b"HTTP/1.1 200 OK"), received.count(b"HTTP/1.1 ")) == (201, 201)


# --------------------------------------------------------------------------------------------------- several at a time


def test_requests_that_are_sent_at_once_are_answered_in_order(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    connection.sendall(post() + MODELS + post(body=b"{") + LIVE)

    assert answers_of(connection, 4) == [200, 200, 400, 200]


def test_a_head_has_no_body_that_the_next_answer_begins_with(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    for _ in range(2):
        connection.sendall(MODELS.replace(b"GET", b"HEAD"))
        assert answer_of(connection, "HEAD") == (200, b"")
    connection.sendall(LIVE)
    assert answer_of(connection) == (200, b'{"status":"ok"}')


def test_invalid_bytes_get_an_error_after_earlier_requests_are_answered(
    connect: Callable[..., socket.socket], backend: HeldBackend
) -> None:
    connection = connect()
    connection.sendall(SLOW + LIVE + b"garbage\r\n\r\n")
    assert backend.has_begun.wait(PATIENCE_S)
    time.sleep(0.1)
    connection.sendall(b"and more of it")
    backend.let_go.set()

    assert answers_of(connection, 3) == [200, 200, 400]
    assert connection.recv(1) == b""


def test_a_slow_head_behind_a_request_does_not_cost_that_its_answer(
    connect: Callable[..., socket.socket], backend: HeldBackend
) -> None:
    connection = connect(header_timeout_s=0.2)
    connection.sendall(SLOW + b"GET /health")
    assert backend.has_begun.wait(PATIENCE_S)
    time.sleep(0.5)
    backend.let_go.set()

    assert answer_of(connection, "POST")[0] == 200
    assert connection.recv(1) == b""


def test_a_head_that_is_not_read_on_is_not_slow(connect: Callable[..., socket.socket], backend: HeldBackend) -> None:
    connection = connect(header_timeout_s=0.2)
    connection.sendall(SLOW)
    assert backend.has_begun.wait(PATIENCE_S)
    connection.sendall(LIVE + LIVE[:20])  # nothing more is read before the first is answered
    time.sleep(0.1)
    connection.sendall(LIVE[20:])
    time.sleep(0.5)
    backend.let_go.set()

    assert answers_of(connection, 3) == [200, 200, 200]


def test_a_client_that_never_reads_fills_neither_the_log_nor_its_connection(
    serve: Serve, make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    unexpected = sample("gateway_errors_total", code="internal_error")
    cut = sample("gateway_slow_connections_total", side="send")
    with serve(make_model("mini", width=512), send_timeout_s=0.3) as address, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(address)
        deaf.settimeout(0.5)
        body = json.dumps({"input": ["a"] * 500, "model": "mini"}).encode()
        with contextlib.suppress(OSError):
            for _ in range(200):
                deaf.sendall(post(body=body))
        assert wait_until(lambda: sample("gateway_slow_connections_total", side="send") == cut + 1)
        assert wait_until(lambda: sample("gateway_connections") == 0)

    assert sample("gateway_errors_total", code="internal_error") == unexpected
    assert "Exception in ASGI application" not in caplog.text


def test_after_an_invalid_request_the_client_may_still_finish(
    connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it were closed immediately, the client's next bytes would reset the connection, and the answer would be lost."""
    monkeypatch.setattr("gateway.http.protocol._LINGER_S", 2 * PATIENCE_S)
    connection = connect(shutdown_grace_s=4 * PATIENCE_S)
    connection.sendall(b"garbage\r\n\r\n")

    assert receive(connection).startswith(b"HTTP/1.1 400 ")  # and its end, while the connection lingers
    connection.sendall(b"and more of it")
    assert connection.recv(1) == b""
    connection.sendall(b"and more of it")


# ------------------------------------------------------------------------------------------------------ rules of HTTP


def test_connect_gets_an_answer(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n\x16\x03\x01")

    head, _, body = receive(connection).partition(b"\r\n\r\n")

    assert head.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 405 "))
    assert b"connection: close" in head
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status", "error_code"),
    [
        ([b"transfer-encoding: gzip, chunked"], 501, "unsupported_transfer_encoding"),
        ([b"transfer-encoding: gzip", b"transfer-encoding: chunked"], 501, "unsupported_transfer_encoding"),
        ([b"transfer-encoding: chunked, chunked"], 400, "invalid_http"),
        ([b"transfer-encoding: gzip"], 400, "invalid_http"),
        ([b"transfer-encoding: chunked", b"content-length: 5"], 400, "invalid_http"),
    ],
)
def test_transfer_codings_that_are_not_understood_are_not_taken_for_others(
    connect: Callable[..., socket.socket], headers: list[bytes], status: int, error_code: str
) -> None:
    connection = connect()
    head = b"\r\n".join((b"POST /v1/embeddings HTTP/1.1", b"host: x", *headers))
    connection.sendall(head + b"\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))

    answer = http.client.HTTPResponse(connection)
    answer.begin()

    assert (answer.status, code(answer.read())) == (status, error_code)
    if status == 501:
        assert answer.headers["x-should-retry"] == "false"


def test_chunked_is_understood_in_any_case(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nTransfer-Encoding: Chunked\r\n\r\n"
    connection.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))

    assert answer_of(connection)[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"", 400),
        (b"host: a\r\nhost: b", 400),
        (b"host: a\r\nhost: a", 400),
        (b"host: a b", 400),
        (b"host: http://a/", 400),
        (b"host:", 200),
        (b"host: [::1]:8000", 200),
        (b"Host: gateway.example:8000", 200),
    ],
)
def test_a_request_names_one_host(connect: Callable[..., socket.socket], host: bytes, status: int) -> None:
    before = sample("gateway_errors_total", code="invalid_http")
    connection = connect()
    for _ in range(2):  # the connection still works
        connection.sendall(post(host=host))
        answer = answer_of(connection, "POST")
        assert answer[0] == status
        assert status == 200 or code(answer[1]) == "invalid_http"

    expected = before + (2 if status == 400 else 0)  # the second is counted once its answer is out
    assert wait_until(lambda: sample("gateway_errors_total", code="invalid_http") == expected)


def test_http_1_0_needs_no_host(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    connection.sendall(post(host=b"").replace(b"HTTP/1.1", b"HTTP/1.0"))

    assert receive(connection).startswith(b"HTTP/1.1 200 ")


def test_http_1_0_has_no_interim_response(connect: Callable[..., socket.socket]) -> None:
    """RFC 9110, 10.1.1: such a client would take it for the answer, so its `Expect` is ignored."""
    connection = connect()
    connection.sendall(post(host=b"Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0"))

    assert receive(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://gateway/v1/models", 200),
        (b"HTTPS://gateway:8000//v1//models/?a=b", 200),
        (b"http://gateway", 404),
        (b"http://gateway?a=b", 404),
        (b"/v1/models/%00", 404),
        (b"/%ff%fe", 404),
        (b"/" + b"a" * 60_000, 404),
        (b"/v1/mod\xe9", 400),
        (b"*", 405),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_every_form_of_a_target_is_answered(connect: Callable[..., socket.socket], target: bytes, status: int) -> None:
    connection = connect()
    connection.sendall(b"GET " + target + b" HTTP/1.1\r\nhost: gateway\r\n\r\n")

    assert answer_of(connection)[0] == status


def test_options_for_the_whole_server_lists_its_methods(connect: Callable[..., socket.socket]) -> None:
    connection = connect(api_keys=["sk-right-key"])
    connection.sendall(b"OPTIONS * HTTP/1.1\r\nhost: gateway\r\nx-api-key: sk-right-key\r\n\r\n")
    answer = http.client.HTTPResponse(connection)
    answer.begin()

    assert (answer.status, answer.headers["allow"]) == (204, "GET, HEAD, POST, OPTIONS")


@pytest.mark.parametrize("given", [b"a\tb", b"a b", b"x" * 129, b"\xe9", b"", b"a,b"])
def test_a_request_id_that_is_not_fit_for_a_header_is_replaced(
    connect: Callable[..., socket.socket], given: bytes
) -> None:
    connection = connect()
    connection.sendall(LIVE[:-2] + b"x-request-id: " + given + b"\r\n\r\n")
    answer = http.client.HTTPResponse(connection)
    answer.begin()

    assert answer.status == 200
    assert answer.headers["x-request-id"].startswith("req-")
    assert answer.headers.get_all("x-request-id") == [answer.headers["x-request-id"]]


def test_a_line_break_in_a_header_makes_no_second_one(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    connection.sendall(LIVE[:-2] + b"x-request-id: a\r\n set-cookie: b=c\r\n\r\n")

    received = receive(connection)

    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nset-cookie" not in received


def test_a_head_that_is_too_large_gets_an_error_before_its_end(connect: Callable[..., socket.socket]) -> None:
    connection = connect(max_header_bytes=4096)
    connection.sendall(b"GET /" + b"a" * 150_000)

    status, body = answer_of(connection)

    assert (status, code(body)) == (431, "headers_too_large")
    assert "4096 bytes" in json.loads(body)["message"]


@pytest.mark.parametrize(("number", "status"), [(499, 200), (500, 431)])
def test_a_request_has_a_number_of_headers(connect: Callable[..., socket.socket], number: int, status: int) -> None:
    connection = connect()
    connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: gateway\r\n" + b"a:\r\n" * number + b"\r\n")

    assert answer_of(connection)[0] == status


def test_too_many_headers_are_refused_before_the_body_comes(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    connection.sendall(post(*[b"a:"] * 499)[:-5])

    assert answer_of(connection, "POST")[0] == 431


def test_headers_without_end_are_not_collected(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: gateway\r\n" + b"a:\r\n" * 1500)

    status, body = answer_of(connection)
    assert (status, code(body)) == (431, "headers_too_large")
    assert "more than 500 headers" in json.loads(body)["message"]


@pytest.mark.parametrize("size", [99_999_999, 10**30])
def test_a_client_that_asks_before_a_large_body_is_refused_and_may_continue(
    connect: Callable[..., socket.socket], size: int
) -> None:
    connection = connect()
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    connection.sendall(head % size)

    assert answer_of(connection, "POST")[0] in (413, 400)


def test_the_rest_of_a_refused_body_does_not_cause_a_second_error(connect: Callable[..., socket.socket]) -> None:
    connection = connect(max_header_bytes=4096)
    before = sample("gateway_errors_total", code="headers_too_large")
    connection.sendall(
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"
    )
    assert answer_of(connection, "POST")[0] == 413

    connection.sendall(b"x" * 10_000)
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""
    assert sample("gateway_errors_total", code="headers_too_large") == before


@pytest.mark.parametrize("path", [b"/nothing", b"/v1/embeddings"])
def test_an_error_leaves_the_connection_good(connect: Callable[..., socket.socket], path: bytes) -> None:
    connection = connect()
    for _ in range(3):
        connection.sendall(post(body=b"{").replace(b"/v1/embeddings", path))
        assert answer_of(connection, "POST")[0] in (400, 404)
    connection.sendall(post())
    assert answer_of(connection, "POST")[0] == 200


# --------------------------------------------------------------------------------------------------------- kept connections


def test_an_idle_connection_is_kept_as_long_as_the_setting_says(connect: Callable[..., socket.socket]) -> None:
    connection = connect(keep_alive_s=0.5, header_timeout_s=0.1, send_timeout_s=0.1)
    connection.sendall(LIVE)
    assert answer_of(connection)[0] == 200
    started = time.monotonic()

    assert connection.recv(1) == b""
    assert time.monotonic() - started > 0.4


def test_while_a_request_is_answered_it_is_not_idle(
    connect: Callable[..., socket.socket], backend: HeldBackend
) -> None:
    connection = connect(keep_alive_s=0.3, header_timeout_s=0.3)
    connection.sendall(LIVE)
    assert answer_of(connection)[0] == 200
    connection.sendall(SLOW)
    assert backend.has_begun.wait(PATIENCE_S)

    assert is_silent(connection, 0.6)
    backend.let_go.set()
    assert answer_of(connection, "POST")[0] == 200
    connection.sendall(LIVE)
    assert answer_of(connection)[0] == 200


def test_by_default_it_is_kept_longer_than_by_load_balancers(connect: Callable[..., socket.socket]) -> None:
    connection = connect()
    connection.sendall(LIVE)
    assert answer_of(connection)[0] == 200
    time.sleep(6)  # uvicorn's own default is 5

    connection.sendall(LIVE)
    assert answer_of(connection)[0] == 200


def test_open_connections_are_counted(connect: Callable[..., socket.socket]) -> None:
    before = sample("gateway_connections")
    connections = [connect() for _ in range(3)]
    assert wait_until(lambda: sample("gateway_connections") == before + 3)

    for connection in connections:
        connection.close()
    assert wait_until(lambda: sample("gateway_connections") == before)
