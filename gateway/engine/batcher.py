"""Run the queue: one thread that tokenises, one that computes, and the callers that wait on the event loop.

Takes the place of Infinity's ``BatchHandler``, and keeps its interface for ``AsyncEmbeddingEngine``. That one passes a
batch through five queues and four threads that poll and sleep (5 ms a step, so a single short text takes three times as
long as its forward), tokenises every text twice, and never recovers from an exception in one of its threads: the
futures of that batch, and of every later one, are never resolved (michaelfeil/infinity #242, #483, #544). Here a thread
that is free takes what is queued, without a timer, and whatever a forward does, everybody in its batch gets an answer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import structlog

from gateway.embedding import Embeddings, EmbedJob, Timings, Truncate, Vectors
from gateway.engine.encoders.base import Encoder, empty_vectors
from gateway.engine.infinity_library import OverloadStatus
from gateway.engine.scheduler import Entry, FairQueue, Ticket, take
from gateway.engine.tokenizer import Tokens
from gateway.errors import DeadlineExceeded, InferenceFailed, Overloaded, RequestError, ShuttingDown
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

# Texts that are tokenised in one go. Small enough that a request of one text never waits long behind a large one.
_TOKENISE_SLICE = 64
# How much the newest batch counts in the measured rate.
_RATE_WEIGHT = 0.1
_CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one model takes: tokens in a batch, texts and (estimated) tokens that may wait."""

    max_batch_tokens: int
    max_queue_texts: int
    max_queue_tokens: int


@dataclass(eq=False, slots=True)
class _Work:
    """A request on its way through: filled batch by batch, then done."""

    vectors: Vectors
    num_missing: int
    done: asyncio.Future[None]
    tokens: list[Tokens] = field(default_factory=list)
    tokenise_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0

    def fail(self, error: RequestError) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def embeddings(self) -> Embeddings:
        return Embeddings(
            vectors=self.vectors,
            num_tokens=[len(tokens.ids) for tokens in self.tokens],
            truncated=[i for i, tokens in enumerate(self.tokens) if tokens.is_truncated],
            timings=Timings(self.tokenise_s, self.queue_s, self.inference_s),
        )


