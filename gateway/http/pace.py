"""How fast large bodies are taken in, all of them together."""

from __future__ import annotations

import asyncio

# The event loop needs a third of its time to receive so much, and the parser a third of the interpreter's.
BYTES_PER_S = 100_000_000
# The loop's timers are no finer than a millisecond: a wait for each small piece would add up to many times the pace.
_LEAST_WAIT_S = 0.005


class Pace:
    """Lets so many bytes a second pass, in the order in which they come.

    Clients on the same machine or network can send a gigabyte a second. The event loop would do nothing but receive, and a
    short request wait for dozens of large pieces each time that it needs the loop.
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
