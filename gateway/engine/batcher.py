"""Bring requests and computing threads together: admission, tokenizing, waiting, and an answer for each request.

Replaces Infinity's ``BatchHandler``. ``BatchHandler`` passes a batch through five queues and four threads that poll and
sleep (5 ms per step, so a single short text takes three times as long as its forward), tokenizes every text twice, and
never recovers from an exception in one of its threads: the futures of that batch, and of every later one, are never
resolved (michaelfeil/infinity #242, #483, #544). Here a free thread takes the queued texts, without a timer. Every request
in a batch gets an answer, even if the forward fails.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from array import array
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import structlog

from gateway.engine.admission import Admission
from gateway.engine.batch_queue import BatchQueue
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Encoded, Item, Tokens
from gateway.engine.model.tokenizer import Steps, slices
from gateway.engine.pending import PendingRequest
from gateway.engine.scheduler import RequestHandle, TokenSequence, Waiter
from gateway.engine.timeline import Stage
from gateway.engine.tokenizer_pool import TokenizerPool
from gateway.engine.worker import FinishedBatch, Worker
from gateway.errors import DeadlineExceeded, InferenceFailed, ModelRecovering, RequestError, ShuttingDown
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, Priority, Truncate

log = structlog.get_logger(__name__)

# The seconds that a stop waits for the running batch.
_STOP_S = 10.0
# The seconds until clients may retry after a card was lost: the process ends, restarts, and loads its models.
_RESTART_S = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one model: tokens in a batch, texts and (estimated) tokens that may wait."""

    max_batch_tokens: int
    max_queue_texts: int
    max_queue_tokens: int


class SequenceStats(NamedTuple):
    """The sequences that a batcher has in flight; identical texts share one."""

    num_sequences: int
    num_waiters: int


