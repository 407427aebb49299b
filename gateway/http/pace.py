"""How fast the gateway reads: all large bodies together, and each connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl

# Receiving so much takes a third of the event loop's time, and parsing it a third of the interpreter's.
BYTES_PER_S = 100_000_000
# The loop's timers are no finer than a millisecond: a wait for each small piece would add up to many times the pace.
_LEAST_WAIT_S = 0.005


class Pace:
    """Lets so many bytes pass per second, in the order in which they come.

    Clients on the same machine or network can send a gigabyte per second. The event loop would do nothing but receive, and
    a short request would wait for dozens of large pieces each time that it needs the loop.
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
    """Reads nothing from a connection while it holds unparsed data: uvicorn reads on with each request and answer."""

    def __init__(self, transport: asyncio.Transport, has_held: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._has_held = has_held

    def resume_reading(self) -> None:
        if not self._has_held():
            super().resume_reading()
