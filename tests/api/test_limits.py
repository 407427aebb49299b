"""The limits of a connection: slow, endless and broken requests, over a real socket."""

from __future__ import annotations

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
from gateway.http.protocol import BoundedProtocol

Serve = Callable[..., AbstractContextManager[tuple[str, int]]]
GET = b"GET /health/live HTTP/1.1\r\nhost: gateway\r\n"
BODY = b'{"input": "hello", "model": "mini"}'
POST_HEAD = b"POST /v1/embeddings HTTP/1.1\r\nhost: gateway\r\ncontent-length: %d\r\n\r\n"
POST = POST_HEAD % len(BODY)


def receive(connection: socket.socket) -> bytes:
    """Read until the server hangs up."""
    connection.settimeout(10)
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


@pytest.fixture
def connections(serve: Serve) -> Iterator[Callable[..., socket.socket]]:
    """Return a function that serves with some limits, and connects."""
    with contextlib.ExitStack() as stack:
        addresses: list[tuple[str, int]] = []

        def connect(**limits: object) -> socket.socket:
            if not addresses:
                addresses.append(stack.enter_context(serve(**limits)))
            return stack.enter_context(socket.create_connection(addresses[0]))

        yield connect


def send_slowly(connection: socket.socket, content: bytes) -> None:
    for byte in content:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def is_served(connection: socket.socket) -> bool:
    connection.sendall(GET + b"connection: close\r\n\r\n")
    return receive(connection).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("sent", [b"", GET, b"GET /", GET + b"x-more: "])
def test_headers_that_do_not_come_in_time_end_the_connection(
    connections: Callable[..., socket.socket], sent: bytes
) -> None:
    slow = connections(header_timeout_s=0.3)
    started = time.monotonic()
    slow.sendall(sent)

    assert receive(slow) == b""
    assert 0.2 < time.monotonic() - started < 5
    assert is_served(connections())


def test_headers_that_come_a_byte_at_a_time_end_it_as_well(connections: Callable[..., socket.socket]) -> None:
    slow = connections(header_timeout_s=0.4)

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        send_slowly(slow, b"GET /" + b"a" * 100)
    assert is_served(connections())


def test_a_second_request_has_the_same_time_as_the_first(connections: Callable[..., socket.socket]) -> None:
    slow = connections(header_timeout_s=0.3)
    slow.sendall(GET + b"\r\n")
    answer = http.client.HTTPResponse(slow)
    answer.begin()
    assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
    time.sleep(0.5)  # a connection may be idle between two requests
    slow.sendall(GET)

    assert receive(slow) == b""


def test_an_answer_may_take_longer_than_headers(serve: Serve, make_model: Callable[..., object]) -> None:
    model = make_model("mini", backend=FakeBackend(fake_info("mini"), delay_s=0.8))
    with serve(model, header_timeout_s=0.2) as address, socket.create_connection(address) as connection:
        connection.sendall(POST + BODY)
        connection.settimeout(10)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_headers_without_an_end_end_the_connection(connections: Callable[..., socket.socket]) -> None:
    endless = connections(max_header_bytes=4096)
    with contextlib.suppress(
        ConnectionResetError, BrokenPipeError
    ):  # the server has closed the connection without reading everything
        endless.sendall(GET + b"x-more: ")
        for _ in range(2000):
            endless.sendall(b"x" * 1024)
        assert receive(endless).startswith(b"HTTP/1.1 431 ")

    assert is_served(connections())


def test_large_headers_get_the_limit(connections: Callable[..., socket.socket]) -> None:
    connection = connections(max_header_bytes=4096)
    connection.sendall(GET + b"x-more: %s\r\nconnection: close\r\n\r\n" % (b"x" * 5000))

    head, _, body = receive(connection).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 431 ")
    error = json.loads(body)["error"]
    assert error["code"] == "headers_too_large"
    assert "the limit is 4096" in error["message"]


@pytest.mark.parametrize("sent", [b"", BODY[:5]])
def test_a_body_that_does_not_arrive_in_time_gets_an_error(
    connections: Callable[..., socket.socket], sent: bytes
) -> None:
    slow = connections(body_timeout_s=0.3)
    started = time.monotonic()
    slow.sendall(POST + sent)

    head, _, body = receive(slow).partition(b"\r\n\r\n")

    assert 0.2 < time.monotonic() - started < 5
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert error["code"] == "body_timeout"
    assert error["message"].startswith(f"only {len(sent)} bytes of the request body arrived in 0.3 s")


def test_a_body_that_arrives_a_byte_at_a_time_gets_the_usual_time(
    connections: Callable[..., socket.socket],
) -> None:
    slow = connections(body_timeout_s=0.5)
    slow.sendall(POST)

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        send_slowly(slow, b" " * 200)  # ten seconds' worth
    assert is_served(connections())


