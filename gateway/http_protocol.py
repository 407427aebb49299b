"""uvicorn's HTTP protocol, with bounds on what a connection may do before there is a request."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import orjson
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.telemetry import metrics

log = structlog.get_logger(__name__)


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose headers do not come in time, or do not end.

    uvicorn itself waits for headers for ever and keeps them all: a few hundred connections that send a byte a minute
    ("slow loris"), or one that sends header after header, would cost file handles and memory. A request that comes in
    one piece costs no timer here.

    Attributes:
        header_timeout_s: seconds from the first byte of a request, or the start of the connection, to the headers' end.
        max_header_bytes: how many bytes may come before the headers have ended; the exact limit, with its own answer, is
            the middleware's.
    """

    header_timeout_s: float
    max_header_bytes: int
    _num_header_bytes = 0
    _has_headers = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Expect a request's headers."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come, and see whether headers are still incomplete after it."""
        super().data_received(data)
        if self._has_headers:
            self._stop_timer()
            return
        self._num_header_bytes += len(data)
        if self._num_header_bytes > self.max_header_bytes and not self.transport.is_closing():
            self.send_400_response(f"The request's headers have more than {self.max_header_bytes} bytes.")
        elif self._timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        """Expect the headers of the next request."""
        super().on_message_begin()
        self._has_headers = False
        self._num_header_bytes = 0

    def on_headers_complete(self) -> None:
        """Let the application have the request."""
        self._has_headers = True
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with what is not even a request, in the body that all errors have, and hang up."""
        error: dict[str, Any] = {"message": msg, "type": "invalid_request_error", "param": None, "code": "invalid_http"}
        body = orjson.dumps({"error": error, "detail": msg, "message": msg})
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        self.transport.close()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.header_timeout_s, self._close_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            metrics.SLOW_HEADERS.inc()
            log.info("headers_too_slow", caller=self.client[0] if self.client else "unknown")
            self.transport.close()


def bounded(header_timeout_s: float, max_header_bytes: int) -> type[BoundedProtocol]:
    """Return the protocol with these bounds, as uvicorn makes protocols from a class."""
    bounds = {"header_timeout_s": header_timeout_s, "max_header_bytes": max_header_bytes}
    return type("BoundedProtocol", (BoundedProtocol,), bounds)
