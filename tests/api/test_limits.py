"""What a connection may cost: slow, endless and broken requests, over a real socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from gateway.backends.fake import FakeBackend, fake_info

Serve = Callable[..., AbstractContextManager[tuple[str, int]]]
GET = b"GET /health/live HTTP/1.1\r\nhost: gateway\r\n"
BODY = b'{"input": "hello", "model": "mini"}'
POST = b"POST /v1/embeddings HTTP/1.1\r\nhost: gateway\r\ncontent-length: %d\r\n\r\n" % len(BODY)


def receive(connection: socket.socket) -> bytes:
    """Read until the server hangs up."""
    connection.settimeout(10)
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


@pytest.fixture
def connections(serve: Serve) -> Iterator[Callable[..., socket.socket]]:
    """Return what serves with some limits, and connects."""
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
        send_slowly(slow, b"G" * 100)
    assert is_served(connections())


def test_a_second_request_has_the_same_time_as_the_first(connections: Callable[..., socket.socket]) -> None:
    slow = connections(header_timeout_s=0.3)
    slow.sendall(GET + b"\r\n")
    answer = http.client.HTTPResponse(slow)
    answer.begin()
    assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
    time.sleep(0.5)  # between two requests a connection may rest
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
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # the server has hung up on what it did not read
        endless.sendall(GET + b"x-more: ")
        for _ in range(2000):
            endless.sendall(b"x" * 1024)
        assert receive(endless).startswith(b"HTTP/1.1 400 ")

    assert is_served(connections())


def test_large_headers_are_told_the_limit(connections: Callable[..., socket.socket]) -> None:
    connection = connections(max_header_bytes=4096)
    connection.sendall(GET + b"x-more: %s\r\nconnection: close\r\n\r\n" % (b"x" * 5000))

    head, _, body = receive(connection).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 431 ")
    error = json.loads(body)["error"]
    assert error["code"] == "headers_too_large"
    assert "the limit is 4096" in error["message"]


@pytest.mark.parametrize("sent", [b"", BODY[:5]])
def test_a_body_that_does_not_come_in_time_is_told_so(connections: Callable[..., socket.socket], sent: bytes) -> None:
    slow = connections(body_timeout_s=0.3)
    started = time.monotonic()
    slow.sendall(POST + sent)

    head, _, body = receive(slow).partition(b"\r\n\r\n")

    assert 0.2 < time.monotonic() - started < 5
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert error["code"] == "body_timeout"
    assert error["message"].startswith(f"{len(sent)} bytes of the request body have come in 0.3 s")


def test_two_hundred_slow_clients_do_not_hold_up_another(connections: Callable[..., socket.socket]) -> None:
    slow = [connections(header_timeout_s=5, body_timeout_s=5) for _ in range(200)]
    for index, connection in enumerate(slow):
        connection.sendall(POST + BODY[:5] if index % 2 else GET)

    started = time.monotonic()
    assert is_served(connections())
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"],
)
def test_what_is_no_http_gets_the_body_of_all_errors(connections: Callable[..., socket.socket], sent: bytes) -> None:
    connection = connections()
    connection.sendall(sent)

    head, _, body = receive(connection).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"
