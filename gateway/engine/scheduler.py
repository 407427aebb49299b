"""Decide which texts to compute next: a fair queue and a pure :func:`take`, without a clock, a lock or waiting.

Work is shared by *tokens*, first between callers and then between the requests of one caller, by fair queueing: each
caller has a virtual time, which grows with the tokens that it is served, and the caller with the lowest virtual time is
served next. A newcomer starts at the current virtual time, so it neither waits for a backlog nor gets credit for idle time:
one text that arrives after a request of 2,048 texts is in the next batch. The current virtual time is that of a caller with
an even share so far (Demers, Keshav, Shenker: "Analysis and Simulation of a Fair Queueing Algorithm", SIGCOMM 1989), and at
least that of the caller being served (Goyal, Vin, Cheng: "Start-time Fair Queueing", SIGCOMM 1996). It advances with all
work, so a stream of newcomers that would fill the device by itself does not starve a large request.

Low-priority work has a separate fair queue (:class:`Lanes`), which is served only while the other is empty. It can
starve until its deadline, by design.

Infinity's ``CustomFIFOQueue`` sorts everything by length and limits a batch by its number of items: a long text waits as
long as shorter texts arrive, and 32 long texts are one batch, regardless of their size.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from gateway.engine.model.items import Item
from gateway.types import Priority


@dataclass(eq=False, slots=True)
class RequestHandle:
    """One request's claim on the queue, shared by all of its waiters.

    Attributes:
        caller: the client that sent the request.
        deadline: the time after which its waiters are no longer computed.
        is_live: set to ``False`` once the answer is no longer needed; its waiters are then dropped, not computed.
    """

    caller: str
    deadline: float
    is_live: bool = True
    priority: Priority = Priority.NORMAL

    def wants(self, now: float) -> bool:
        return self.is_live and now < self.deadline


@dataclass(eq=False, slots=True)
class TokenSequence:
    """One item to compute, for all requests that wait for it: identical items in flight are computed once.

    Each of the ``waiters`` has its own place in the queue, so sharing a computation never delays a request. The first to
    be served has the item computed for all; the others then cost nothing.

    Attributes:
        replica: the replica that must compute it; ``None`` for any.
        key: equal for two sequences that may share a computation.
    """

    item: Item
    waiters: list[Waiter] = field(default_factory=list)
    is_taken: bool = False
    replica: int | None = None
    key: Hashable = None


@dataclass(eq=False, slots=True)
class Waiter:
    """One text in the queue, and the place of its first vector in the request."""

    handle: RequestHandle
    index: int
    sequence: TokenSequence
    queued_at: float

    @property
    def num_tokens(self) -> int:
        return self.sequence.item.num_tokens


class Waiting(Protocol):
    """An entry that can wait in a :class:`FairQueue`."""

    @property
    def handle(self) -> RequestHandle:
        """The request to which the entry belongs."""

    @property
    def num_tokens(self) -> int:
        """The amount of work, in tokens or another unit that the queue distributes."""


T = TypeVar("T")
W = TypeVar("W", bound=Waiting)


@dataclass(order=True, slots=True)
class _Share(Generic[T]):
    virtual_time: float
    arrival: int
    holder: T = field(compare=False)


class _FairHeap(Generic[T]):
    """Holders ordered by virtual time, then by arrival."""

    def __init__(self) -> None:
        self._heap: list[_Share[T]] = []
        self._now = 0.0  # the current virtual time; never decreases
        self._arrivals = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def join(self, holder: T) -> None:
        heapq.heappush(self._heap, _Share(self._now, self._arrivals, holder))
        self._arrivals += 1

    def first(self) -> T:
        return self._heap[0].holder

    def charge(self, num_tokens: int, num_sharing: int) -> None:
        """Charge the first of ``num_sharing`` holders for its work, after which another holder may be first."""
        share = self._heap[0]
        self._now = max(self._now + num_tokens / num_sharing, share.virtual_time)
        heapq.heapreplace(self._heap, _Share(share.virtual_time + num_tokens, share.arrival, share.holder))

    def leave(self) -> None:
        """Remove the first holder. The virtual time advances to the holder's, so rejoining immediately gains nothing."""
        self._now = max(self._now, heapq.heappop(self._heap).virtual_time)


@dataclass(eq=False, slots=True)
class _Request(Generic[W]):
    handle: RequestHandle
    waiters: deque[W] = field(default_factory=deque)
    num_tokens: int = 0  # of its waiters
    is_begun: bool = False


@dataclass(eq=False, slots=True)
class _Caller(Generic[W]):
    name: str
    num_waiting: int = 0  # requests with waiters; a request without waiters is kept until its virtual time is reached
    requests: _FairHeap[_Request[W]] = field(default_factory=_FairHeap)


class QueueStats(NamedTuple):
    """The size of a :class:`FairQueue`; all counts are zero when its last waiter has gone."""

    num_callers: int
    num_requests: int
    num_waiting_callers: int


