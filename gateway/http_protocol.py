"""uvicorn's HTTP protocol, with bounds on what a connection may do outside the request that the application sees."""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

import orjson
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.config.settings import Settings
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection on which what was begun does not come to an end.

    uvicorn itself waits for ever: for headers, for trailers, for the rest of a body that was answered early, for a client
    that does not read; and it keeps all headers and trailers. A few hundred connections that send a byte a minute ("slow
    loris"), or one that sends trailer after trailer, would cost file handles and memory. A request that comes in one piece,
    and whose answer is read, costs no timer here.

    What may come is in turns a head and the rest of a message. Time and bytes are bounded while a head is coming, and while
    the rest of a message is coming that is answered already. Between, the application reads, with bounds of its own.

    Attributes:
        header_timeout_s: seconds from a head's first byte, or the start of the connection, to its end; and from an early
            answer to the end of its request.
        max_header_bytes: how many bytes may come in that time, or between two pieces of a body, and of trailers; the exact
            limit of headers, with its own answer, is the middleware's.
        send_timeout_s: seconds in which a client must take something of an answer that waits for it.
    """

    header_timeout_s: float
    max_header_bytes: int
    send_timeout_s: float
    _is_in_head = False
    _is_in_message = False
    _has_body_come = False
    _has_message_ended = False
    _num_bytes = 0
    _num_unsent = 0
    _has_taken = False
    _timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Expect a request's head."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._stop_timer()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come, and see what is not complete after it."""
        self._has_body_come = self._has_message_ended = False
        super().data_received(data if self._is_in_message else _without_upgrade(data))
        if self.transport.is_closing():
            return
        if self._has_message_ended:
            # What has come of the next head beside a message's end is not counted: it is less than one packet.
            self._num_bytes = 0
            self._stop_timer()
            if (
                self._is_in_head or self.cycle.response_complete
            ):  # data stops the timer that uvicorn starts with the answer's end
                self._start_timer()
        elif self._is_in_message and not self.cycle.response_complete:
            self._stop_timer()
            self._count_bytes(0 if self._has_body_come else len(data))
        else:
            self._count_bytes(len(data))
            if self._timer is None and not self.transport.is_closing():
                self._start_timer()

    def on_message_begin(self) -> None:
        """Expect the rest of a head."""
        super().on_message_begin()
        self._is_in_head = True
        self._num_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, and no trailer: a proxy in front has not seen those as headers."""
        if not self._is_in_message:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Let the application have the request."""
        self._is_in_head, self._is_in_message = False, True
        self._num_bytes = 0
        super().on_headers_complete()
        if self.parser.should_upgrade():  # nothing can come behind it
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Let the application have a piece of the body, which it counts."""
        self._has_body_come = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect the next head."""
        self._is_in_message = False
        self._has_message_ended = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Expect the rest of a message that nobody reads any more to come soon, and the answer to be taken."""
        is_current = not self.pipeline
        super().on_response_complete()
        if is_current and self._is_in_message and not self.transport.is_closing():
            self._num_bytes = 0
            self._start_timer()
        self._has_taken = self._has_taken or not self._unsent()
        self._watch_sending()

    def pause_writing(self) -> None:
        """Expect the client to take something of the answer, which is written no further until then."""
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        """Note that the client has taken what was waiting, however much of the answer waits after it."""
        super().resume_writing()
        self._has_taken = True

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with what is not even a request, in the body that all errors have, and hang up."""
        error: dict[str, Any] = {"message": msg, "type": "invalid_request_error", "param": None, "code": "invalid_http"}
        body = orjson.dumps({"error": error, "detail": msg, "message": msg})
        if not (self._is_in_message and self.cycle.response_started):
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
        self.transport.close()

    def _count_bytes(self, num_bytes: int) -> None:
        """Count what has come that the application does not see: headers, trailers, what is between, what is too late."""
        self._num_bytes += num_bytes
        if self._num_bytes > self.max_header_bytes:
            self.send_400_response(f"The request's headers or trailers have more than {self.max_header_bytes} bytes.")

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.header_timeout_s, self._close_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            metrics.SLOW_CONNECTIONS.labels("receive").inc()
            log.info("connection_too_slow", caller=self._caller, what="receive")
            self.transport.close()

    def _watch_sending(self) -> None:
        """Look after a while whether the client takes what waits for it."""
        if self._send_timer is None and self._unsent() > 0:
            self._num_unsent, self._has_taken = self._unsent(), False
            self._send_timer = self.loop.call_later(self.send_timeout_s, self._check_sent)

    def _check_sent(self) -> None:
        """Cut the connection of a client that has taken nothing of its answer since the last look."""
        self._send_timer = None
        if self._unsent() >= self._num_unsent and not self._has_taken:
            metrics.SLOW_CONNECTIONS.labels("send").inc()
            log.info("connection_too_slow", caller=self._caller, what="send")
            self.transport.abort()
        else:
            self._watch_sending()

    def _unsent(self) -> int:
        return self.transport.get_write_buffer_size()

    @property
    def _caller(self) -> str:
        return self.client[0] if self.client else "unknown"


def _without_upgrade(data: bytes) -> bytes:
    """Take the offer of another protocol out of a head.

    Java's HTTP client offers HTTP/2 with every request. A server may decline by answering as if there were no offer, but the
    parser takes what follows for the other protocol, and the request would lose its body.
    """
    if b"pgrade:" not in data and b"PGRADE:" not in data:
        return data
    head, end, rest = data.partition(_HEAD_END)
    return _UPGRADE.sub(b"\r\nx-declined-upgrade:", head) + end + rest


def bounded(settings: Settings) -> type[BoundedProtocol]:
    """Return the protocol with the bounds of the settings, as uvicorn makes protocols from a class."""
    bounds = {
        "header_timeout_s": settings.header_timeout_s,
        "max_header_bytes": settings.max_header_bytes,
        "send_timeout_s": settings.send_timeout_s,
    }
    return type("BoundedProtocol", (BoundedProtocol,), bounds)
