"""Decide what is computed next: a fair queue and a pure :func:`take`, with no clock, no lock and no waiting inside.

Work is shared by *tokens*, first between callers and then between the requests of one caller, by start-time fair
queueing (Goyal, Vin, Cheng: "Start-time Fair Queueing", SIGCOMM 1996): each carries the virtual time of what it has
been given; whoever is furthest behind is served next; a newcomer starts at the present virtual time, so it neither waits
for a backlog nor catches up on time in which it asked for nothing. One text that arrives behind a request of 2,048 is
therefore in the next batch.

Infinity's ``CustomFIFOQueue`` sorts everything by length and cuts by the number of items: a long text waits as long as
shorter ones arrive, and 32 long ones are one batch, whatever their size.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gateway.engine.tokenizer import Tokens


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's claim on the queue, shared by all of its entries.

    Attributes:
        caller: whom the request is for.
        deadline: point in time after which its entries are no longer computed.
        is_live: set to ``False`` by whoever no longer wants the answer; its entries are then dropped, not computed.
    """

    caller: str
    deadline: float
    is_live: bool = True

    def wants(self, now: float) -> bool:
        return self.is_live and now < self.deadline


@dataclass(eq=False, slots=True)
class Entry:
    """One text in the queue: its tokens, its task, and its place in the request."""

    ticket: Ticket
    index: int
    tokens: Tokens
    task: str | None
    queued_at: float

    @property
    def num_tokens(self) -> int:
        return len(self.tokens.ids)


T = TypeVar("T")


@dataclass(order=True, slots=True)
class _Share(Generic[T]):
    virtual_time: float
    arrival: int
    holder: T = field(compare=False)


class _FairHeap(Generic[T]):
    """Holders ordered by virtual time, then by arrival."""

    def __init__(self) -> None:
        self._heap: list[_Share[T]] = []
        self._now = 0.0  # virtual time of whoever was served last
        self._arrivals = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def join(self, holder: T) -> None:
        heapq.heappush(self._heap, _Share(self._now, self._arrivals, holder))
        self._arrivals += 1

    def first(self) -> T:
        return self._heap[0].holder

    def charge(self, num_tokens: int) -> None:
        """Book the work that the first holder was given, which may make another the first."""
        share = self._heap[0]
        self._now = share.virtual_time
        heapq.heapreplace(self._heap, _Share(share.virtual_time + num_tokens, share.arrival, share.holder))

    def leave(self) -> None:
        """Remove the first holder."""
        heapq.heappop(self._heap)


@dataclass(eq=False, slots=True)
class _Request:
    ticket: Ticket
    entries: deque[Entry] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class _Caller:
    name: str
    requests: _FairHeap[_Request] = field(default_factory=_FairHeap)


class FairQueue:
    """Entries that wait, in the order in which fairness serves them. Not safe across threads: guard it."""

    def __init__(self) -> None:
        self._order: _FairHeap[_Caller] = _FairHeap()
        self._callers: dict[str, _Caller] = {}
        self._requests: dict[Ticket, _Request] = {}

    def __bool__(self) -> bool:
        """Whether anything waits; what waits may turn out to be unwanted."""
        return bool(self._order)

    def add(self, entries: Iterable[Entry]) -> None:
        """Queue entries; those of one ticket are served in the order in which they were added."""
        for entry in entries:
            request = self._requests.get(entry.ticket)
            if request is None:
                request = self._requests[entry.ticket] = _Request(entry.ticket)
                self._join(request)
            request.entries.append(entry)

    def _join(self, request: _Request) -> None:
        name = request.ticket.caller
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = _Caller(name)
            self._order.join(caller)
        caller.requests.join(request)

    def peek(self, now: float) -> Entry | None:
        """Return the entry that is served next, dropping on the way those that nobody wants any more."""
        while self._order:
            caller = self._order.first()
            while caller.requests:
                request = caller.requests.first()
                if request.entries and request.ticket.wants(now):
                    return request.entries[0]
                caller.requests.leave()
                del self._requests[request.ticket]
            self._order.leave()
            del self._callers[caller.name]
        return None

    def pop(self) -> Entry:
        """Remove and return the entry that :meth:`peek` returned just before."""
        caller = self._order.first()
        entry = caller.requests.first().entries.popleft()
        caller.requests.charge(entry.num_tokens)
        self._order.charge(entry.num_tokens)
        return entry


def take(queue: FairQueue, max_batch_tokens: int, now: float) -> list[Entry]:
    """Remove and return the next batch: entries in fair order, up to ``max_batch_tokens`` tokens together.

    An entry that is larger than the budget on its own is a batch by itself. Entries whose ticket has gone or is past
    its deadline are dropped. The result is empty exactly when nothing is left that anybody wants.
    """
    batch: list[Entry] = []
    num_tokens = 0
    while (entry := queue.peek(now)) is not None:
        num_tokens += entry.num_tokens
        if batch and num_tokens > max_batch_tokens:
            break
        batch.append(queue.pop())
    return batch
