"""A card, its thread and its clients in simulated time: how long the card is idle, and how long a small request waits."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gateway.engine import batch_queue as queue_module
from gateway.engine import worker as worker_module
from gateway.engine.batch_queue import BatchQueue
from gateway.engine.model.items import Encoded, Item
from gateway.engine.scheduler import RequestHandle
from gateway.engine.worker import FinishedBatch, Worker
from tests.engine.scripted import NumberEncoder
from tests.engine.test_worker import no_fault, sequences, waiters

BATCH_TOKENS = 16_384


class Clock:
    """Time that passes only while something takes time; on the way, what was planned happens."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        end = self.now + max(0.0, seconds)
        while self._planned and self._planned[0][0] <= end:
            self.now, _, action = heapq.heappop(self._planned)
            action()
        self.now = end

    def plan(self, at: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._planned, (at, next(self._count), action))


@dataclass(frozen=True)
class Times:
    """How long the card takes for a full batch, and its thread to launch any batch and to read a full one."""

    card_s: float
    launch_s: float
    read_s: float


H100 = Times(0.0224, 0.0115, 0.001)
H100_SPARSE = Times(0.0224, 0.0115, 0.004)
H100_MULTIVECTOR = Times(0.0224, 0.0115, 0.012)
RTX_3090 = Times(0.190, 0.012, 0.001)
SLOW_HOST = Times(0.011, 0.0115, 0.001)


class SimulatedEncoder(NumberEncoder):
    """Computes in simulated time; a batch takes up to a few percent more or less than expected."""

    device = "cuda:0"

    def __init__(self, clock: Clock, times: Times, *, works_ahead: bool) -> None:
        super().__init__()
        self.works_ahead = works_ahead
        self._clock, self._times = clock, times
        self._free_at = 0.0
        self._random = random.Random(1)

    def begin(self, items: Sequence[Item]) -> Any:
        part = sum(item.num_tokens for item in items) / BATCH_TOKENS
        start = max(self._clock.now + 0.1 * self._times.launch_s, self._free_at)  # with the first of its kernels
        self._clock.sleep(self._times.launch_s)
        took = self._times.card_s * part * self._random.uniform(0.97, 1.03)
        self._free_at = max(start + took, self._clock.now)
        return Flight(self._clock, self._free_at, items, self._times.read_s * part)

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        flight: Flight = self.begin(items)
        flight.wait()
        return flight.read()


@dataclass
class Flight:
    clock: Clock
    end: float
    items: Sequence[Item]
    read_s: float

    @property
    def is_done(self) -> bool:
        return self.clock.now >= self.end

    def wait(self) -> None:
        self.clock.sleep(self.end - self.clock.now)

    def read(self) -> list[Encoded]:
        self.clock.sleep(self.read_s)
        return [Encoded(np.ones((1, 2), np.float32)) for _ in self.items]


@dataclass
class Outcome:
    """Milliseconds per full batch, and those that each small request waited."""

    batch_ms: float
    waits_ms: list[float] = field(default_factory=list)


def simulate(
    monkeypatch: pytest.MonkeyPatch, times: Times, *, works_ahead: bool, has_small: bool = False, seconds: float = 6.0
) -> Outcome:
    """Let one caller fill the queue with texts of 64 tokens, and another one send a small request now and then."""
    clock = Clock()
    for module in (worker_module, queue_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    queue = BatchQueue(BATCH_TOKENS)
    computed, waits = [0], list[float]()

    def deliver(batch: FinishedBatch) -> None:
        computed[0] += sum(one.item.num_tokens for one in batch.sequences)
        for sequence in batch.sequences:
            [waiter] = sequence.waiters
            if waiter.handle.caller == "small":
                waits.append(1e3 * (clock.now - waiter.queued_at))
        if queue.num_waiting < 4096:
            queue.add(waiters(sequences(range(4096), 64, RequestHandle("bulk", math.inf))))

    def add_small() -> None:
        [one] = sequences([1], 16, RequestHandle("small", math.inf))
        one.waiters[0].queued_at = clock.now
        queue.add(one.waiters)

    small = random.Random(2)
    at = 0.5
    while has_small and at < seconds:
        clock.plan(at, add_small)
        at += small.uniform(0.02, 0.06)
    clock.plan(seconds, queue.close)
    queue.add(waiters(sequences(range(4096), 64, RequestHandle("bulk", math.inf))))
    encoder = SimulatedEncoder(clock, times, works_ahead=works_ahead)
    worker = Worker("simulated", encoder, queue, deliver, no_fault)

    worker._run()

    return Outcome(1e3 * clock.now / (computed[0] / BATCH_TOKENS), waits)


@pytest.mark.parametrize(
    ("times", "without_ms", "with_ms"),
    [(H100, 24.5, 22.4), (H100_SPARSE, 27.5, 22.4), (H100_MULTIVECTOR, 35.5, 23.5), (RTX_3090, 192.0, 190.0)],
    ids=["dense", "sparse", "multi-vector", "slow card"],
)
def test_the_card_is_busy_all_the_time(
    monkeypatch: pytest.MonkeyPatch, times: Times, without_ms: float, with_ms: float
) -> None:
    without = simulate(monkeypatch, times, works_ahead=False)
    ahead = simulate(monkeypatch, times, works_ahead=True)

    assert without.batch_ms == pytest.approx(without_ms, rel=0.02)
    assert ahead.batch_ms < 1.02 * with_ms


@pytest.mark.parametrize("times", [H100, H100_MULTIVECTOR, RTX_3090, SLOW_HOST], ids=str)
def test_a_small_request_waits_no_longer(monkeypatch: pytest.MonkeyPatch, times: Times) -> None:
    without = simulate(monkeypatch, times, works_ahead=False, has_small=True)
    ahead = simulate(monkeypatch, times, works_ahead=True, has_small=True)

    assert len(without.waits_ms) > 100
    assert mean(ahead.waits_ms) < 1.03 * mean(without.waits_ms)
    assert np.percentile(ahead.waits_ms, 90) < 1.03 * np.percentile(without.waits_ms, 90)


def test_a_host_that_is_slower_than_the_card_delays_no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    without = simulate(monkeypatch, SLOW_HOST, works_ahead=False)
    ahead = simulate(monkeypatch, SLOW_HOST, works_ahead=True)

    assert ahead.batch_ms == pytest.approx(without.batch_ms, rel=0.01)
