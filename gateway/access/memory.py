"""The memory budget of all requests: bodies being received, waiting texts and tokens, unread responses.

Memory is reserved before it is used: for a body when its size is announced, and for an answer before anything is
computed. A request that does not fit is rejected immediately, while a retry is still cheap for the client.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from gateway.errors import MemoryFull, TooMuchMemory

# A request that needs at most this many bytes is small. Small requests are still admitted when large ones are rejected.
_SMALL_BYTES: Final = 1 << 20
_SMALL_WEIGHT: Final = 7
# The window for measuring the rate at which memory is released.
_RATE_WINDOW_S: Final = 10.0
# The advice if no memory has been released yet.
_RETRY_AFTER_S: Final = 5


class MemoryBudget:
    """Divides a number of bytes among the requests of all clients.

    No client can take all of it: it may hold as much as it leaves free, which is half for a single client, a third each for
    two, and so on. (Dynamic thresholds, as switches share their buffers: Choudhury and Hahne, IEEE/ACM Transactions on
    Networking 6(2), 1998.) For small requests the limit is seven times the free memory, so that a client that does not read
    its responses still gets one for a short text.

    An instance belongs to one event loop.

    Args:
        max_bytes: the size of the budget.
        now: the clock, in seconds.
    """

    def __init__(self, max_bytes: int, now: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """The reserved bytes."""
        self._held: dict[str, int] = {}
        self._now = now
        self._released = 0.0  # bytes, with exponentially decreasing weight
        self._counted_at = now()

    def open(self, caller: str) -> Reservation:
        """Return an empty reservation for ``caller``."""
        return Reservation(self, caller)

    def change(self, caller: str, held: int, wanted: int) -> None:
        """Change the reservation of a request from ``held`` bytes to ``wanted``.

        Raises:
            MemoryFull: there is no room for it now.
            TooMuchMemory: it would not even fit for a single client.
        """
        more = wanted - held
        if more > 0:
            self._check(caller, wanted, more)
        elif more < 0:
            self._count_released(-more)
        self.num_bytes += more
        mine = self._held.get(caller, 0) + more
        if mine:
            self._held[caller] = mine
        else:
            self._held.pop(caller, None)

    def _check(self, caller: str, wanted: int, more: int) -> None:
        largest = self.max_bytes // 2
        if wanted > largest:
            raise TooMuchMemory(
                f"the request needs about {wanted} bytes of memory; the maximum is {largest}, half of "
                "GATEWAY_MEMORY_BUDGET_BYTES: send fewer or shorter texts per request"
            )
        weight = _SMALL_WEIGHT if wanted <= _SMALL_BYTES else 1
        mine = self._held.get(caller, 0) + more
        free = self.max_bytes - self.num_bytes - more
        if mine > weight * free:
            missing = (mine - weight * free) / (1 + weight)
            raise MemoryFull(
                f"the request needs {more} more bytes of memory than are free for it: {self.num_bytes} of {self.max_bytes} "
                f"are reserved, {mine - more} of them for {caller}'s running requests and unread responses",
                retry_after_s=self._retry_after_s(missing),
            )

    def _count_released(self, num_bytes: int) -> None:
        now = self._now()
        self._released = self._released * math.exp((self._counted_at - now) / _RATE_WINDOW_S) + num_bytes
        self._counted_at = now

    def _retry_after_s(self, missing: float) -> int:
        """Return the seconds that it takes to release ``missing`` bytes at the recent rate."""
        self._count_released(0)
        rate = self._released / _RATE_WINDOW_S
        return math.ceil(min(120, missing / rate)) if rate > 0 else _RETRY_AFTER_S


class Reservation:
    """The memory that one request holds.

    Attributes:
        caller: the client that is charged; changed only while nothing is held.
        num_bytes: the reserved bytes.
    """

    __slots__ = ("_budget", "caller", "num_bytes")

    def __init__(self, budget: MemoryBudget, caller: str) -> None:
        self._budget = budget
        self.caller = caller
        self.num_bytes = 0

    def resize(self, num_bytes: int) -> None:
        """Change the reservation to ``num_bytes``.

        Raises:
            MemoryFull: there is no room for it now.
            TooMuchMemory: it would not even fit for a single client.
        """
        self._budget.change(self.caller, self.num_bytes, num_bytes)
        self.num_bytes = num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Reduce the reservation to at most ``num_bytes``."""
        if num_bytes < self.num_bytes:
            self.resize(num_bytes)

    def release(self) -> None:
        """Release everything."""
        self.resize(0)
