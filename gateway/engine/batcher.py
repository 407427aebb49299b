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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

# What is tokenised in one go: so little that a request of one text never waits long behind a large one.
_SLICE_TEXTS = 64
_SLICE_CHARS = 100_000
# The tokenizer cannot stop inside a text; from this length on, texts have a thread of their own to wait for.
_LONG_TEXT_CHARS = 200_000
# How long a stop waits for the batch in hand.
_STOP_S = 10.0
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
    error: RequestError | None = None

    def end(self, error: RequestError | None = None) -> None:
        if not self.done.done():
            self.error = error
            self.done.set_result(None)

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
        self._long_tokeniser = ThreadPoolExecutor(1, f"{model}-tokenise-long")
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
        if not job.texts:
            work.end()
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
        if work.error is not None:
            raise work.error
        return work.embeddings()

    def _admit(self, num_texts: int, num_tokens: int) -> None:
        if self._is_stopping:
            raise self._shutting_down()
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
        for first, texts in _slices(job.texts):
            if not ticket.is_live:  # has failed, or the batcher is stopping
                return
            is_last = first + len(texts) == len(job.texts)
            tokeniser = self._tokeniser if len(texts[0]) < _LONG_TEXT_CHARS else self._long_tokeniser
            started = time.monotonic()
            tokens = await loop.run_in_executor(tokeniser, self._tokenise, job, ticket, first, texts)
            now = time.monotonic()
            work.tokenise_s += now - started
            work.tokens += tokens
            entries += [Entry(ticket, first + i, row, job.task, now) for i, row in enumerate(tokens)]
            if is_last or job.truncate is not Truncate.REFUSE:  # what may yet be refused is not begun
                with self._wakeup:
                    self._queue.add(entries)
                    self._wakeup.notify()
                entries = []

    def _tokenise(self, job: EmbedJob, ticket: Ticket, first: int, texts: Sequence[str]) -> list[Tokens]:
        if not ticket.is_live:  # while this waited for the thread
            return []
        return self._encoder.tokenise(texts, job.task, job.truncate, first)

    def _deliver(self, batch: list[Entry], vectors: Vectors | None, started: float, ended: float) -> None:
        """Hand a computed batch to its requests; ``vectors`` is ``None`` when the forward raised."""
        num_tokens = sum(entry.num_tokens for entry in batch)
        if vectors is not None:
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
                work.end(self._inference_failed())
                continue
            work.vectors[[batch[row].index for row in rows]] = vectors[rows]
            work.queue_s = max(work.queue_s, started - min(batch[row].queued_at for row in rows))
            work.inference_s += ended - started
            work.num_missing -= len(rows)
            if not work.num_missing:
                work.end()

    def _end_all(self, error: Callable[[], RequestError]) -> None:
        """Answer everybody who still waits with an error."""
        for ticket, work in self._works.items():
            ticket.is_live = False
            work.end(error())

    def _inference_failed(self) -> InferenceFailed:
        return InferenceFailed(f"model {self._model!r} failed while it computed this request")

    def _shutting_down(self) -> ShuttingDown:
        return ShuttingDown("the gateway is shutting down", retry_after_s=5)

    # -------------------------------------------------------------------------------------- the computing thread

    def _compute(self) -> None:
        while not self._is_stopping:
            try:
                while batch := self._next_batch():
                    started = time.monotonic()
                    vectors = self._forward(batch)
                    self._call_soon(self._deliver, batch, vectors, started, time.monotonic())
            except BaseException:  # a fault of our own, which must not be the end of the model: begin anew
                with self._wakeup:
                    self._queue = FairQueue()
                self._call_soon(self._end_all, self._inference_failed)
                log.exception("batcher_failed", model=self._model)

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
            vectors = self._encoder.encode([entry.tokens for entry in batch])
            if np.shape(vectors) != (len(batch), self._encoder.width):
                raise ValueError(f"{np.shape(vectors)} vectors for {len(batch)} texts, {self._encoder.width} wide")
        except BaseException:  # the model's code may raise anything, and each of these callers must get an answer
            for entry in batch:  # here, not in `_deliver`: the next batch is taken before the event loop gets to that
                entry.ticket.is_live = False
            log.exception("batch_failed", model=self._model, texts=len(batch))
            metrics.FAILED_BATCHES.labels(self._model).inc()
            return None
        return vectors

    def _call_soon(self, callback, *args) -> None:  # type: ignore[no-untyped-def]
        with suppress(RuntimeError):  # at the end of the process the loop may be closed before this thread has ended
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
        await asyncio.to_thread(self._computer.join, _STOP_S)
        if self._computer.is_alive():
            log.error("batch_hangs", model=self._model, seconds=_STOP_S)
        self._end_all(self._shutting_down)
        for tokeniser in (self._tokeniser, self._long_tokeniser):
            await asyncio.to_thread(tokeniser.shutdown)

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


def _slices(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """Cut texts into runs of bounded size, each with the index of its first; a long text is one by itself."""
    first = num_chars = 0
    for i, text in enumerate(texts):
        num_chars += len(text)
        if i > first and (num_chars > _SLICE_CHARS or i - first == _SLICE_TEXTS):
            yield first, texts[first:i]
            first, num_chars = i, len(text)
    if texts:
        yield first, texts[first:]