class Batcher:
    """Batches the texts of all requests for one encoder.

    Everything but the two threads' own work happens on the event loop that called :meth:`spawn`; the queue is the only
    state that is shared, under one lock.
    """

    def __init__(self, model: str, encoder: Encoder, limits: Limits) -> None:
        self._model = model
        self._encoder = encoder
        self._limits = limits
        self._works: dict[Ticket, _Work] = {}
        self._num_texts = 0
        self._num_tokens = 0  # estimated: admission comes before tokenising
        self._tokens_per_s: float | None = None
        self._queue = FairQueue()
        self._wakeup = threading.Condition()
        self._is_stopping = False
        self._tokeniser = ThreadPoolExecutor(1, f"{model}-tokenise")
        self._computer = threading.Thread(target=self._compute, name=f"{model}-compute", daemon=True)

    # ------------------------------------------------------------------------------------------- the event loop

    async def submit(self, job: EmbedJob) -> Embeddings:
        """Embed the texts of a job; return when the last vector is there.

        Cancelling the caller drops what is still queued.

        Raises:
            Overloaded: too much is waiting already.
            ContextLengthExceeded: a text is too long, and the job says to refuse.
            DeadlineExceeded: the job's deadline passed first.
            InferenceFailed: the forward of a batch with one of the texts raised.
            ShuttingDown: the batcher is stopping.
        """
        num_tokens = self._estimate_tokens(job.texts)
        self._admit(len(job.texts), num_tokens)
        ticket = Ticket(job.caller, job.deadline)
        work = _Work(
            vectors=empty_vectors(len(job.texts), self._encoder.width),
            num_missing=len(job.texts),
            done=asyncio.get_running_loop().create_future(),
        )
        self._works[ticket] = work
        self._count(len(job.texts), num_tokens)
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                await self._enqueue(job, ticket, work)
                await work.done
        except TimeoutError:
            raise DeadlineExceeded(
                f"not done within the time limit: {work.num_missing} of {len(job.texts)} texts were still waiting"
            ) from None
        finally:
            ticket.is_live = False
            del self._works[ticket]
            self._count(-len(job.texts), -num_tokens)
        return work.embeddings()

    def _admit(self, num_texts: int, num_tokens: int) -> None:
        if self._is_stopping:
            raise ShuttingDown("the gateway is shutting down", retry_after_s=5)
        limits = self._limits
        is_full = (
            self._num_texts + num_texts > limits.max_queue_texts
            or self._num_tokens + num_tokens > limits.max_queue_tokens
        )
        if is_full and self._num_texts:  # an idle model takes any request: none may be impossible for ever
            raise Overloaded(
                f"model {self._model!r} is full: {self._num_texts} texts (about {self._num_tokens} tokens) are waiting, "
                f"this request has {num_texts} (about {num_tokens}); the limits are {limits.max_queue_texts} texts and "
                f"{limits.max_queue_tokens} tokens",
                retry_after_s=ceil(self._num_tokens / self._tokens_per_s) if self._tokens_per_s else 1,
            )

    def _estimate_tokens(self, texts: Sequence[str]) -> int:
        longest = self._encoder.tokenizer.max_tokens
        return sum(min(longest, len(text) // _CHARS_PER_TOKEN + 2) for text in texts)

    def _count(self, num_texts: int, num_tokens: int) -> None:
        self._num_texts += num_texts
        self._num_tokens += num_tokens
        metrics.QUEUE_TEXTS.labels(self._model).set(self._num_texts)

    async def _enqueue(self, job: EmbedJob, ticket: Ticket, work: _Work) -> None:
        """Tokenise in slices, and queue each slice at once: the device starts while the rest is tokenised."""
        loop = asyncio.get_running_loop()
        entries: list[Entry] = []
        for first in range(0, len(job.texts), _TOKENISE_SLICE):
            texts = job.texts[first : first + _TOKENISE_SLICE]
            is_last = first + len(texts) == len(job.texts)
            started = time.monotonic()
            tokens = await loop.run_in_executor(
                self._tokeniser, self._encoder.tokenise, texts, job.task, job.truncate, first
            )
            now = time.monotonic()
            work.tokenise_s += now - started
            work.tokens += tokens
            entries += [Entry(ticket, first + i, row, job.task, now) for i, row in enumerate(tokens)]
            if is_last or job.truncate is not Truncate.REFUSE:  # what may yet be refused is not begun
                with self._wakeup:
                    self._queue.add(entries)
                    self._wakeup.notify()
                entries = []

    def _deliver(self, batch: list[Entry], vectors: Vectors | None, started: float, ended: float) -> None:
        """Hand a computed batch to its requests; ``vectors`` is ``None`` when the forward raised."""
        num_tokens = sum(entry.num_tokens for entry in batch)
        rate = num_tokens / max(ended - started, 1e-6)
        self._tokens_per_s = rate + (1 - _RATE_WEIGHT) * ((self._tokens_per_s or rate) - rate)
        metrics.BATCH_TEXTS.labels(self._model).observe(len(batch))
        metrics.BATCH_TOKENS.labels(self._model).observe(num_tokens)
        rows_of: dict[Ticket, list[int]] = {}
        for row, entry in enumerate(batch):
            rows_of.setdefault(entry.ticket, []).append(row)
        for ticket, rows in rows_of.items():
            work = self._works.get(ticket)
            if work is None:  # its caller has gone meanwhile
                continue
            if vectors is None:
                work.fail(InferenceFailed(f"model {self._model!r} failed while it computed this request"))
                ticket.is_live = False
                continue
            work.vectors[[batch[row].index for row in rows]] = vectors[rows]
            work.queue_s = max(work.queue_s, started - min(batch[row].queued_at for row in rows))
            work.inference_s += ended - started
            work.num_missing -= len(rows)
            if not work.num_missing and not work.done.done():
                work.done.set_result(None)

    def _abandon(self) -> None:
        """Answer everybody who still waits: the computing thread has ended."""
        self._is_stopping = True
        for work in self._works.values():
            work.fail(ShuttingDown("the gateway is shutting down", retry_after_s=5))

    # -------------------------------------------------------------------------------------- the computing thread

    def _compute(self) -> None:
        try:
            while batch := self._next_batch():
                started = time.monotonic()
                vectors = self._forward(batch)
                self._call_soon(self._deliver, batch, vectors, started, time.monotonic())
        finally:
            self._call_soon(self._abandon)

    def _next_batch(self) -> list[Entry]:
        """Wait for work and return a batch of it; an empty batch means that the batcher is stopping."""
        with self._wakeup:
            while not self._is_stopping:
                if batch := take(self._queue, self._limits.max_batch_tokens, time.monotonic()):
                    return batch
                self._wakeup.wait()
        return []

    def _forward(self, batch: list[Entry]) -> Vectors | None:
        try:
            return self._encoder.encode([entry.tokens for entry in batch])
        except Exception:  # the model's code may raise anything, and each of these callers must get an answer
            log.exception("batch_failed", model=self._model, texts=len(batch))
            metrics.FAILED_BATCHES.labels(self._model).inc()
            return None

    def _call_soon(self, callback, *args) -> None:  # type: ignore[no-untyped-def]
        if not self._loop.is_closed():  # at the end of the process the loop may be gone before this thread
            self._loop.call_soon_threadsafe(callback, *args)

    # --------------------------------------------------------------- what Infinity's AsyncEmbeddingEngine calls

    async def spawn(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._computer.start()

    async def shutdown(self) -> None:
        """Stop after the batch in hand; whoever still waits gets :class:`ShuttingDown`."""
        with self._wakeup:
            self._is_stopping = True
            self._wakeup.notify_all()
        await self._loop.run_in_executor(None, self._computer.join)
        self._tokeniser.shutdown(wait=False, cancel_futures=True)
        self._abandon()

    async def embed(
        self, sentences: Sequence[str], matryoshka_dim: int | None = None
    ) -> tuple[list[np.ndarray[tuple[int], np.dtype[np.float32]]], int]:
        """Embed sentences for Infinity's own ``engine.embed``: no task, no deadline; pooled vectors and token count."""
        job = EmbedJob(sentences, None, Truncate.END, deadline=time.monotonic() + 3600, caller="infinity")
        embeddings = await self.submit(job)
        return list(embeddings.vectors[:, :matryoshka_dim]), sum(embeddings.num_tokens)

    @property
    def capabilities(self) -> set[str]:
        return set(self._encoder.capabilities)

    def is_overloaded(self) -> bool:
        return self._num_texts > self._limits.max_queue_texts

    def overload_status(self) -> OverloadStatus:
        return OverloadStatus(
            queue_fraction=self._num_texts / self._limits.max_queue_texts,
            queue_absolute=self._num_texts,
            results_absolute=len(self._works),
        )
