"""A single thread for work that holds the interpreter; clients take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """Runs pieces of work in one thread, one at a time. The client that has used the least goes next.

    Reading a body of 16 MB and writing 100 MB of JSON hold the interpreter for some milliseconds at a time. If several
    threads did that at once, the event loop would wait for each of them in turn. An instance belongs to one event loop.

    Args:
        name: the thread's name.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._waiting: dict[str, deque[tuple[asyncio.Future[None], int]]] = {}
        # The cost that each client has used. A new client starts with the least of these.
        self._given: dict[str, int] = {}
        self._least = 0
        self._is_taken = False

    async def run(self, caller: str, cost: int, work: Callable[[], T]) -> T:
        """Run ``work`` in the thread when it is the caller's turn, and return its result.

        Args:
            cost: the amount of work, in any unit that is the same for all callers.
        """
        if self._is_taken:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(caller, deque()).append((turn, cost))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # the turn came at the same moment
                    self._pass_on()
                raise
        else:
            self._is_taken = True
            self._charge(caller, cost)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            caller = min(self._waiting, key=lambda name: self._given.get(name, self._least))
            waiting = self._waiting[caller]
            turn, cost = waiting.popleft()
            if not waiting:
                del self._waiting[caller]
            if not turn.done():  # otherwise its client has left
                self._charge(caller, cost)
                turn.set_result(None)
                return
        self._is_taken = False
        self._given.clear()
        self._least = 0

    def _charge(self, caller: str, cost: int) -> None:
        given = max(self._given.get(caller, 0), self._least)
        self._least = given
        self._given[caller] = given + cost
        if len(self._given) > 2 * len(self._waiting) + 100:
            self._given = {name: sum_ for name, sum_ in self._given.items() if sum_ > self._least}
