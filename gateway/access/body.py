"""A request's body on its way in: not larger than allowed, not slower, and read to its end also when nobody wants it."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from gateway.errors import BodyTooLarge, BodyTooSlow, ClientDisconnected

# How much of a body is read that nobody wants: enough for an honest mistake.
_MAX_DRAINED_BYTES = 64 * 1024 * 1024


class Body:
    """Stands between the server, which receives, and the application.

    Args:
        max_bytes: the largest body.
        timeout_s: seconds that it may take to come, counted from when it is first asked for.
    """

    def __init__(self, receive: Receive, headers: Headers, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._num_bytes = 0
        self._has_ended = False
        self._is_too_slow = False
        declared = headers.get("content-length", "0")
        self._declared_bytes = int(declared) if declared.isdecimal() else 0
        # uvicorn says "100 Continue" when a body is first asked for; until then such a client sends nothing.
        self._is_coming = "expect" not in headers

    def check_declared_size(self) -> None:
        """Refuse a body before it comes.

        Raises:
            BodyTooLarge: more bytes are announced than are allowed.
        """
        self._check_size(self._declared_bytes)

    async def receive(self) -> Message:
        """Pass a message on to the application.

        Raises:
            BodyTooLarge: more bytes have come than are allowed.
            BodyTooSlow: the body has not come in time.
            ClientDisconnected: the client has gone before its request was complete.
        """
        self._is_coming = True
        if self._has_ended:  # all that can still come is that the client goes
            return await self._receive()
        message = await self._next_in_time()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("the client closed the connection before its request was complete")
        self._check_size(self._num_bytes)
        return message

    async def drain(self) -> None:
        """Read what is still coming, within bounds, so that the client gets to read its answer.

        Many clients send everything before they read, and closing a connection with unread bytes resets it: they would
        see a broken pipe in place of the 413.
        """
        if not self._is_coming or self._is_too_slow:
            return
        most = self._num_bytes + _MAX_DRAINED_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                while not self._has_ended and self._num_bytes < most:
                    await self._next()

    async def _next_in_time(self) -> Message:
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._next()
        except TimeoutError:
            self._is_too_slow = True
            raise BodyTooSlow(
                f"{self._num_bytes} bytes of the request body have come in {self._timeout_s:g} s, which is all the time "
                "that it has: send fewer texts in a request"
            ) from None

    async def _next(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        self._has_ended = not message.get("more_body", False)
        return message

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise BodyTooLarge(
                f"the request body has {num_bytes} bytes or more, the limit is {self._max_bytes}: send fewer texts "
                "in a request"
            )
