"""The computing threads: one for each replica of a model, all fed from one queue."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf

import numpy as np
import structlog

from gateway.engine.faults import CardLost, is_card_lost, is_out_of_memory, release_memory
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Encoded, Item
from gateway.engine.scheduler import FairQueue, Lanes, TokenSequence, Waiter, take
from gateway.errors import InferenceFailed, InvalidVectors, OutOfMemory, RequestError
from gateway.telemetry import metrics
from gateway.types import Output

log = structlog.get_logger(__name__)

# Do not split fewer tokens than this between idle threads: the fixed cost of a forward is about as high.
_LEAST_SHARE_TOKENS = 64
# A batch should take no longer than this, because requests that arrive in the meantime wait for it.
_LONGEST_BATCH_S = 0.5
# No batch is made smaller than this: forwards of fewer tokens are clearly slower per token.
_FULL_FORWARD_TOKENS = 512
# While a small request waits, and for some time after the last one, large requests get only this fraction of a batch (one
# of so many parts), because the next small request must wait for the batch that runs when it arrives. Work of low priority
# never gets more, because requests wait for it no matter how rarely they come.
_SHARED_PART = 4
_SHARED_S = 1.0
# That part also takes no longer than this, if the rate is known. On two cores, MiniLM computes 640 tokens in 50 ms, at
# 95 % of its rate with full batches, and 1,600 in 125.
_LONGEST_SHARED_S = 0.05
# The pause after a fault in the code around the model, which may recur at once and fill the log.
_FAULT_PAUSE_S = 0.05
# How much the newest batch counts in the measured rate.
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
        """Wait for work and return a batch of it; an empty batch means that the queue is closed."""
        with self._changed:
            self._num_idle += 1
            try:
                while not self._is_closed:
                    now = time.monotonic()
                    if batch := take(self._pinned[replica], self._max_batch_tokens, now):
                        return batch
                    if batch := self._take(now):
                        if self._lanes:  # wake the next waiting thread: `add` woke only one
                            self._changed.notify()
                        return batch
                    self._changed.wait()
            finally:
                self._num_idle -= 1
        return []

    def _take(self, now: float) -> list[TokenSequence]:
        lane = self._lanes.normal
        num_small = lane.num_small
        part = self._largest_batch() // _SHARED_PART
        batch = take(lane, self._budget(lane), now, self._most_shared(part), now < self._shared_until)
        if lane.num_small != num_small:
            self._shared_until = now + _SHARED_S
        lane = self._lanes.low
        return batch or take(lane, min(self._budget(lane), max(_FULL_FORWARD_TOKENS, part)), now)

    def _most_shared(self, part: int) -> int:
        """Return the maximum number of large requests' tokens in a batch while small requests come."""
        if self._tokens_per_s is None:
            return part
        least = _FULL_FORWARD_TOKENS // _SHARED_PART
        return min(part, max(least, round(self._tokens_per_s * _LONGEST_SHARED_S)))

    def _budget(self, lane: FairQueue[Waiter]) -> int:
        """Return the number of tokens that one thread may take: at most its share if other threads are idle."""
        share = max(_LEAST_SHARE_TOKENS, ceil(lane.num_tokens / self._num_idle))
        return min(self._largest_batch(), share)

    def _largest_batch(self) -> int:
        """Return the token limit of a batch, which is lower than configured if newcomers would wait too long."""
        if self._tokens_per_s is None:
            return self._max_batch_tokens
        return min(self._max_batch_tokens, max(_FULL_FORWARD_TOKENS, round(self._tokens_per_s * _LONGEST_BATCH_S)))

    def note_rate(self, num_tokens: int, seconds: float) -> None:
        """Learn the speed of one thread from a batch; a small batch says little, because a forward has a fixed cost."""
        if num_tokens >= _FULL_FORWARD_TOKENS:
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
        """Whether the queue holds nothing any more."""
        with self._changed:
            return not self._lanes and not any(self._pinned.values())

    def clear(self) -> None:
        """Forget everything that is queued."""
        with self._changed:
            self._lanes = Lanes()
            self._pinned.clear()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    """A batch with a result for each of its sequences, and its times on ``time.monotonic()``.

    Attributes:
        num_padding: number of padding tokens that were computed in addition.
    """

    sequences: Sequence[TokenSequence]
    results: Sequence[Encoded | RequestError]
    started: float
    ended: float
    num_padding: int = 0


