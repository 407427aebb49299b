"""Receive a request's body: decode it, bound its size and time, and read it to its end even if it is refused."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from gateway.access.memory import Reservation
from gateway.errors import BodyTooLarge, BodyTooSlow, ClientDisconnected, UnsupportedEncoding
from gateway.http.decoding import Decoder, decoder_for
from gateway.http.pace import Pace

# The maximum number of bytes that are read of a refused body; enough for an honest mistake.
_MAX_DRAINED_BYTES = 64 * 1024 * 1024
# A file may take longer to arrive than another body: as long as a slow connection needs for the largest file.
_LEAST_BYTES_PER_S = 256 * 1024
# The memory held for a body that is written to the disk as it arrives.
_STREAMED_BYTES = 2 * 1024 * 1024
# The unit in which memory is reserved for a body, and so the first reservation for a body of unknown size.
_STEP_BYTES = 64 * 1024
_LARGE_BYTES = 256 * 1024


class Body:
    """Passes a request's body from the server to the application, within bounds.

    Args:
        memory: the request's reservation, which grows with the body.
        pace: the common pace of all large bodies.
        max_bytes: the largest size of the body, both as received and as decoded.
        timeout_s: seconds that the body may take to arrive, counted from the application's first read.
    """

    def __init__(
        self, receive: Receive, headers: Headers, memory: Reservation, pace: Pace, max_bytes: int, timeout_s: float
    ) -> None:
        self._receive = receive
        self._memory = memory
        self._pace = pace
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._num_bytes = 0
        self._num_decoded = 0
        self._has_ended = False
        self._is_too_slow = False
        self._decoder: Decoder | None = None
        self._content_encoding = headers.get("content-encoding", "")
        declared = headers.get("content-length", "0")
        self._declared_bytes = int(declared) if declared.isdecimal() else 0
        # A client that sends this header waits for "100 Continue", which uvicorn sends when the body is first read.
        self._is_coming = headers.get("expect", "").lower() != "100-continue"
        self._is_streamed = False
        self._is_refused_late = False
        self._advice = "send fewer texts in a request"

    def stream(self, max_bytes: int) -> None:
        """Accept a larger body, for a path that takes files: it is written to the disk as it arrives."""
        self._is_streamed = True
        self._max_bytes = max_bytes
        self._timeout_s += max_bytes / _LEAST_BYTES_PER_S
        self._advice = "upload several files"

    def refuse_late(self, advice: str) -> None:
        """Refuse a body that is too large when it is read, with this advice: its reader answers a browser with a page."""
        self._is_refused_late = True
        self._advice = advice

    def limit(self, max_bytes: int) -> None:
        """Lower the limit, for a path with small bodies.

        Raises:
            BodyTooLarge: the request announces more bytes.
        """
        self._max_bytes = min(self._max_bytes, max_bytes)
        self._check_size(self._declared_bytes)

    def admit(self) -> None:
        """Refuse a body before it arrives, or reserve the memory for it.

        Raises:
            BodyTooLarge: the request announces more bytes than are allowed.
            UnsupportedEncoding: the body has a content coding that cannot be decoded here.
            MemoryFull: there is no room for the body now.
        """
        if self._is_refused_late and self._declared_bytes > self._max_bytes:
            return
        self._check_size(self._declared_bytes)
        if self._is_streamed and self._content_encoding.strip().lower() not in ("", "identity"):
            raise UnsupportedEncoding("a file must be uploaded uncompressed, without `Content-Encoding`")
        self._decoder = decoder_for(self._content_encoding)
        if self._is_streamed:
            self._memory.resize(_STREAMED_BYTES)
        elif self._declared_bytes:
            self._reserve(self._declared_bytes)

    async def receive(self) -> Message:
        """Pass a message on to the application.

        Raises:
            BadInput: the body does not match its `Content-Encoding`.
            BodyTooLarge: the body has more bytes than are allowed.
            BodyTooSlow: the body did not arrive in time.
            ClientDisconnected: the client left before its request was complete.
            MemoryFull: there is no room for more of the body.
        """
        self._check_size(self._declared_bytes)
        self._is_coming = True
        if self._has_ended:  # the client can now only disconnect
            return await self._receive()
        message = await self._next_in_time()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("the client closed the connection before its request was complete")
        self._check_size(self._num_bytes)
        if self._decoder is not None:
            message["body"] = await self._decoded(message.get("body", b""))
        else:
            if not self._is_streamed:
                self._reserve(self._num_bytes)
            await self._keep_pace(self._num_bytes, len(message.get("body", b"")))
        return message

    async def drain(self) -> None:
        """Read the rest of the body, within bounds, so that the client can read its answer.

        Many clients send the whole request before they read. Closing a connection with unread bytes resets it, so these
        clients would see a broken pipe instead of the 413.
        """
        if not self._is_coming or self._is_too_slow:
            return
        most = self._num_bytes + _MAX_DRAINED_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                while not self._has_ended and self._num_bytes < most:
                    message = await self._next()
                    await self._keep_pace(self._num_bytes, len(message.get("body", b"")))

    async def _next_in_time(self) -> Message:
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._next()
        except TimeoutError:
            self._is_too_slow = True
            raise BodyTooSlow(
                f"only {self._num_bytes} bytes of the request body arrived in {self._timeout_s:g} s, which is the limit: "
                f"{self._advice}"
            ) from None

    async def _next(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        self._has_ended = not message.get("more_body", False)
        return message

    async def _decoded(self, data: bytes) -> bytes:
        """Decode the received bytes, and let other requests run in between."""
        assert self._decoder is not None  # noqa: S101
        pieces = []
        for piece in self._decoder.feed(data):
            self._num_decoded += len(piece)
            self._check_size(self._num_decoded)
            self._reserve(self._num_decoded)
            pieces.append(piece)
            await self._keep_pace(self._num_decoded, len(piece))
        if self._has_ended and self._num_bytes:
            self._decoder.finish()
        return b"".join(pieces)

    async def _keep_pace(self, num_bytes: int, num_new: int) -> None:
        """Let other requests run, once the body has turned out to be large."""
        if num_bytes > _LARGE_BYTES:
            await self._pace.take(num_new)

    def _reserve(self, num_bytes: int) -> None:
        """Reserve ``num_bytes`` for the body, in steps; most bodies need only one step."""
        held = 0 if self._decoder is None else self._decoder.memory_bytes
        needed = held + max(num_bytes, self._declared_bytes)
        if needed > self._memory.num_bytes:
            self._memory.resize(-(-needed // _STEP_BYTES) * _STEP_BYTES)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise BodyTooLarge(
                f"the request body has {num_bytes} bytes or more; the limit is {self._max_bytes}: {self._advice}"
            )