def test_a_body_that_arrives_a_byte_at_a_time_gets_no_extra_time(connections: Callable[..., socket.socket]) -> None:
    """Its time counts from the first byte, and does not restart with each."""
    slow = connections(body_timeout_s=0.5)
    slow.sendall(POST.replace(b"%d" % len(BODY), b"100000"))
    slow.settimeout(0.1)
    received, num_sent = b"", 0
    while not received and num_sent < 100:  # 10 s
        slow.sendall(b" ")
        num_sent += 1
        with contextlib.suppress(TimeoutError):
            received = slow.recv(65536)

    assert received.startswith(b"HTTP/1.1 400 "), num_sent
    assert b"body_timeout" in received + receive(slow)


def test_two_hundred_slow_clients_do_not_hold_up_another(connections: Callable[..., socket.socket]) -> None:
    slow = [connections(header_timeout_s=60, body_timeout_s=60) for _ in range(200)]
    for index, connection in enumerate(slow):
        connection.sendall(POST + BODY[:5] if index % 2 else GET)

    started = time.monotonic()
    assert is_served(connections())
    assert time.monotonic() - started < 30  # it has not waited for them


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"],
)
def test_bytes_that_are_not_http_get_the_common_error_body(
    connections: Callable[..., socket.socket], sent: bytes
) -> None:
    connection = connections()
    connection.sendall(sent)

    head, _, body = receive(connection).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"


CHUNKED = b"POST /v1/embeddings HTTP/1.1\r\nhost: gateway\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)


def answer_of(connection: socket.socket) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(connection)
    connection.settimeout(10)
    answer.begin()
    answer.body = answer.read()
    return answer


def flood(connection: socket.socket, content: bytes) -> int:
    """Send something again and again until the server hangs up; return how many bytes it was sent."""
    sent = 0
    connection.settimeout(10)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while sent < 50_000_000:
            connection.sendall(content)
            sent += len(content)
    return sent


@pytest.mark.parametrize("begun", [CHUNKED + CHUNK + b"0\r\n", GET + b"transfer-encoding: chunked\r\n\r\n0\r\n"])
@pytest.mark.parametrize("trailers", [b"a: \r\n" * 100, b"x" * 1000])
def test_trailers_without_an_end_end_the_connection(
    connections: Callable[..., socket.socket], begun: bytes, trailers: bytes
) -> None:
    endless = connections(max_header_bytes=4096)
    endless.sendall(begun + b"b: ")

    assert flood(endless, trailers) < 20_000_000  # the size of the sockets' own buffers
    assert is_served(connections())


def test_a_chunk_extension_without_an_end_ends_the_connection(connections: Callable[..., socket.socket]) -> None:
    endless = connections(max_header_bytes=4096)
    endless.sendall(CHUNKED + b"5;a=")

    assert flood(endless, b"x" * 1000) < 20_000_000
    assert is_served(connections())


def test_a_trailer_is_no_header(connections: Callable[..., socket.socket]) -> None:
    connection = connections(api_keys=["right"])
    connection.sendall(CHUNKED + CHUNK + b"0\r\nauthorization: Bearer right\r\n\r\n")
    assert answer_of(connection).status == 401

    connection.sendall(CHUNKED.replace(b"host", b"authorization: Bearer right\r\nhost") + CHUNK + b"0\r\n\r\n")
    assert answer_of(connection).status == 200


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_an_upgrade_is_not_made_and_holds_nothing_up(
    connections: Callable[..., socket.socket], protocol: bytes
) -> None:
    connection = connections()
    offer = b"connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nhttp2-settings: AAMAAABk\r\nhost" % protocol
    for _ in range(2):
        connection.sendall(POST.replace(b"host", offer) + BODY)
        answer = answer_of(connection)

        assert answer.status == 200
        assert len(json.loads(answer.body)["data"]) == 1


EARLY = GET + b"content-length: 100000\r\n\r\n"  # is answered before its body has arrived


@pytest.mark.parametrize(
    ("first", "then"),
    [(GET + b"\r\n", b"\r\n"), (EARLY, b"x"), (EARLY, b""), (EARLY, b"x" * 99_999)],
    ids=["empty line", "a byte of a body", "no body", "not all of a body"],
)
def test_a_request_that_begins_after_an_answer_must_end_in_time(
    connections: Callable[..., socket.socket], first: bytes, then: bytes
) -> None:
    slow = connections(header_timeout_s=0.4, max_header_bytes=200_000)
    slow.sendall(first)
    assert answer_of(slow).status == 200
    started = time.monotonic()
    slow.sendall(then)

    assert receive(slow) == b""
    assert time.monotonic() - started < 4  # uvicorn's own pause between two requests is 5 s


