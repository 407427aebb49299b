"""Limit the rate at which the gateway reads: all large bodies together, and each connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl

# Receiving at this rate takes a third of the event loop's time, and parsing takes a third of the interpreter's.
BYTES_PER_S = 100_000_000
# The loop's timers have a resolution of a millisecond: waits for many small pieces would add up to many times the
# intended delay.
_LEAST_WAIT_S = 0.005


class Pace:
    """Lets a fixed number of bytes pass per second, in order of arrival.

    Clients on the same machine or network can send a gigabyte per second. Without a limit, the event loop would do
    nothing but receive, and a short request would wait for dozens of large pieces each time it needs the loop.
    """

    def __init__(self, bytes_per_s: int = BYTES_PER_S) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    async def take(self, num_bytes: int) -> None:
        """Wait until ``num_bytes`` may pass."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + num_bytes / self._bytes_per_s
        wait_s = self._free_at - now
        await asyncio.sleep(wait_s if wait_s >= _LEAST_WAIT_S else 0)


class HeldFlow(FlowControl):
    """Keeps a connection with unparsed data from being read; uvicorn would read on with each request and answer."""

    def __init__(self, transport: asyncio.Transport, has_held: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._has_held = has_held

    def resume_reading(self) -> None:
        if not self._has_held():
            super().resume_reading()
