"""The queue of a model: the event loop adds texts, and the computing threads take batches of them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from math import ceil, inf

from gateway.engine.scheduler import FairQueue, Lanes, TokenSequence, Waiter, take

FULL_FORWARD_TOKENS = 512
"""No limit makes a batch smaller than this, because forwards of fewer tokens are clearly slower per token."""

# Do not split fewer tokens than this between idle threads: the fixed cost of a forward is about as high.
_LEAST_SHARE_TOKENS = 64
# A batch should take no longer than this, because requests that arrive in the meantime wait for it.
_LONGEST_BATCH_S = 0.5
# While a small request waits, and for some time after the last one, large requests get only a fraction of a batch, 1 divided
# by this number, because the next small request must wait for the batch that runs when it arrives. Low-priority work never
# gets more, because any request that arrives while it runs must wait for it.
_SHARED_PART = 4
_SHARED_S = 1.0
# If the rate is known, that fraction also takes no longer than this. On two cores, MiniLM computes 640 tokens in 50 ms, at
# 95 % of its rate with full batches, and 1,600 tokens in 125 ms.
_LONGEST_SHARED_S = 0.05
# The weight of the newest batch in the measured rate.
_RATE_WEIGHT = 0.1


class BatchQueue:
    """The fair queue, shared between the event loop and the computing threads."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._lanes: Lanes[Waiter] = Lanes()
        self._pinned: defaultdict[int, FairQueue[Waiter]] = defaultdict(FairQueue)
        self._changed = threading.Condition()
        self._is_closed = False
        self._num_idle = 0  # threads that wait for a batch, or are about to get one
        self._tokens_per_s: float | None = None
        self._shared_until = -inf

    def add(self, waiters: Iterable[Waiter], replica: int | None = None) -> None:
        """Queue waiters for the first free thread, or for the thread of one replica."""
        with self._changed:
            if replica is None:
                self._lanes.add(waiters)
                self._changed.notify()
            else:
                self._pinned[replica].add(waiters)
                self._changed.notify_all()

    def next_batch(self, replica: int = 0) -> list[TokenSequence]:
        """Wait for texts and return a batch of them; an empty batch means that the queue is closed."""
        with self._changed:
            self._num_idle += 1
            try:
                while not self._is_closed:
                    now = time.monotonic()
                    if batch := self._take_pinned(replica, now):
                        return batch
                    if batch := self._take(now):
                        if self._lanes:  # wake the next waiting thread: `add` woke only one
                            self._changed.notify()
                        return batch
                    self._changed.wait()
            finally:
                self._num_idle -= 1
        return []

    def batch_ahead(self, replica: int = 0) -> list[TokenSequence]:
        """Return a batch to launch while the card still computes another one, without waiting for texts.

        Requests that arrive later must wait for this batch. So it is empty while small requests arrive, if only low-priority
        texts wait, and if an idle thread is about to take the waiting texts.
        """
        with self._changed:
            now = time.monotonic()
            if self._is_closed:
                return []
            if batch := self._take_pinned(replica, now):
                return batch
            if self._num_idle or now < self._shared_until:
                return []
            self._num_idle += 1
            try:
                return self._take_normal(now)
            finally:
                self._num_idle -= 1

    def _take_pinned(self, replica: int, now: float) -> list[TokenSequence]:
        return take(self._pinned[replica], self._max_batch_tokens, now)

    def _take(self, now: float) -> list[TokenSequence]:
        lane, part = self._lanes.low, self._largest_batch() // _SHARED_PART
        return self._take_normal(now) or take(lane, min(self._budget(lane), max(FULL_FORWARD_TOKENS, part)), now)

    def _take_normal(self, now: float) -> list[TokenSequence]:
        lane = self._lanes.normal
        num_small = lane.num_small
        part = self._largest_batch() // _SHARED_PART
        batch = take(lane, self._budget(lane), now, self._most_shared(part), now < self._shared_until)
        if lane.num_small != num_small:
            self._shared_until = now + _SHARED_S
        return batch

    def _most_shared(self, part: int) -> int:
        """Return the maximum number of large requests' tokens in a batch while small requests arrive."""
        if self._tokens_per_s is None:
            return part
        least = FULL_FORWARD_TOKENS // _SHARED_PART
        return min(part, max(least, round(self._tokens_per_s * _LONGEST_SHARED_S)))

    def _budget(self, lane: FairQueue[Waiter]) -> int:
        """Return the number of tokens that one thread may take: at most its share if other threads are idle."""
        share = max(_LEAST_SHARE_TOKENS, ceil(lane.num_tokens / self._num_idle))
        return min(self._largest_batch(), share)

    def _largest_batch(self) -> int:
        """Return the token limit of a batch, which is lower than configured if newcomers would wait too long."""
        if self._tokens_per_s is None:
            return self._max_batch_tokens
        return min(self._max_batch_tokens, max(FULL_FORWARD_TOKENS, round(self._tokens_per_s * _LONGEST_BATCH_S)))

    def note_rate(self, num_tokens: int, seconds: float) -> None:
        """Learn the speed of one thread from a batch. Ignore small batches, because a forward has a fixed cost."""
        if num_tokens >= FULL_FORWARD_TOKENS:
            rate = num_tokens / max(seconds, 1e-6)
            with self._changed:
                self._tokens_per_s = rate + (1 - _RATE_WEIGHT) * ((self._tokens_per_s or rate) - rate)

    @property
    def num_waiting(self) -> int:
        """The number of texts that wait for a thread, including texts that are no longer needed."""
        with self._changed:
            return self._lanes.num_waiters + sum(queue.num_waiters for queue in self._pinned.values())

    @property
    def is_empty(self) -> bool:
        """Whether no text is queued."""
        with self._changed:
            return not self._lanes and not any(self._pinned.values())

    def clear(self) -> None:
        """Drop everything that is queued."""
        with self._changed:
            self._lanes = Lanes()
            self._pinned.clear()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