def test_a_refused_body_must_end_in_time(connections: Callable[..., socket.socket]) -> None:
    slow = connections(api_keys=["right"], body_timeout_s=0.4, header_timeout_s=0.4)
    slow.sendall(POST.replace(b"%d" % len(BODY), b"100000"))
    started = time.monotonic()
    assert answer_of(slow).status == 401

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        send_slowly(slow, b"x" * 100)
    assert time.monotonic() - started < 4


def test_a_body_without_an_end_ends_the_connection_of_an_early_answer(
    connections: Callable[..., socket.socket],
) -> None:
    endless = connections(max_header_bytes=4096)
    endless.sendall(GET + b"transfer-encoding: chunked\r\n\r\n")
    assert answer_of(endless).status == 200

    assert flood(endless, b"3e8\r\n%s\r\n" % (b"x" * 1000)) < 20_000_000


def test_the_next_request_may_arrive_with_the_end_of_this_one(connections: Callable[..., socket.socket]) -> None:
    connection = connections(max_header_bytes=1024)
    body = BODY + b" " * 5000
    post = POST.replace(b"%d" % len(BODY), b"%d" % len(body))
    connection.sendall(post + body[:10])
    time.sleep(0.1)
    connection.sendall(body[10:] + GET[:10])
    assert answer_of(connection).status == 200
    connection.sendall(GET[10:] + b"\r\n")

    assert answer_of(connection).body == b'{"status":"ok"}'


def test_an_answer_that_is_not_read_is_not_kept(serve: Serve, make_model: Callable[..., object]) -> None:
    texts = json.dumps({"input": ["a"] * 2048, "model": "mini"}).encode()
    post = POST.replace(b"%d" % len(BODY), b"%d" % len(texts))
    with serve(make_model("mini", width=1024), send_timeout_s=0.5) as address, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(address)
        deaf.sendall(post + texts)
        time.sleep(4)

        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            answer_of(deaf)


def test_an_answer_that_is_read_slowly_is_sent_to_its_end(
    serve: Serve, make_model: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is larger than the sockets' buffers, so the gateway has to wait for its client, and checks repeatedly."""
    looks: list[int] = []
    check_sent = BoundedProtocol._check_sent

    def look(protocol: BoundedProtocol) -> None:
        looks.append(protocol._unsent())
        check_sent(protocol)

    monkeypatch.setattr(BoundedProtocol, "_check_sent", look)
    texts = json.dumps({"input": ["a"] * 2048, "model": "mini"}).encode()
    post = POST.replace(b"%d" % len(BODY), b"%d" % len(texts))
    with serve(make_model("mini", width=2048), send_timeout_s=1) as address, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.connect(address)
        slow.sendall(post + texts)
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        received = []
        while chunk := answer.read(400_000):
            received.append(chunk)
            if not any(looks):
                time.sleep(0.1)

    assert len(json.loads(b"".join(received))["data"]) == 2048
    assert any(looks)


NOTHING = b'{"model": "nothing-%04d", "input": "a"}' + b" " * 1000


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"GET /nothing-%04d HTTP/1.1\r\nhost: gateway\r\n\r\n", id="small"),
        pytest.param(POST_HEAD % len(NOTHING % 0) + NOTHING, id="with a body, which the application reads"),
    ],
)
def test_requests_that_are_sent_without_a_pause_are_taken_a_few_at_a_time(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, request_: bytes
) -> None:
    """All are answered, in order; but the gateway holds at most one packet of them, for any number of them."""
    most = {"pipeline": 0, "held": 0}
    take_held = BoundedProtocol._take_held

    def watch(protocol: BoundedProtocol) -> None:
        take_held(protocol)
        most["pipeline"] = max(most["pipeline"], len(protocol.pipeline))
        most["held"] = max(most["held"], len(protocol._held))

    monkeypatch.setattr(BoundedProtocol, "_take_held", watch)
    num = 2_000
    requests = b"".join(request_ % i for i in range(num))
    with serve(log_level="error") as address, socket.create_connection(address) as eager:
        sending = threading.Thread(target=eager.sendall, args=(requests,))
        sending.start()
        answers = eager.makefile("rb")
        for i in range(num):
            head = list(iter(answers.readline, b"\r\n"))
            [length] = [int(line.partition(b":")[2]) for line in head if line.lower().startswith(b"content-length")]
            assert b"nothing-%04d" % i in answers.read(length)
        sending.join()

    assert 0 < most["pipeline"] < 1000
    assert 0 < most["held"] < 1_000_000
