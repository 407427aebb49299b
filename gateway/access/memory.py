"""How many bytes all requests may hold together: bodies on their way in, texts and tokens that wait, answers not yet read.

What a request holds is reserved before the memory is taken: its body when its size is announced, its answer before anything
is computed. What does not fit is refused at once, while the client can still try again cheaply.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from gateway.errors import MemoryFull, TooMuchMemory

# A request that holds no more than this is small. Small ones get in where large ones are refused.
_SMALL_BYTES: Final = 1 << 20
_SMALL_WEIGHT: Final = 7
# Over how long the rate is measured at which memory is given back.
_RATE_WINDOW_S: Final = 10.0
# The advice when nothing has been given back yet.
_RETRY_AFTER_S: Final = 5


class MemoryBudget:
    """Divides a number of bytes among the requests of all clients.

    No client can take all of it: it may hold as much as it leaves free, which is half for a client that is alone, a third
    each for two, and so on. (Dynamic thresholds, as switches share their buffers: Choudhury and Hahne, IEEE/ACM Transactions
    on Networking 6(2), 1998.) For small requests it is seven times what is left free, so that a client that does not read
    its answers still gets one to a short text.

    Belongs to one event loop.

    Args:
        max_bytes: how much there is.
        now: the clock, in seconds.
    """

    def __init__(self, max_bytes: int, now: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """How much is reserved."""
        self._held: dict[str, int] = {}
        self._now = now
        self._given_back = 0.0  # bytes, those of some time ago counting less
        self._counted_at = now()

    def open(self, caller: str) -> Reservation:
        """Return a reservation of nothing yet, on the account of ``caller``."""
        return Reservation(self, caller)

    def change(self, caller: str, held: int, wanted: int) -> None:
        """Let a request that holds ``held`` bytes hold ``wanted``.

        Raises:
            MemoryFull: there is no room for so much more now.
            TooMuchMemory: there never is, not even for a client that is alone.
        """
        more = wanted - held
        if more > 0:
            self._check(caller, wanted, more)
        elif more < 0:
            self._count_given_back(-more)
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
                f"the request needs about {wanted} bytes of memory, the most for one is {largest}, half of "
                "GATEWAY_MEMORY_BUDGET_BYTES: send fewer or shorter texts in a request"
            )
        weight = _SMALL_WEIGHT if wanted <= _SMALL_BYTES else 1
        mine = self._held.get(caller, 0) + more
        free = self.max_bytes - self.num_bytes - more
        if mine > weight * free:
            missing = (mine - weight * free) / (1 + weight)
            raise MemoryFull(
                f"the request needs {more} more bytes of memory than are free for it: {self.num_bytes} of {self.max_bytes} "
                f"are reserved, {mine - more} of them for {caller}'s requests that run or whose answers have not been read",
                retry_after_s=self._retry_after_s(missing),
            )

    def _count_given_back(self, num_bytes: int) -> None:
        now = self._now()
        self._given_back = self._given_back * math.exp((self._counted_at - now) / _RATE_WINDOW_S) + num_bytes
        self._counted_at = now

    def _retry_after_s(self, missing: float) -> int:
        """Return how long it takes to give ``missing`` bytes back at the rate of the last seconds."""
        self._count_given_back(0)
        rate = self._given_back / _RATE_WINDOW_S
        return math.ceil(min(120, missing / rate)) if rate > 0 else _RETRY_AFTER_S


class Reservation:
    """What one request holds of the budget.

    Attributes:
        caller: on whose account; changed only while nothing is held.
        num_bytes: how much that is.
    """

    __slots__ = ("_budget", "caller", "num_bytes")

    def __init__(self, budget: MemoryBudget, caller: str) -> None:
        self._budget = budget
        self.caller = caller
        self.num_bytes = 0

    def resize(self, num_bytes: int) -> None:
        """Hold ``num_bytes`` from now on, more or fewer than before.

        Raises:
            MemoryFull: there is no room for so many now.
            TooMuchMemory: there never is.
        """
        self._budget.change(self.caller, self.num_bytes, num_bytes)
        self.num_bytes = num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Hold no more than ``num_bytes``."""
        if num_bytes < self.num_bytes:
            self.resize(num_bytes)

    def release(self) -> None:
        """Hold nothing any more."""
        self.resize(0)
