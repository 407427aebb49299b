"""A simulation of requests that fronts spread over replicas, event by event.

A front knows only the requests that it has sent itself, as a front of the gateway does. A replica takes all requests that
wait, up to a limit, as one batch; the time of a batch depends on its size.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Policy: TypeAlias = Literal["random", "two", "of 64", "least", "one queue"]
"""How a front chooses a replica.

``random``: any. ``two``: of two at random, the one with fewer of its unanswered requests. ``of 64``: likewise of 64.
``least``: likewise of all, and any of equal ones. ``one queue``: not at all; replicas take from one queue, as the theory of
queues has it.
"""
Times: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class System:
    """The simulated system.

    Attributes:
        batch_s: the seconds that a batch of so many requests takes; called with 1 to ``max_batch``.
    """

    replicas: int
    batch_s: Callable[[int], float]
    max_batch: int = 1
    fronts: int = 1
    policy: Policy = "least"

    @property
    def capacity(self) -> float:
        """Requests per second of all replicas with full batches."""
        return self.replicas * self.max_batch / self.batch_s(self.max_batch)


def poisson(rate: float, count: int, rng: np.random.Generator) -> Times:
    """Return the times of arrivals that are independent of each other, in order."""
    return np.cumsum(rng.exponential(1 / rate, count))


def bursts(rate: float, count: int, rng: np.random.Generator, mean_size: float = 10.0) -> Times:
    """Return the times of arrivals in bursts: independent of each other, of geometric size, each at one moment."""
    sizes = rng.geometric(1 / mean_size, count)
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), count)) + 1]
    return np.repeat(poisson(rate / mean_size, len(sizes), rng), sizes)[:count]


def simulate(system: System, arrivals: Times, rng: np.random.Generator) -> Times:
    """Return the seconds from the arrival of each request to its answer."""
    return _Run(system, rng).run(arrivals)


class _Counts:
    """The numbers of unanswered requests that one front has sent to each replica, grouped by it."""

    def __init__(self, replicas: int, rng: _Uniform) -> None:
        self._rng = rng
        self.of = [0] * replicas
        self._with: list[list[int]] = [list(range(replicas))]
        self._place = list(range(replicas))
        self._least = 0

    def least(self) -> int:
        """Return a replica with the fewest, at random among equal ones."""
        candidates = self._with[self._least]
        return candidates[self._rng.below(len(candidates))]

    def add(self, replica: int, change: int) -> None:
        """Count a request more or less."""
        count = self.of[replica]
        group, place = self._with[count], self._place[replica]
        last = group.pop()
        if last != replica:
            group[place], self._place[last] = last, place
        count += change
        self.of[replica] = count
        if count == len(self._with):
            self._with.append([])
        self._place[replica] = len(self._with[count])
        self._with[count].append(replica)
        if count < self._least:
            self._least = count
        else:
            while not self._with[self._least]:
                self._least += 1


class _Uniform:
    """Random whole numbers, drawn in blocks: one at a time takes numpy longer than all the rest of an event."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._block: list[float] = []

    def below(self, limit: int) -> int:
        """Return a number from 0 to ``limit - 1``."""
        if not self._block:
            self._block = self._rng.random(65_536).tolist()
        return int(self._block.pop() * limit)


@dataclass(slots=True)
class _Replica:
    waiting: deque[tuple[float, int, int]] = field(default_factory=deque)
    running: Sequence[tuple[float, int, int]] = ()


class _Run:
    """One simulation. A request is its time of arrival, its number and its front."""

    def __init__(self, system: System, rng: np.random.Generator) -> None:
        self._system = system
        self._rng = _Uniform(rng)
        replicas = [_Replica() for _ in range(system.replicas)]
        if system.policy == "one queue":
            for replica in replicas:
                replica.waiting = replicas[0].waiting
        self._replicas = replicas
        self._counts = [_Counts(system.replicas, self._rng) for _ in range(system.fronts)]
        self._is_counting = system.policy in ("two", "of 64", "least")
        self._idle = set(range(system.replicas))  # only used with one queue
        self._ends: list[tuple[float, int]] = []
        self._seconds: Times = np.zeros(0)

    def run(self, arrivals: Times) -> Times:
        self._seconds = np.zeros(len(arrivals))
        ends, num_fronts = self._ends, self._system.fronts
        for number, now in enumerate(arrivals.tolist()):
            while ends and ends[0][0] <= now:
                self._end(*heapq.heappop(ends))
            front = self._rng.below(num_fronts) if num_fronts > 1 else 0
            replica = self._choose(front)
            if self._is_counting:
                self._counts[front].add(replica, 1)
            self._replicas[replica].waiting.append((now, number, front))
            if not self._replicas[replica].running:
                self._begin(replica, now)
        while ends:
            self._end(*heapq.heappop(ends))
        return self._seconds

    def _choose(self, front: int) -> int:
        system, counts = self._system, self._counts[front]
        match system.policy:
            case "least":
                return counts.least()
            case "two":
                one, other = self._rng.below(system.replicas), self._rng.below(system.replicas)
                return one if counts.of[one] <= counts.of[other] else other
            case "of 64":
                some = [self._rng.below(system.replicas) for _ in range(64)]
                return min(some, key=counts.of.__getitem__)
            case "one queue":
                return next(iter(self._idle), 0)
            case _:
                return self._rng.below(system.replicas)

    def _begin(self, number: int, now: float) -> None:
        replica = self._replicas[number]
        size = min(len(replica.waiting), self._system.max_batch)
        replica.running = [replica.waiting.popleft() for _ in range(size)]
        self._idle.discard(number)
        heapq.heappush(self._ends, (now + self._system.batch_s(size), number))

    def _end(self, now: float, number: int) -> None:
        replica = self._replicas[number]
        for arrived, request, front in replica.running:
            self._seconds[request] = now - arrived
            if self._is_counting:
                self._counts[front].add(number, -1)
        replica.running = ()
        self._idle.add(number)
        if replica.waiting:
            self._begin(number, now)
