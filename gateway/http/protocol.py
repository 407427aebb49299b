"""uvicorn's HTTP protocol, with bounds on the traffic of a connection that the application does not see."""

from __future__ import annotations

import asyncio
from typing import Final, cast

import httptools
import structlog
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.config.settings import Settings
from gateway.errors import HeadersTooLarge, InvalidHttp, RequestError
from gateway.http.error_forms import bad_request
from gateway.http.head import address_of, path_of, why_refused, without_offer
from gateway.http.pace import HeldFlow
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

REFUSED: Final = "gateway.refused"
"""The key in the scope of a request to refuse; its value is the error to answer with."""

MAX_HEADERS: Final = 500
"""The maximum number of headers in a request. An empty header takes 4 bytes on the wire, and 150 bytes here."""

# Seconds that an idle connection stays open when the process stops; a request that arrives in that time is answered.
_LINGER_S = 1.0
# The maximum number of bytes that are read and discarded after an error.
_MAX_IGNORED_BYTES = 256 * 1024
# Seconds until a client that has sent its last byte is probed, and seconds it has to reset the connection.
_FIRST_PROBE_S, _SECOND_PROBE_S = 1.5, 0.75
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
# How many requests of a connection may wait behind an earlier request. Data is parsed in slices of at most eighty
# requests, which take some milliseconds, so that other connections get their turn.
_MAX_PIPELINED = 16
_SLICE_BYTES = 2 * 1024


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose request or response stalls.

    uvicorn itself waits forever for headers, for trailers, for the rest of a body that was answered early, and for a
    client that does not read. It keeps all headers and trailers. A few hundred connections that send a byte per minute
    ("slow loris"), or one that sends trailer after trailer, would use up file handles and memory. A request that
    arrives in one piece, and whose answer is read, needs no timer here.

    A connection alternates between a head and the rest of its message. Time and bytes are bounded while a head arrives, and
    while the rest of an already answered message arrives. In between, the application reads within its own bounds.

    Attributes:
        header_timeout_s: seconds from the first byte of a head, or the start of the connection, to the end of the head;
            and from an early answer to the end of its request.
        max_header_bytes: bytes that may arrive in that time, between two pieces of a body, or as trailers. The
            middleware has the exact limit for headers, with its own answer.
        send_timeout_s: seconds within which a client must read some of a waiting answer.
        linger_s: seconds that an idle connection stays open when the server stops.
    """

    header_timeout_s: float
    max_header_bytes: int
    send_timeout_s: float
    linger_s: float
    _running: RequestResponseCycle | None = None
    _last_words: bytes | None = None
    _is_parting = False
    _is_offer = False
    _is_in_head = False
    _is_in_message = False
    _has_body_come = False
    _has_message_ended = False
    _num_bytes = 0
    _num_unsent = 0
    _has_taken = False
    _timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _probe_timer: asyncio.TimerHandle | None = None
    _held = b""
    _is_end_due = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Expect a request's head."""
        super().connection_made(cast(asyncio.Transport, transport))
        metrics.CONNECTIONS.inc()
        self.flow = HeldFlow(self.transport, lambda: bool(self._held))
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers, and let the application know."""
        metrics.CONNECTIONS.dec()
        self._stop_timer()
        for timer in (self._send_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        self._send_timer = self._probe_timer = None
        self._disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the received data, but stop while several requests wait for an earlier answer."""
        self._held = self._held + data if self._held else data
        self._take_held()

    def _take_held(self) -> None:
        data, first = self._held, 0
        while first < len(data) and len(self.pipeline) < _MAX_PIPELINED and not self.transport.is_closing():
            self._take(data[first : first + _SLICE_BYTES])
            first += _SLICE_BYTES
        self._held = b"" if self.transport.is_closing() else data[first:]
        if self._held:
            self.flow.pause_reading()
        elif self._is_end_due:
            self._is_end_due = False
            if not self.eof_received():
                self.transport.close()

    def _take(self, data: bytes) -> None:
        """Parse data, and start or stop the timer, depending on whether a message is still incomplete."""
        if self._last_words is not None:
            self._num_bytes += len(data)
            if self._num_bytes > _MAX_IGNORED_BYTES:
                self.transport.close()
            return
        self._has_body_come = self._has_message_ended = False
        self._feed(data)
        if self.transport.is_closing():
            return
        if self._has_message_ended:
            # The part of the next head that arrived with the end of a message is not counted; it is less than a packet.
            self._num_bytes = 0
            self._stop_timer()
            # Received data stops the timer that uvicorn starts at the end of an answer.
            if self._is_in_head or self.cycle.response_complete:
                self._start_timer()
        elif self._is_in_message and not self.cycle.response_complete:
            self._stop_timer()
            self._count_bytes(0 if self._has_body_come else len(data))
        else:
            self._count_bytes(len(data))
            if self._timer is None and not self.transport.is_closing():
                self._start_timer()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # uvicorn's returns nothing, asyncio's may
        """Keep answering a client that has only finished sending.

        A client that has left looks the same until data is sent to it, so its work is canceled a little later.
        """
        if self._held:
            self._is_end_due = True
            return True
        if self._is_in_message and self.cycle is not self._running:
            self.pipeline.popleft()  # it will never be complete; the requests before it are
        elif self._is_in_message or not self._is_answering:
            return None
        self._stop_timer()
        self._close_when_answered()
        self._probe_timer = self.loop.call_later(_FIRST_PROBE_S, self._probe, True)
        return True

    def shutdown(self) -> None:
        """Answer the requests that have begun, and a request that is on its way to an idle connection."""
        self._is_parting = True
        if self._is_in_head:
            return  # the answer will announce that it is the last
        if self._is_answering:
            self._close_when_answered()
        elif self._is_in_message:
            self.transport.close()
        else:
            self.loop.call_later(self.linger_s, self._close_idle)

    # ---------------------------------------------------------------------------------------------------------- parser

    def on_message_begin(self) -> None:
        """Expect the rest of a head."""
        super().on_message_begin()
        self._is_in_head = True
        self._num_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep headers but not trailers, which a proxy in front has not checked as headers."""
        if not self._is_in_message:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Pass the request to the application."""
        method = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT":
            self._is_offer = True
            return
        self._is_in_head, self._is_in_message = False, True
        self._num_bytes = 0
        self.url = path_of(self.url)
        self.expect_100_continue &= self.parser.get_http_version() != "1.0"  # RFC 9110, 10.1.1
        if (refused := why_refused(self.headers, self.parser.get_http_version())) is not None:
            cast(dict[str, object], self.scope)[REFUSED] = refused
        super().on_headers_complete()
        if method == b"CONNECT" or self._is_parting:  # no request can follow this one
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body to the application, which counts it."""
        self._has_body_come = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect the next head."""
        if self._is_offer:
            return
        self._is_in_message = False
        self._has_message_ended = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Expect the rest of an already answered message to arrive soon, and the answer to be read."""
        is_current = not self.pipeline
        super().on_response_complete()
        if is_current and self._last_words is not None and not self.transport.is_closing():
            self._hang_up(self._last_words)
        if is_current and self._is_in_message and not self.transport.is_closing():
            self._num_bytes = 0
            self._start_timer()
        self._has_taken = self._has_taken or not self._unsent()
        self._watch_sending()
        if self._held:
            self._take_held()
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        """Expect the client to read some of the answer; until then no more of it is written."""
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        """Note that the client has read the waiting data, however much of the answer follows."""
        super().resume_writing()
        self._has_taken = True

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not a request; uvicorn calls this."""
        self._refuse(InvalidHttp(msg))

    def _refuse(self, error: RequestError) -> None:
        """Answer with the common error body, after the earlier requests of the connection, and close the connection."""
        metrics.REQUESTS.labels("other", error.status).inc()
        metrics.ERRORS.labels(error.code).inc()
        log.info("invalid_http", caller=self._caller, status=error.status, error_code=error.code, reason=error.message)
        content = bad_request(error)
        if self._is_answering and not (self._is_in_message and self.cycle is self._running):
            self._last_words = content
        elif self._is_in_message and self.cycle.response_started:
            self.transport.close()
        else:
            self._hang_up(content)

    def _hang_up(self, last_words: bytes) -> None:
        """Write an answer and close the connection once the client has had time to read it.

        Closing at once, with unread bytes, would reset the connection and lose the answer.
        """
        self._disconnect()
        self._stop_timer()
        self._last_words, self._num_bytes = last_words, 0
        self.transport.write(last_words)
        self.transport.write_eof()
        self.loop.call_later(self.linger_s, self.transport.close)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _feed(self, data: bytes) -> None:
        """Parse data, and skip any offer of another protocol.

        Java's HTTP client offers HTTP/2 with every request. A server may decline by answering as if there were no offer, but
        the parser takes the bytes that follow for the other protocol, and the request would lose its body. So the parser
        reads the head again, without the offer.
        """
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as offer:
                    if not self._is_offer:
                        return  # CONNECT: the rest is not HTTP
                    rest = rest[offer.args[0] :]
                    self._read_again()
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _read_again(self) -> None:
        """Parse the last head again, without its offer of another protocol."""
        self._is_offer = False
        head = without_offer(self.parser.get_method(), self.url, self.parser.get_http_version(), self.headers)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets them
        self.parser.feed_data(head)

    # ---------------------------------------------------------------------------------------------------------- bounds

    @property
    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _close_when_answered(self) -> None:
        """Close the connection after the last received request is answered, or at once if none is waiting."""
        if not self._is_answering:
            self.transport.close()
        elif self.pipeline:
            self.pipeline[0][0].keep_alive = False
        elif self._running is not None:
            self._running.keep_alive = False

    def _close_idle(self) -> None:
        if not (self._is_in_head or self._is_answering or self.transport.is_closing()):
            self.transport.close()

    def _disconnect(self) -> None:
        """Tell every request of the connection that its client is gone; uvicorn tells only the latest request."""
        for cycle in (self._running, *(cycle for cycle, _app in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _probe(self, is_first: bool) -> None:
        """Send an interim response, which HTTP/1.1 clients skip. If the client has left, the second response fails."""
        cycle = self._running
        if cycle is None or cycle.response_started or cycle.scope["http_version"] != "1.1":
            return
        self.transport.write(_PROBE)
        if is_first:
            self._probe_timer = self.loop.call_later(_SECOND_PROBE_S, self._probe, False)

    def _count_bytes(self, num_bytes: int) -> None:
        """Count the bytes that the application does not see: headers, trailers, and bytes in between or too late."""
        self._num_bytes += num_bytes
        if self._num_bytes > self.max_header_bytes and self._is_in_message and self.cycle.response_complete:
            self.transport.close()  # the rest of a body whose request was refused, and counted, before
        elif self._num_bytes > self.max_header_bytes:
            what = f"the request's headers or trailers have more than {self.max_header_bytes} bytes, which is the limit"
            self._refuse(HeadersTooLarge(what))
        elif self._is_in_head and len(self.headers) > MAX_HEADERS:
            self._refuse(HeadersTooLarge(f"the request has more than {MAX_HEADERS} headers, which is the limit"))

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.header_timeout_s, self._close_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_slow(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # the rest may have arrived, so the client is not slow
            self._start_timer()
        elif not self.transport.is_closing():
            metrics.SLOW_CONNECTIONS.labels("receive").inc()
            log.info("connection_too_slow", caller=self._caller, what="receive")
            self._close_when_answered()

    def _watch_sending(self) -> None:
        """Check after a while whether the client reads the waiting data."""
        if self._send_timer is None and self._unsent() > 0:
            self._num_unsent, self._has_taken = self._unsent(), False
            self._send_timer = self.loop.call_later(self.send_timeout_s, self._check_sent)

    def _check_sent(self) -> None:
        """Abort the connection of a client that has read nothing of its answer since the last check."""
        self._send_timer = None
        if self._unsent() >= self._num_unsent and not self._has_taken:
            metrics.SLOW_CONNECTIONS.labels("send").inc()
            log.info("connection_too_slow", caller=self._caller, what="send")
            self._disconnect()
            self.transport.abort()
        else:
            self._watch_sending()

    def _unsent(self) -> int:
        return self.transport.get_write_buffer_size()

    @property
    def _caller(self) -> str:
        return address_of(self.client)


def bounded(settings: Settings) -> type[BoundedProtocol]:
    """Return a protocol class with the bounds of the settings, since uvicorn creates protocols from a class."""
    bounds = {
        "header_timeout_s": settings.header_timeout_s,
        "max_header_bytes": settings.max_header_bytes,
        "send_timeout_s": settings.send_timeout_s,
        "linger_s": min(_LINGER_S, settings.shutdown_grace_s / 2),
    }
    return type("BoundedProtocol", (BoundedProtocol,), bounds)