class Worker:
    """A thread that takes batches from the queue and computes them with one encoder.

    Args:
        deliver: called in the thread with each finished batch.
        on_fault: called in the thread when its own code, not the model, has failed, with the running batch, which is lost.
            Without a batch, the queue has failed, and its content may be lost.
        on_card_lost: called in the thread when its card can no longer compute, with the replica and the reason; the running
            batch is lost, and the thread ends.
        replica: index of the model's replica.
        warm_up: batches to compute first, in the thread.

    Attributes:
        thread: the computing thread, which runs from ``start`` until the queue is closed or the card is lost.
        is_retired: whether the worker takes no more batches.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        batch_queue: BatchQueue,
        deliver: Callable[[FinishedBatch], None],
        on_fault: Callable[[Sequence[TokenSequence]], None],
        replica: int = 0,
        on_card_lost: Callable[[int, str], None] = lambda _replica, _reason: None,
        warm_up: Sequence[Sequence[Item]] = (),
    ) -> None:
        self._model = name
        self._encoder = encoder
        self._batches = batch_queue
        self._deliver = deliver
        self._on_fault = on_fault
        self._on_card_lost = on_card_lost
        self._replica = replica
        self._warm_up = warm_up
        self.is_retired = False
        self.thread = threading.Thread(target=self._run, name=f"{name}-compute", daemon=True)
        self._forward_started: float | None = None
        self.in_hand: Sequence[TokenSequence] = ()
        self.num_failed_in_a_row = 0

    def start(self) -> None:
        self.thread.start()

    @property
    def busy_since(self) -> float | None:
        """When the current forward began, or last finished a part of its batch; ``None`` without a running forward."""
        started = self._forward_started  # the thread may clear it at any time
        return None if started is None else max(started, self._encoder.progressed_at)

    def _run(self) -> None:
        while True:
            try:
                self._compute_warm_up()
                while not self.is_retired and (batch := self._batches.next_batch(self._replica)):
                    self.in_hand = batch
                    self._deliver(self.compute(batch))
                    self.in_hand = ()
            except CardLost as error:
                self._on_card_lost(self._replica, str(error))
                return
            except BaseException:  # a fault of this code must not end the model: start again
                lost, self.in_hand = self.in_hand, ()
                self.num_failed_in_a_row += 1
                metrics.WORKER_FAULTS.labels(self._model).inc()
                log.exception("worker_failed", model=self._model, replica=self._replica, texts=len(lost))
                self._on_fault(lost)
                time.sleep(_FAULT_PAUSE_S)
            else:
                return

    def _compute_warm_up(self) -> None:
        """Compute the warm-up batches once; a failing batch does not matter, unless the card is lost."""
        batches, self._warm_up = self._warm_up, ()
        try:
            for batch in batches:
                self._forward_started = time.monotonic()
                self._encoder.encode(batch)
        except Exception as error:  # a forward may raise anything, and requests will show it again
            log.warning("warm_up_failed", model=self._model, replica=self._replica, error=repr(error))
            if is_card_lost(error, self._encoder.device):
                raise CardLost(str(error).partition("\n")[0]) from error
        finally:
            self._forward_started = None

    def compute(self, batch: list[TokenSequence]) -> FinishedBatch:
        """Compute a batch now, in the calling thread.

        Raises:
            CardLost: the card can no longer compute.
        """
        padding_before = self._encoder.num_padding
        started = time.monotonic()
        try:
            results = self._encode([sequence.item for sequence in batch])
        finally:
            self._forward_started = None
        ended = time.monotonic()
        has_result = False
        for sequence, result in zip(batch, results, strict=True):
            if isinstance(result, Encoded):
                has_result = True
                continue
            indices = [waiter.index for waiter in sequence.waiters]
            log.warning("text_failed", model=self._model, index=indices[:1], error=result.message)
            for waiter in sequence.waiters:  # now: the next batch is taken before the event loop learns of this
                waiter.handle.is_live = False
        if has_result:
            self._batches.note_rate(sum(one.item.num_tokens for one in batch), ended - started)
        num_padding = self._encoder.num_padding - padding_before
        finished = FinishedBatch(batch, results, started, ended, num_padding)
        self.num_failed_in_a_row = 0 if has_result else self.num_failed_in_a_row + 1
        return finished

    def _encode(self, items: Sequence[Item]) -> list[Encoded | RequestError]:
        """Encode items. After a failure, halve the batch and try again, until only the faulty text fails.

        Raises:
            CardLost: every further attempt would fail.
        """
        self._forward_started = time.monotonic()  # each half is progress
        try:
            encoded = self._compute(items)
            if len(encoded) != len(items):
                raise ValueError(f"{len(encoded)} results for {len(items)} texts")
        except BaseException as error:
            # The model's code may raise any error, and each of these callers must get an answer.
            is_lost = is_card_lost(error, self._encoder.device)
            is_memory = not is_lost and is_out_of_memory(error)
            reason = str(error).partition("\n")[0]
            metrics.FAILED_BATCHES.labels(self._model).inc()
            log.warning("batch_failed", model=self._model, texts=len(items), exc_info=not is_memory, error=repr(error))
        else:
            return [self._checked(item, one) for item, one in zip(items, encoded, strict=True)]
        if is_lost:
            raise CardLost(reason)
        if is_memory:  # only now, because the error's traceback held the forward's memory
            release_memory()
        if len(items) == 1:
            return [self._failure(items[0], is_memory=is_memory)]
        half = len(items) // 2
        return [*self._encode(items[:half]), *self._encode(items[half:])]

    def _compute(self, items: Sequence[Item]) -> list[Encoded]:
        """Encode items; repeat those that overflow float16 with products that accumulate in float32."""
        encoded = self._encoder.encode(items)
        if not self._encoder.accumulates_in_float16:
            return encoded
        bad = [i for i, one in enumerate(encoded) if not _is_finite(one)]
        if bad:
            metrics.RECOMPUTED_TEXTS.labels(self._model).inc(len(bad))
            for i, again in zip(bad, self._encoder.encode_exactly([items[i] for i in bad]), strict=True):
                encoded[i] = again
        return encoded

    def _checked(self, item: Item, encoded: Encoded) -> Encoded | RequestError:
        expected = (item.tokens.num_vectors, self._encoder.width)
        if encoded.dense.shape != expected:
            return _invalid(f"the model returned vectors of shape {encoded.dense.shape}, promised were {expected}")
        is_finite = np.isfinite(encoded.dense).all(axis=1)
        if not is_finite.all():
            chunk = "" if item.tokens.spans is None else f"input[{int(np.argmin(is_finite))}]: "
            return _invalid(f"{chunk}the model returned a vector that is not finite (NaN or infinity)")
        others = {
            Output.SPARSE: None if encoded.sparse is None else encoded.sparse.values,
            Output.MULTIVECTOR: encoded.multivector,
            Output.STATES: encoded.states,
        }
        for output, numbers in others.items():
            if numbers is not None and not np.isfinite(numbers).all():
                return _invalid(f"the model returned a {output} output that is not finite (NaN or infinity)")
        return encoded if item.scorer is None else self._scored(item.scorer, encoded)

    @staticmethod
    def _scored(scorer: Callable[..., float], encoded: Encoded) -> Encoded | RequestError:
        score = scorer(encoded.dense, encoded.sparse, encoded.multivector)
        if not np.isfinite(score):
            return _invalid("the score of its vectors is not finite (NaN or infinity)")
        return Encoded(np.array([[score]], np.float32))

    def _failure(self, item: Item, *, is_memory: bool) -> RequestError:
        if is_memory:
            return OutOfMemory(
                f"model {self._model!r} has too little memory for a text of {item.num_tokens} tokens; shorten it, or let "
                "the operator lower max_tokens",
                is_permanent=True,
            )
        return InferenceFailed(f"model {self._model!r} failed while it computed this request")


def _is_finite(encoded: Encoded) -> bool:
    sparse = None if encoded.sparse is None else encoded.sparse.values
    outputs = (encoded.dense, sparse, encoded.multivector, encoded.states)
    return all(bool(np.isfinite(numbers).all()) for numbers in outputs if numbers is not None)


def _invalid(message: str) -> InvalidVectors:
    return InvalidVectors(message, is_permanent=True)  # the same text would give the same vector