class Batcher:
    """Batches the texts of all requests for one model.

    Everything except the work of the threads happens on the event loop in which the batcher is created.

    Args:
        encoders: the replicas of the model, one for each device; they share one queue.
        warm_ups: batches that the thread of each replica computes before its first request.

    Attributes:
        lost: the replicas whose cards can no longer compute, with the reason.
    """

    def __init__(
        self,
        model: str,
        encoders: Sequence[Encoder],
        limits: Limits,
        warm_ups: Sequence[Sequence[Sequence[Item]]] = (),
    ) -> None:
        self._model = model
        self._encoder = encoders[0]
        self._limits = limits
        self._pending: dict[RequestHandle, PendingRequest] = {}  # by the objects that waiters have
        self._sequences: dict[Hashable, TokenSequence] = {}
        self._admission = Admission(
            model, limits.max_queue_texts, limits.max_queue_tokens, self._encoder.tokenizer.max_tokens
        )
        self._refusal: Callable[[], RequestError] | None = None
        self.lost: dict[int, str] = {}
        self._loop = asyncio.get_running_loop()
        self._tokenizers = TokenizerPool(model, self._loop)
        self._batches = BatchQueue(limits.max_batch_tokens)
        self._workers = [
            Worker(model, encoder, self._batches, self._finished, self._faulted, replica, self._card_lost, warm_up)
            for replica, (encoder, warm_up) in enumerate(zip(encoders, warm_ups or [()] * len(encoders), strict=True))
        ]

    # ---------------------------------------------------------------------------------------------- one request

    async def submit(self, job: EmbedJob, replica: int | None = None) -> Embeddings:
        """Embed the texts of a job, and return when the last vector is done.

        If the caller is canceled, its queued texts are dropped.

        Args:
            replica: the replica that must compute the job, before anything else; ``None`` for the first free replica.

        Raises:
            Overloaded: too many texts or tokens are already waiting.
            ContextLengthExceeded: a text is too long, and the job asks to refuse such texts.
            BadInput: together, the texts have more tokens than the job allows.
            DeadlineExceeded: the job's deadline passed first.
            InternalError: the forward failed on one of the texts, or gave vectors that cannot be used.
            ModelNotReady: the batcher is stopping, or was given up.
        """
        if self._refusal is not None:
            raise self._refusal()
        with self._admission.admit(job):
            return await self._finish(job, replica)

    async def _finish(self, job: EmbedJob, replica: int | None) -> Embeddings:
        """Queue a job, wait until its request is done or has failed, and return its result or raise its error."""
        pending = PendingRequest(
            job.caller,
            job.deadline,
            priority=job.priority,
            done=self._loop.create_future(),
            num_missing=min(1, len(job.texts)) if job.is_late_chunked else len(job.texts),
            text_name=job.text_name if job.query is None else "documents",
        )
        self._pending[pending] = pending
        if not job.texts:
            pending.end()
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                await self._enqueue(job, pending, replica)
                await pending.done
        except TimeoutError:
            is_low = job.priority is Priority.LOW
            why = ", because low-priority requests wait while others take all of the model's time" if is_low else ""
            raise DeadlineExceeded(
                f"the request did not finish within its time limit: {pending.num_missing} of {len(job.texts)} texts "
                f"were still waiting{why}"
            ) from None
        else:
            if pending.error is not None:
                raise pending.error
            return pending.embeddings(job.outputs, self._encoder.width)
        finally:
            self._forget(pending)

    def _forget(self, pending: PendingRequest) -> None:
        """Drop the data of a request that has ended."""
        pending.is_live = False
        del self._pending[pending]
        for sequence in pending.sequences:  # empty unless the request ended early
            sequence.waiters = [waiter for waiter in sequence.waiters if waiter.handle is not pending]
            if not sequence.waiters and not sequence.is_taken:
                self._sequences.pop(sequence.key, None)
        pending.release()

    # ------------------------------------------------------------------------------------------------ tokenizing

    async def _enqueue(self, job: EmbedJob, pending: PendingRequest, replica: int | None) -> None:
        """Tokenize in slices, and queue each slice immediately: the device starts while the rest is tokenized."""
        waiters: list[Waiter] = []
        query = None
        if job.query is not None:
            query = await self._read(pending, self._encoder.read_query(job.query))
        for first, texts in [(0, job.texts)] if job.is_late_chunked else slices(job.texts):
            tokens: list[Tokens] = await self._read(pending, self._encoder.read(job, first, texts, query))
            now = time.monotonic()
            pending.tokens += tokens
            pending.num_tokens += sum(len(row.ids) for row in tokens)
            job.check_total(pending.num_tokens)
            for i, row in enumerate(tokens):
                sequence = self._join(TokenSequence(Item(row, job.task, job.outputs, job.scorer), replica=replica))
                waiter = Waiter(pending, first + i, sequence, now)
                sequence.waiters.append(waiter)
                pending.sequences.add(sequence)
                if not sequence.is_taken:
                    waiters.append(waiter)
            is_last = first + len(texts) == len(job.texts)
            if is_last or job.truncate is not Truncate.REFUSE:  # a request that may still be refused is not started
                self._batches.add(waiters, replica)
                waiters = []

    async def _read(self, pending: PendingRequest, steps: Steps[Any]) -> Any:
        """Run steps when it is their turn, and return their result; an empty list if the request has ended."""
        if pending.done.done():
            return []
        begun = time.monotonic()
        tokenizing = self._tokenizers.begin(pending, steps, may_be_now=not pending.tokens)
        pending.tokenizing = tokenizing.done
        try:
            return await tokenizing.done
        finally:
            pending.timeline.add(Stage.TURN, begun, time.monotonic())
            for start, end in list(tokenizing.spans):
                pending.timeline.add(Stage.TOKENIZE, start, end)

    def _join(self, sequence: TokenSequence) -> TokenSequence:
        """Return the sequence of an identical item that is in flight, or this one."""
        sequence.key = _key(sequence)
        return self._sequences.setdefault(sequence.key, sequence)

    # --------------------------------------------------------------------------------------------------- results

    def _finished(self, batch: FinishedBatch) -> None:
        self._call_soon(lambda: self._deliver(batch))

    def _faulted(self, lost: Sequence[TokenSequence]) -> None:
        """Fail the requests whose sequences a computing thread has lost, but not those that other threads compute."""
        safe = {sequence for worker in self._workers for sequence in worker.in_hand}
        if not lost:
            self._batches.clear()
        self._call_soon(lambda: self._end_unsafe(lost, safe))

    def _end_unsafe(self, lost: Sequence[TokenSequence], safe: set[TokenSequence]) -> None:
        if not lost:
            safe = safe | {sequence for worker in self._workers for sequence in worker.in_hand}
            lost = [sequence for sequence in self._sequences.values() if sequence not in safe]
        message = f"model {self._model!r} failed while it computed this request"
        self._end_requests(lost, lambda: InferenceFailed(message))

    def _end_requests(self, lost: Sequence[TokenSequence], error: Callable[[], RequestError]) -> None:
        """Answer the requests that wait for sequences that will never be computed."""
        for sequence in lost:
            self._sequences.pop(sequence.key, None)
            for waiter in sequence.waiters:
                waiter.handle.is_live = False
                if (pending := self._pending.get(waiter.handle)) is not None:
                    pending.end(error())

    def _card_lost(self, replica: int, reason: str) -> None:
        self._call_soon(lambda: self.lose(replica, reason))

    def lose(self, replica: int, reason: str) -> None:
        """Give up a replica whose card can no longer compute: its batch gets an error, and others take the queued texts.

        Without another replica, all requests get the error, now and later.
        """
        worker = self._workers[replica]
        worker.is_retired = True
        self.lost.setdefault(replica, reason)

        def error() -> RequestError:
            message = f"model {self._model!r}: its card was lost, and the gateway is about to restart: {reason}"
            return ModelRecovering(message, retry_after_s=_RESTART_S)

        if len(self.lost) == len(self._workers):
            self.give_up(error)
        else:
            self._end_requests(worker.in_hand, error)

    def _call_soon(self, callback: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # when the process ends, the loop may close before a thread does
            self._loop.call_soon_threadsafe(callback)

    def _deliver(self, batch: FinishedBatch) -> None:
        """Give the results of a batch to all requests that wait for them."""
        num_tokens = sum(sequence.item.num_tokens for sequence in batch.sequences)
        if any(isinstance(result, Encoded) for result in batch.results):
            self._admission.note_rate(num_tokens, batch.device_s)
        metrics.BATCH_TEXTS.labels(self._model).observe(len(batch.sequences))
        metrics.BATCH_TOKENS.labels(self._model).observe(num_tokens)
        metrics.BATCH_FILL.labels(self._model).observe(num_tokens / self._limits.max_batch_tokens)
        metrics.COMPUTED_TOKENS.labels(self._model).inc(num_tokens + batch.num_padding)
        served: set[RequestHandle] = set()
        for sequence, result in zip(batch.sequences, batch.results, strict=True):
            self._sequences.pop(sequence.key, None)
            for waiter in sequence.waiters:
                pending = self._pending.get(waiter.handle)
                if pending is None:  # its caller has gone in the meantime
                    continue
                pending.sequences.discard(sequence)
                if waiter.handle not in served:  # the first of a request's texts in a batch has waited longest
                    served.add(waiter.handle)
                    pending.timeline.add(Stage.QUEUE, waiter.queued_at, batch.started)
                    pending.timeline.add(Stage.INFERENCE, max(waiter.queued_at, batch.started), batch.ended)
                self._fill(waiter, pending, result)

    @staticmethod
    def _fill(waiter: Waiter, pending: PendingRequest, result: Encoded | RequestError) -> None:
        if isinstance(result, RequestError):
            # An error belongs to one request: raising it for two would mix their tracebacks.
            is_document = waiter.sequence.item.tokens.spans is not None
            place = "" if is_document else f"{pending.text_name}[{waiter.index}]: "
            pending.end(type(result)(f"{place}{result.message}", is_permanent=result.is_permanent))
            return
        pending.encoded[waiter.index] = result
        pending.num_missing -= 1
        if not pending.num_missing:
            pending.end()

    def _end_all(self, error: Callable[[], RequestError]) -> None:
        """Answer all pending requests with an error."""
        self._sequences.clear()
        for pending in self._pending.values():
            pending.end(error())

    # ---------------------------------------------------------------------------------------------------- health

    def oldest_s(self, priority: Priority = Priority.NORMAL) -> float:
        """Return how many seconds the oldest pending request of a priority has been waiting; 0 if no request is pending."""
        oldest = next((pending for pending in self._pending.values() if pending.priority is priority), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.admitted_at

    def stats(self) -> SequenceStats:
        """Return the number of sequences in flight, and the number of texts that wait for them."""
        return SequenceStats(len(self._sequences), sum(len(sequence.waiters) for sequence in self._sequences.values()))

    @property
    def num_requests(self) -> int:
        """The number of pending requests."""
        return len(self._pending)

    @property
    def num_texts(self) -> int:
        """The number of texts in the pending requests of normal priority."""
        return self._admission.num_texts

    @property
    def num_queued(self) -> int:
        """The number of texts that wait for a computing thread, including texts that are no longer needed."""
        return self._batches.num_waiting

    @property
    def is_idle(self) -> bool:
        """Whether no text of any request is queued, counted or being computed."""
        is_counted = self._pending or self._sequences or not self._admission.is_empty
        return not is_counted and self._batches.is_empty and self._tokenizers.is_empty

    def busy_since(self, replica: int) -> float | None:
        """Return when a replica's running forward began (``time.monotonic()``); ``None`` if no forward runs."""
        return self._workers[replica].busy_since

    def expected_s(self, replica: int) -> float:
        """Return the seconds that a replica's batch in hand should take; 0 if nothing is known."""
        return self._workers[replica].expected_s

    def num_failed_in_a_row(self, replica: int) -> int:
        """Return how many consecutive batches on a replica have returned only errors."""
        return self._workers[replica].num_failed_in_a_row

    def give_up(self, error: Callable[[], RequestError]) -> None:
        """Answer all current and future requests with an error, and abandon the threads: one may hang forever."""
        self._refusal = error
        self._batches.close()
        self._tokenizers.close()
        self._end_all(error)

    # ------------------------------------------------------------------------------------------- start and stop

    async def spawn(self) -> None:
        # The gauge outlives the batcher, and must not keep the weights of a stopped model in memory.
        this = weakref.ref(self)
        gauges = {Priority.NORMAL: metrics.QUEUE_OLDEST_SECONDS, Priority.LOW: metrics.LOW_QUEUE_OLDEST_SECONDS}
        for priority, gauge in gauges.items():
            gauge.labels(self._model).set_function(partial(_oldest_s, this, priority))
        self._tokenizers.start()
        for worker in self._workers:
            worker.start()

    async def shutdown(self) -> None:
        """Stop after the running batch; requests that still wait get :class:`ShuttingDown`."""
        if len(self.lost) == len(self._workers):  # the batcher was given up: a thread may hang
            return
        self._refusal = _shutting_down
        self._batches.close()
        self._tokenizers.close()
        for worker in self._workers:
            # A thread of asyncio keeps its last call for a moment. A call with the worker would keep the weights alive.
            await asyncio.to_thread(worker.thread.join, _STOP_S)
            if worker.thread.is_alive():
                log.error("batch_hangs", model=self._model, seconds=_STOP_S)
        self._end_all(_shutting_down)
        if not await asyncio.to_thread(self._tokenizers.join, _STOP_S):
            log.error("tokenizer_hangs", model=self._model, seconds=_STOP_S)
        # The workers refer back to this object. Without the cycle, the weights are freed when nothing else holds them.
        self._workers.clear()


def _oldest_s(batcher: weakref.ref[Batcher], priority: Priority) -> float:
    this = batcher()
    return 0.0 if this is None else this.oldest_s(priority)


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the gateway is shutting down", retry_after_s=5)


def _key(sequence: TokenSequence) -> Hashable:
    """Return a key that is equal for two sequences exactly when the sequences are equal."""
    item = sequence.item
    tokens = item.tokens
    places = (tokens.spans, tokens.second, tokens.num_attended)
    return array("q", tokens.ids).tobytes(), item.task, item.outputs, item.scorer, places, sequence.replica
