"""The computing threads: one for each replica of a model, all fed from one queue."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import structlog

from gateway.engine.ahead import Failure, Launched, Pace
from gateway.engine.batch_queue import FULL_FORWARD_TOKENS, BatchQueue
from gateway.engine.checks import checked, is_finite
from gateway.engine.faults import CardLost, is_card_lost, is_out_of_memory, release_memory
from gateway.engine.model.encoder import Encoder, effort
from gateway.engine.model.items import Encoded, Item
from gateway.engine.scheduler import TokenSequence
from gateway.errors import InferenceFailed, OutOfMemory, RequestError
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

# The pause after a fault in the code around the model, which may recur at once and fill the log.
_FAULT_PAUSE_S = 0.05
# While a card computes, its thread checks this often whether the card is done, and whether texts wait.
_LOOK_S = 0.001


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    """A batch with a result for each of its sequences, and its times on ``time.monotonic()``.

    Attributes:
        started: when the device could begin it: at the launch, or when it finished the previous batch.
        ended: when its results had been read.
        device_s: how long the device computed it, in seconds.
        num_padding: number of padding tokens that were computed in addition.
    """

    sequences: Sequence[TokenSequence]
    results: Sequence[Encoded | RequestError]
    started: float
    ended: float
    device_s: float
    num_padding: int = 0


class Worker:
    """A thread that takes batches from the queue and computes them with one encoder.

    With an encoder that works ahead, the thread launches a batch while the card still computes the previous one.

    Args:
        deliver: called in the thread with each finished batch.
        on_fault: called in the thread when its own code, not the model, has failed, with the sequences in hand, which are
            lost. If the list is empty, the queue has failed, and texts in it may be lost.
        on_card_lost: called in the thread when its card can no longer compute, with the replica and the reason; the
            sequences in hand are lost, and the thread ends.
        replica: index of the model's replica.
        warm_up: batches to compute first, in the thread.

    Attributes:
        thread: the computing thread, which runs from ``start`` until the queue is closed or the card is lost.
        in_hand: the sequences that the thread has taken and not delivered, of one batch or of two.
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
        self._pace = Pace()
        self._done_at = -inf  # when the card was done with the last batch
        self.in_hand: Sequence[TokenSequence] = ()
        self.num_failed_in_a_row = 0

    def start(self) -> None:
        self.thread.start()

    @property
    def busy_since(self) -> float | None:
        """When the current forward began, or last finished a part of its batch; ``None`` while no forward runs."""
        started = self._forward_started  # the thread may clear it at any time
        if started is None or self._encoder.works_ahead:  # then parts are only launched, and show no progress
            return started
        return max(started, self._encoder.progressed_at)

    @property
    def expected_s(self) -> float:
        """Seconds that the batch in hand should take on a CPU, at the speed of the last one; 0 if nothing is known."""
        return self._encoder.s_per_token * effort([sequence.item.num_tokens for sequence in self.in_hand])

    def _run(self) -> None:
        while True:
            try:
                self._compute_warm_up()
                (self._work_ahead if self._encoder.works_ahead else self._work)()
            except CardLost as error:
                self._on_card_lost(self._replica, str(error))
                return
            except BaseException:  # a bug in this code must not end the model: start again
                lost, self.in_hand = self.in_hand, ()
                self._report_fault(lost)
            else:
                return

    def _report_fault(self, lost: Sequence[TokenSequence]) -> None:
        """Log, count and report the exception that is being handled, and pause."""
        self.num_failed_in_a_row += 1
        metrics.WORKER_FAULTS.labels(self._model).inc()
        log.exception("worker_failed", model=self._model, replica=self._replica, texts=len(lost))
        self._on_fault(lost)
        time.sleep(_FAULT_PAUSE_S)

    def _compute_warm_up(self) -> None:
        """Compute the warm-up batches once; a failing batch does not matter, unless the card is lost."""
        batches, self._warm_up = self._warm_up, ()
        try:
            for batch in batches:
                self._forward_started = time.monotonic()
                self._encoder.encode(batch)
        except Exception as error:  # a forward may raise anything; if the fault persists, requests will fail too
            log.warning("warm_up_failed", model=self._model, replica=self._replica, error=repr(error))
            if is_card_lost(error, self._encoder.device):
                raise CardLost(str(error).partition("\n")[0]) from error
        finally:
            self._forward_started = None

    def _work(self) -> None:
        """Compute one batch after the other, until there are no more."""
        while not self.is_retired and (batch := self._batches.next_batch(self._replica)):
            self.in_hand = batch
            self._deliver(self.compute(batch))
            self.in_hand = ()

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
        num_padding = self._encoder.num_padding - padding_before
        return self._record(FinishedBatch(batch, results, started, ended, ended - started, num_padding))

    def _record(self, finished: FinishedBatch) -> FinishedBatch:
        """Learn the rate from a batch, mark the requests of its failed texts as ended, and count failed batches in a row."""
        has_result = False
        for sequence, result in zip(finished.sequences, finished.results, strict=True):
            if isinstance(result, Encoded):
                has_result = True
                continue
            indices = [waiter.index for waiter in sequence.waiters]
            log.warning("text_failed", model=self._model, index=indices[:1], error=result.message)
            for waiter in sequence.waiters:  # now: the next batch is taken before the event loop learns of this
                waiter.handle.is_live = False
        if has_result:
            num_tokens = sum(sequence.item.num_tokens for sequence in finished.sequences)
            self._batches.note_rate(num_tokens, finished.device_s)
        self.num_failed_in_a_row = 0 if has_result else self.num_failed_in_a_row + 1
        return finished

    # -------------------------------------------------------------------------------------------------- working ahead

    def _work_ahead(self) -> None:
        """Like :meth:`_work`, but launch the next batch while the card still computes the previous one."""
        on_card: deque[Launched] = deque()
        try:
            while self._step(on_card):
                pass
        finally:
            self._forward_started = None

    def _step(self, on_card: deque[Launched]) -> bool:
        """Launch a batch or finish one, and return ``False`` at the end.

        Args:
            on_card: the launched batches, at most two.
        """
        if batch := self._next(on_card):
            self.in_hand = [*self.in_hand, *batch]
            on_card.append(self._launch(batch, is_behind=bool(on_card)))
            return True
        if not on_card:
            return False
        oldest = on_card.popleft()
        self._receive(oldest, is_followed=bool(on_card))
        if oldest.failure is not None and any(other.failure is None for other in on_card):
            # A new attempt would wait for the other batch anyway, and has more memory without it.
            on_card.append(oldest)
            self._forward_started = time.monotonic()
            return True
        self._deliver(self._finish(oldest))
        self.in_hand = [sequence for other in on_card for sequence in other.sequences]
        if not on_card:
            self._forward_started = None
        return True

    def _next(self, on_card: Sequence[Launched]) -> list[TokenSequence]:
        """Return a batch to launch; it is empty when the first of the launched batches must be finished, or at the end."""
        if not on_card:
            return [] if self.is_retired else self._batches.next_batch(self._replica)
        if len(on_card) > 1 or on_card[0].failure is not None:
            return []
        running = on_card[0]
        window = self._pace.window(running.num_tokens, max(running.started, self._done_at))
        while window is not None and not self.is_retired and not running.is_done:
            now = time.monotonic()
            if now >= window.end - _LOOK_S:
                break
            if window.first <= now <= window.last and (batch := self._batch_ahead()):
                return batch
            time.sleep(min(_LOOK_S, window.first - now) if now < window.first else _LOOK_S)
        return []

    def _batch_ahead(self) -> list[TokenSequence]:
        try:
            return self._batches.batch_ahead(self._replica)
        except Exception:  # the queue has failed, but the batch on the card is not lost
            self._report_fault(())
            return []

    def _launch(self, batch: list[TokenSequence], *, is_behind: bool) -> Launched:
        """Launch a batch, or record the failure.

        Args:
            is_behind: whether the card still computes another batch.

        Raises:
            CardLost: the card can no longer compute.
        """
        padding_before = self._encoder.num_padding
        launched = Launched(batch, time.monotonic())
        if not is_behind:
            self._forward_started = launched.started
        try:
            launched.in_flight = self._encoder.begin(launched.items)
        except BaseException as error:  # as in _encode
            launched.failure = self._record_failure(len(batch), error)
        launched.was_crowded = is_behind
        launched.launch_s = time.monotonic() - launched.started
        launched.num_padding = self._encoder.num_padding - padding_before
        _raise_if_lost(launched.failure)
        return launched

    def _receive(self, batch: Launched, *, is_followed: bool) -> None:
        """Wait for a batch and read its results, or record the failure.

        Args:
            is_followed: whether another batch was launched behind it.

        Raises:
            CardLost: the card can no longer compute.
        """
        if batch.in_flight is None or batch.failure is not None:
            return
        padding_before = self._encoder.num_padding
        try:
            batch.in_flight.wait()
            batch.begun = max(batch.started, self._done_at)
            batch.done = self._done_at = time.monotonic()
            if is_followed:
                self._forward_started = batch.done  # the card begins the next batch, which is progress
            batch.encoded = self._recompute_overflows(batch.items, batch.in_flight.read())
        except BaseException as error:  # as in _encode
            batch.failure = self._record_failure(len(batch.sequences), error)
            batch.was_crowded = is_followed
        batch.in_flight = None
        batch.num_padding += self._encoder.num_padding - padding_before
        _raise_if_lost(batch.failure)

    def _finish(self, batch: Launched) -> FinishedBatch:
        """Return the results of a batch that was received; if it failed, compute it again, now that the card is free.

        Raises:
            CardLost: the card can no longer compute.
        """
        if batch.failure is None:
            results = [
                checked(item, encoded, self._encoder.width)
                for item, encoded in zip(batch.items, batch.encoded, strict=True)
            ]
            ended, device_s = time.monotonic(), batch.done - batch.begun
            if batch.num_tokens >= FULL_FORWARD_TOKENS:
                read_s = ended - batch.done
                self._pace.note(batch.num_tokens, launch_s=batch.launch_s, device_s=device_s, read_s=read_s)
            return self._record(
                FinishedBatch(batch.sequences, results, batch.begun, ended, device_s, batch.num_padding)
            )
        padding_before = self._encoder.num_padding
        started = time.monotonic()
        if batch.failure.is_memory and batch.was_crowded:
            release_memory()
            results = self._encode(batch.items)
        else:
            results = self._halves(batch.items, batch.failure)
        ended = self._done_at = time.monotonic()
        num_padding = batch.num_padding + self._encoder.num_padding - padding_before
        return self._record(FinishedBatch(batch.sequences, results, batch.started, ended, ended - started, num_padding))

    # ------------------------------------------------------------------------------------------------------- encoding

    def _encode(self, items: Sequence[Item]) -> list[Encoded | RequestError]:
        """Encode items. After a failure, halve the batch and try again, until only the text that causes it fails.

        Raises:
            CardLost: every further attempt would fail.
        """
        self._forward_started = time.monotonic()  # each half is progress
        try:
            encoded = self._recompute_overflows(items, self._encoder.encode(items))
        except BaseException as error:
            # The model's code may raise any error, and each of these callers must get an answer.
            failure = self._record_failure(len(items), error)
        else:
            return [checked(item, result, self._encoder.width) for item, result in zip(items, encoded, strict=True)]
        return self._halves(items, failure)

    def _halves(self, items: Sequence[Item], failure: Failure) -> list[Encoded | RequestError]:
        """Encode both halves of items that failed together; a single item is not tried again."""
        _raise_if_lost(failure)
        if failure.is_memory:  # only now, because the error's traceback held the forward's memory
            release_memory()
        if len(items) == 1:
            return [self._error_for(items[0], is_memory=failure.is_memory)]
        half = len(items) // 2
        return [*self._encode(items[:half]), *self._encode(items[half:])]

    def _record_failure(self, num_texts: int, error: BaseException) -> Failure:
        """Log and count a failed attempt."""
        is_lost = is_card_lost(error, self._encoder.device)
        is_memory = not is_lost and is_out_of_memory(error)
        metrics.FAILED_BATCHES.labels(self._model).inc()
        log.warning("batch_failed", model=self._model, texts=num_texts, exc_info=not is_memory, error=repr(error))
        return Failure(is_lost, is_memory, str(error).partition("\n")[0])

    def _recompute_overflows(self, items: Sequence[Item], encoded: list[Encoded]) -> list[Encoded]:
        """Return the results of items, after computing those that overflowed float16 again with float32 accumulation.

        Raises:
            ValueError: the model gave more or fewer results than items.
        """
        if len(encoded) != len(items):
            raise ValueError(f"{len(encoded)} results for {len(items)} texts")
        if not self._encoder.accumulates_in_float16:
            return encoded
        bad = [i for i, result in enumerate(encoded) if not is_finite(result)]
        if bad:
            metrics.RECOMPUTED_TEXTS.labels(self._model).inc(len(bad))
            for i, result in zip(bad, self._encoder.encode_exactly([items[i] for i in bad]), strict=True):
                encoded[i] = result
        return encoded

    def _error_for(self, item: Item, *, is_memory: bool) -> RequestError:
        if is_memory:
            return OutOfMemory(
                f"model {self._model!r} has too little memory for a text of {item.num_tokens} tokens; shorten it, or let "
                "the operator lower max_tokens",
                is_permanent=True,
            )
        return InferenceFailed(f"model {self._model!r} failed while it computed this request")


def _raise_if_lost(failure: Failure | None) -> None:
    if failure is not None and failure.is_lost:
        raise CardLost(failure.reason)