class FairQueue(Generic[W]):
    """Entries that wait, served fairly. Not thread-safe: guard it with a lock."""

    def __init__(self) -> None:
        self._order: _FairHeap[_Caller[W]] = _FairHeap()
        self._callers: dict[str, _Caller[W]] = {}
        self._requests: dict[RequestHandle, _Request[W]] = {}
        self._num_waiting = 0  # callers with waiters
        self.num_tokens = 0
        """The number of waiting tokens, including tokens that are no longer needed."""
        self.num_small = 0
        """The number of small requests whose first waiter :func:`take` has taken so far."""

    @property
    def num_waiters(self) -> int:
        """How many are waiting, including those no longer needed."""
        return sum(len(request.waiters) for request in self._requests.values())

    def stats(self) -> QueueStats:
        """Return the numbers of callers and requests that the queue remembers, and of callers with waiters."""
        return QueueStats(len(self._callers), len(self._requests), self._num_waiting)

    def __bool__(self) -> bool:
        """Whether anything waits, even if it is no longer needed."""
        return bool(self._order)

    def add(self, waiters: Iterable[W]) -> None:
        """Queue waiters; the waiters of one handle are served in the order of their addition."""
        for waiter in waiters:
            request = self._requests.get(waiter.handle) or self._join(waiter.handle)
            if not request.waiters:
                caller = self._callers[waiter.handle.caller]
                self._num_waiting += not caller.num_waiting
                caller.num_waiting += 1
            request.waiters.append(waiter)
            request.num_tokens += waiter.num_tokens
            self.num_tokens += waiter.num_tokens

    def _join(self, handle: RequestHandle) -> _Request[W]:
        request: _Request[W] = _Request(handle)
        self._requests[handle] = request
        caller = self._callers.get(handle.caller)
        if caller is None:
            caller = self._callers[handle.caller] = _Caller(handle.caller)
            self._order.join(caller)
        caller.requests.join(request)
        return request

    def peek(self, now: float) -> W | None:
        """Return the waiter to serve next, and drop earlier waiters that are no longer needed."""
        while self._order:
            caller = self._order.first()
            while caller.requests:
                request = caller.requests.first()
                if request.waiters and request.handle.wants(now):
                    return request.waiters[0]
                if request.waiters:
                    self._end_wait(caller)
                    self.num_tokens -= request.num_tokens
                caller.requests.leave()
                del self._requests[request.handle]
            self._order.leave()
            del self._callers[caller.name]
        return None

    def is_small(self, max_tokens: int) -> bool:
        """Return whether the next request is new, and has at most ``max_tokens`` tokens waiting."""
        request = self._order.first().requests.first()
        return not request.is_begun and request.num_tokens <= max_tokens

    def pop(self, num_tokens: int) -> W:
        """Remove and return the waiter that :meth:`peek` returned just before, at a price of ``num_tokens``."""
        caller = self._order.first()
        request = caller.requests.first()
        waiter = request.waiters.popleft()
        request.is_begun = True
        request.num_tokens -= waiter.num_tokens
        self.num_tokens -= waiter.num_tokens
        caller.requests.charge(num_tokens, caller.num_waiting)
        self._order.charge(num_tokens, self._num_waiting)
        if not request.waiters:
            self._end_wait(caller)
        return waiter

    def _end_wait(self, caller: _Caller[W]) -> None:
        caller.num_waiting -= 1
        self._num_waiting -= not caller.num_waiting


class Lanes(Generic[W]):
    """Two fair queues; the low-priority queue is served only while the other is empty.

    Not thread-safe: guard it with a lock.
    """

    def __init__(self) -> None:
        self.normal: FairQueue[W] = FairQueue()
        self.low: FairQueue[W] = FairQueue()

    def __bool__(self) -> bool:
        """Whether anything waits, even if it is no longer needed."""
        return bool(self.normal) or bool(self.low)

    @property
    def num_waiters(self) -> int:
        """How many are waiting, including those no longer needed."""
        return self.normal.num_waiters + self.low.num_waiters

    def add(self, waiters: Iterable[W]) -> None:
        """Queue waiters, each by the priority of its handle."""
        for waiter in waiters:
            lane = self.low if waiter.handle.priority is Priority.LOW else self.normal
            lane.add((waiter,))

    def pop(self, now: float) -> W | None:
        """Remove and return the next waiter, at the price of its tokens; ``None`` if no waiter is needed."""
        for lane in (self.normal, self.low):
            if (waiter := lane.peek(now)) is not None:
                return lane.pop(waiter.num_tokens)
        return None


def take(
    queue: FairQueue[Waiter],
    max_batch_tokens: int,
    now: float,
    max_shared_tokens: int | None = None,
    is_shared: bool = False,
) -> list[TokenSequence]:
    """Remove and return the next batch: sequences in fair order, up to ``max_batch_tokens`` tokens together.

    A waiter that alone exceeds the budget forms a separate batch. Waiters are dropped if their request has ended or is past
    its deadline, or if they have been computed for another request in the meantime. The result is empty if and only if
    nothing is left to compute.

    Args:
        max_shared_tokens: a request of at most this many tokens is small. A batch with a small request takes at most this
            many tokens of larger requests, because the small request waits until the whole batch is done.
        is_shared: whether to apply that limit to every batch, because a small request may arrive at any moment.
    """
    batch: list[TokenSequence] = []
    small: set[RequestHandle] = set()
    num_tokens = num_large_tokens = 0
    while (waiter := queue.peek(now)) is not None:
        sequence = waiter.sequence
        if sequence.is_taken:
            queue.pop(0)
            continue
        is_small = max_shared_tokens is not None and (waiter.handle in small or queue.is_small(max_shared_tokens))
        num_tokens += waiter.num_tokens
        num_large_tokens += 0 if is_small else waiter.num_tokens
        is_full = num_tokens > max_batch_tokens
        is_over_share = max_shared_tokens is not None and num_large_tokens > max_shared_tokens
        if batch and (is_full or (is_over_share and not is_small and (is_shared or small))):
            break
        queue.pop(waiter.num_tokens)
        sequence.is_taken = True
        batch.append(sequence)
        if is_small and waiter.handle not in small:
            small.add(waiter.handle)
            queue.num_small += 1
    return batch
