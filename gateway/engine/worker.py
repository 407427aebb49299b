"""The computing threads: one for each replica of a model, all fed from one queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import structlog

from gateway.engine.devices import is_out_of_memory, release_memory
from gateway.engine.encoders.base import Encoder
from gateway.engine.items import Encoded, Item
from gateway.engine.scheduler import Computation, Entry, FairQueue, take
from gateway.errors import InferenceFailed, InvalidVectors, OutOfMemory, RequestError
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

# Less than this is not shared out between idle threads: a forward costs about as much before it has computed anything.
_LEAST_SHARE_TOKENS = 64


class Inbox:
    """The fair queue, shared between the event loop and the computing threads."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._queue: FairQueue[Entry] = FairQueue()
        self._changed = threading.Condition()
        self._is_closed = False
        self._num_idle = 0  # threads that wait for a batch, or are about to be given one

    def add(self, entries: Iterable[Entry]) -> None:
        with self._changed:
            self._queue.add(entries)
            self._changed.notify()

    def next_batch(self) -> list[Computation]:
        """Wait for work and return a batch of it; an empty batch means that the inbox is closed."""
        with self._changed:
            self._num_idle += 1
            try:
                while not self._is_closed:
                    if batch := take(self._queue, self._budget(), time.monotonic()):
                        if self._queue:  # for the next thread that waits: `add` has woken one alone
                            self._changed.notify()
                        return batch
                    self._changed.wait()
            finally:
                self._num_idle -= 1
        return []

    def _budget(self) -> int:
        """Return how many tokens one thread may take: no more than its share when others are idle as well."""
        share = max(_LEAST_SHARE_TOKENS, ceil(self._queue.num_tokens / self._num_idle))
        return min(self._max_batch_tokens, share)

    def clear(self) -> None:
        """Forget everything that is queued."""
        with self._changed:
            self._queue = FairQueue()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    """A batch with a result for each of its computations, and when it ran (``time.monotonic()``).

    Attributes:
        num_padding: tokens that were computed beside its own.
    """

    computations: Sequence[Computation]
    results: Sequence[Encoded | RequestError]
    started: float
    ended: float
    num_padding: int = 0


class Worker:
    """A thread that takes batches from the inbox and computes them with one encoder.

    Args:
        deliver: called in the thread with each finished batch.
        on_fault: called in the thread when its own code, not the model, has failed; the batch in hand is lost.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        inbox: Inbox,
        deliver: Callable[[FinishedBatch], None],
        on_fault: Callable[[], None],
    ) -> None:
        self._model = name
        self._encoder = encoder
        self._inbox = inbox
        self._deliver = deliver
        self._on_fault = on_fault
        self._thread = threading.Thread(target=self._run, name=f"{name}-compute", daemon=True)
        self._started: float | None = None
        self.num_failed_in_a_row = 0

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end, and tell whether it did."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def busy_s(self, now: float) -> float:
        """Return how long the batch in hand has been running, 0 if there is none."""
        started = self._started  # the thread may clear it at any time
        return 0.0 if started is None else now - started

    def _run(self) -> None:
        while True:
            try:
                while batch := self._inbox.next_batch():
                    self._deliver(self._compute(batch))
            except BaseException:  # a fault of our own, which must not be the end of the model: begin anew
                self._on_fault()
                log.exception("worker_failed", model=self._model)
            else:
                return

    def _compute(self, batch: list[Computation]) -> FinishedBatch:
        padding_before = self._encoder.num_padding
        started = self._started = time.monotonic()
        try:
            results = self._encode([computation.item for computation in batch])
        finally:
            self._started = None
        has_result = False
        for computation, result in zip(batch, results, strict=True):
            if isinstance(result, Encoded):
                has_result = True
                continue
            for entry in computation.entries:  # now: the next batch is taken before the event loop hears of this
                entry.ticket.is_live = False
        self.num_failed_in_a_row = 0 if has_result else self.num_failed_in_a_row + 1
        num_padding = self._encoder.num_padding - padding_before
        return FinishedBatch(batch, results, started, time.monotonic(), num_padding)

    def _encode(self, items: Sequence[Item]) -> list[Encoded | RequestError]:
        """Encode items. When that fails, halve the batch and try again, until only the guilty text is left to fail."""
        try:
            encoded = self._encoder.encode(items)
            if len(encoded) != len(items):
                raise ValueError(f"{len(encoded)} results for {len(items)} texts")
        except (
            BaseException
        ) as error:  # the model's code may raise anything, and each of these callers must get an answer
            is_memory = is_out_of_memory(error)
            metrics.FAILED_BATCHES.labels(self._model).inc()
            log.warning("batch_failed", model=self._model, texts=len(items), exc_info=not is_memory, error=repr(error))
        else:
            return [self._checked(item, one) for item, one in zip(items, encoded, strict=True)]
        if is_memory:  # only now: the error's traceback held what the forward had allocated
            release_memory()
        if len(items) == 1:
            return [self._failure(items[0], is_memory=is_memory)]
        half = len(items) // 2
        return [*self._encode(items[:half]), *self._encode(items[half:])]

    def _checked(self, item: Item, encoded: Encoded) -> Encoded | RequestError:
        expected = (item.tokens.num_vectors, self._encoder.width)
        if encoded.dense.shape != expected:
            return InvalidVectors(
                f"the model returned vectors of shape {encoded.dense.shape}, promised were {expected}"
            )
        if not np.isfinite(encoded.dense).all():
            return InvalidVectors("the model returned a vector that is not finite (NaN or infinity)")
        return encoded

    def _failure(self, item: Item, *, is_memory: bool) -> RequestError:
        if is_memory:
            return OutOfMemory(
                f"model {self._model!r} has too little memory for a text of {item.num_tokens} tokens; shorten it, or let "
                "the operator lower max_tokens",
                is_permanent=True,
            )
        return InferenceFailed(f"model {self._model!r} failed while it computed this request")
