"""Run a model on other servers: distribute texts, retry where that is safe, and monitor the servers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence

import structlog

from gateway.backends.base import Replica, Report, unreported
from gateway.backends.upstream import description
from gateway.backends.upstream.answers import Answer
from gateway.backends.upstream.dialects import DEFAULT_BATCH_TEXTS, make_dialect
from gateway.backends.upstream.failures import RETRY_AFTER_S, Failure, TooLarge, given_up
from gateway.backends.upstream.pool import Pool
from gateway.backends.upstream.probe import Probe, take_probe
from gateway.backends.upstream.resolver import RESOLVER, Resolver
from gateway.backends.upstream.server import Server
from gateway.backends.upstream.tasks import Tasks, read_tasks
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import (
    BadInput,
    ContextLengthExceeded,
    DeadlineExceeded,
    ModelNotReady,
    Overloaded,
    ShuttingDown,
    UnsupportedOutput,
)
from gateway.golden import GoldenVector
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, ModelInfo, Priority, Timings, Vocabulary

log = structlog.get_logger(__name__)

# TEI takes bodies of 2 MB by default.
_MAX_BATCH_CHARS = 500_000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
# English has four characters per token, which is also the batcher's estimate.
_CHARS_PER_TOKEN = 4
# Reading more numbers from one answer would block the event loop for more than 50 ms.
_MAX_NUMBERS = 131_072
# Low-priority jobs may use this fraction (1/4) of the limit on texts in flight, in addition to the others.
_LOW_PART = 4


class UpstreamBackend:
    """The :class:`~gateway.backends.base.Backend` of a model that runs on other servers.

    A :class:`~gateway.backends.upstream.probe.Probe` is taken when the model is loaded, or read from its golden file. A
    server gets requests only while it returns the same vectors. It is checked at the start, after it failed, and
    periodically.

    Args:
        resolver: looks up the names of ``dns+http://`` URLs.
    """

    def __init__(self, entry: ModelEntry, settings: Settings, resolver: Resolver = RESOLVER) -> None:
        if entry.upstream is None:
            raise ValueError(f"model {entry.id!r} has no upstream")
        self._entry = entry
        self._upstream = entry.upstream
        self._settings = settings
        self._dialect = make_dialect(entry, entry.upstream)
        self._tasks = Tasks({}, {}, "")
        self._pool = Pool(entry.id, self._dialect, entry.upstream, resolver)
        self._resolver = resolver
        self._max_batch_texts = DEFAULT_BATCH_TEXTS
        self._num_texts = self._num_low_texts = self._num_chars = 0
        self._probe: Probe | None = None
        self._info: ModelInfo | None = None
        self._is_stopped = False
        self._has_warned = False

    # -------------------------------------------------------------------------------------------------- loading

    async def plan(self, report: Report = unreported) -> ModelInfo:
        await self._pool.close()
        self._is_stopped = False
        self._tasks = read_tasks(self._entry, self._upstream)
        self._pool = Pool(self._entry.id, self._dialect, self._upstream, self._resolver)
        try:
            await self._pool.find()
            facts = await description.learn_facts(self.servers, self._entry, self._upstream)
            recorded = description.read_golden(self._entry, self.base_fingerprint(), self._tasks)
            self._probe = await take_probe(self._entry.id, self._tasks, self.servers, recorded, self._pool.unresolved)
            fingerprint = description.full_fingerprint(self.base_fingerprint(), self._probe.width, recorded or ())
            self._info = description.describe(
                self._entry,
                self._upstream.urls,
                self._tasks,
                facts,
                fingerprint,
                self._probe.width,
                self._dialect.gives_raw,
            )
        except BaseException:  # also a canceled start must close the connections
            await self._pool.close()
            raise
        self._max_batch_texts = self._upstream.max_batch_texts or facts.max_batch_texts or DEFAULT_BATCH_TEXTS
        self._pool.set_width(self._probe.width)
        return self._info

    async def start(self, report: Report) -> ModelInfo:
        info = self._info or await self.plan()
        assert self._probe is not None  # noqa: S101  it has been planned
        if self._entry.golden is None and not self._has_warned:
            self._has_warned = True  # absent servers are retried again and again
            log.warning(
                "upstream_not_pinned",
                model=self._entry.id,
                hint="another model behind the same name is noticed while this process runs, but not after a restart. To "
                f"change that, set `golden`, and write it with `gateway verify {self._entry.id} --record`",
            )
        self._pool.open(self._probe, self._settings.golden_interval_s, report)
        return info

    def base_fingerprint(self) -> str:
        """Return the fingerprint of the model apart from its vectors."""
        return description.base_fingerprint(self._entry, self._upstream, self._tasks)

    @property
    def servers(self) -> Sequence[Server]:
        """The servers in the order of the registry, those of a name by address. The list object never changes."""
        return self._pool.servers

    @property
    def server_names(self) -> set[str]:
        """The names of all servers, including those that are leaving, as the metrics write them."""
        return self._pool.all_names

    def replicas(self) -> Sequence[Replica]:
        """Return the servers while the model runs."""
        return self._pool.replicas()

    @property
    def probe(self) -> Sequence[GoldenVector]:
        """The vectors that the servers must return; empty before the model has been planned."""
        return self._probe.vectors if self._probe else ()

    # ------------------------------------------------------------------------------------------------ a request

    async def embed(self, job: EmbedJob) -> Embeddings:
        self._require_running()
        if self._info is None:
            raise ModelNotReady(f"model {self._entry.id!r} is not loaded", retry_after_s=RETRY_AFTER_S)
        self._admit(job)
        self._count_waiting(job, 1)
        started = time.monotonic()
        try:
            slices = list(_slices(job.texts, self._limit_texts(len(job.texts), self._info.width)))
            answer = await self._embed_slices(job, slices)
        finally:
            self._count_waiting(job, -1)
        return Embeddings(
            vectors=answer.vectors,
            # Servers report the number of tokens per request, not per text.
            num_tokens=[answer.num_tokens, *[0] * (len(job.texts) - 1)],
            truncated=[],
            timings=Timings(0.0, 0.0, time.monotonic() - started),
        )

    def _require_running(self) -> None:
        if self._is_stopped:
            raise ShuttingDown("the gateway is shutting down", retry_after_s=RETRY_AFTER_S)

    def _admit(self, job: EmbedJob) -> None:
        limit, num_before, kind = self._settings.max_queue_texts, self._num_texts, ""
        if job.priority is Priority.LOW:
            limit, num_before, kind = limit // _LOW_PART, self._num_low_texts, "low-priority "
        if num_before and num_before + len(job.texts) > limit:
            raise Overloaded(
                f"model {self._entry.id!r} is full: {num_before} {kind}texts are in progress, and this request has "
                f"{len(job.texts)}; the limit is {limit}",
                retry_after_s=1,
            )

    def _count_waiting(self, job: EmbedJob, sign: int) -> None:
        """Add the texts of a job to those that wait for servers, or subtract them."""
        if job.priority is Priority.LOW:
            self._num_low_texts += sign * len(job.texts)
            metrics.LOW_QUEUE_TEXTS.labels(self._entry.id).set(self._num_low_texts)
            return
        self._num_texts += sign * len(job.texts)
        self._num_chars += sign * sum(map(len, job.texts))
        metrics.QUEUE_TEXTS.labels(self._entry.id).set(self._num_texts)
        metrics.QUEUE_TOKENS.labels(self._entry.id).set(self._num_chars // _CHARS_PER_TOKEN)

    def _limit_texts(self, num_texts: int, width: int) -> int:
        """Return the current maximum number of texts per request: servers come, go and change while the model runs."""
        most = max(1, _MAX_NUMBERS // width)
        if num_texts <= most or not any(server.has_numbers for server in self.servers):
            return self._max_batch_texts
        return min(self._max_batch_texts, most)

    async def _embed_slices(self, job: EmbedJob, slices: Sequence[range]) -> Answer:
        """Embed slices of a job concurrently, in one request each; the first failure ends all of them."""
        if len(slices) == 1:
            return await self._embed_slice(job, slices[0])
        tasks: list[asyncio.Task[Answer]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks += [group.create_task(self._embed_slice(job, places)) for places in slices]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return Answer.joined([task.result() for task in tasks])

    async def _embed_slice(self, job: EmbedJob, places: range) -> Answer:
        """Embed some texts of a job on a server; if it does not answer, retry on another server or on the same one.

        Args:
            places: the positions of the texts in the job.
        """
        texts = job.texts[places.start : places.stop]
        prepared, name = self._tasks.prepare(texts, job.task)
        failures: dict[Server, Failure] = {}
        failure: Failure | None = None
        for attempt in range(self._upstream.max_retries + 1):
            server = self._pool.choose(failures)
            if server is None:
                break
            if failure is not None and not await self._pause(attempt, failure, server in failures, job.deadline):
                break
            self._require_running()
            self._check_blank(server, prepared, places)
            try:
                answer = await self._ask(server, prepared, name, job)
            except TooLarge as error:
                return await self._embed_halves(job, places, error)
            except Failure as error:
                if server not in failures:  # several attempts are one failed request
                    self._note(server, error)
                failures[server] = failure = error
            else:
                server.note_success()
                return answer
        self._require_running()
        is_permanent = all(server.is_refusing for server in self.servers)
        raise given_up(self._entry.id, failure, places, self._pool.reasons, is_permanent=is_permanent)

    async def _ask(self, server: Server, texts: Sequence[str], task: str | None, job: EmbedJob) -> Answer:
        """Send texts to a server; record errors that may be the server's fault although the client gets them at once."""
        is_low = job.priority is Priority.LOW
        if is_low:
            await self._take_low_turn(job)
        try:
            return await server.embed(texts, task, job.truncate, job.deadline)
        except TimeoutError as error:
            self._note(server, Failure("timeout", f"{server.name} had not answered yet"))
            reason = f"not done within the time limit: {server.name} had not answered yet"
            raise DeadlineExceeded(reason) from error
        except ContextLengthExceeded:
            raise
        except BadInput as error:
            # Some servers respond like this if they no longer have the model, or if the key has expired.
            self._note(server, Failure("refused", error.message))
            raise
        finally:
            if is_low:
                self._pool.low_turns.release()

    async def _take_low_turn(self, job: EmbedJob) -> None:
        """Wait for a low-priority turn. Servers have no priorities, so each gets one such request at a time."""
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                await self._pool.low_turns.acquire()
        except TimeoutError:
            reason = "not done within the time limit: other low-priority requests were ahead of it"
            raise DeadlineExceeded(reason) from None

    async def _embed_halves(self, job: EmbedJob, places: range, error: TooLarge) -> Answer:
        """Embed texts that were too many for a server in two requests."""
        if len(places) == 1:
            raise error.refusal
        half = (len(places) + 1) // 2
        if error.is_number:
            self._max_batch_texts = min(self._max_batch_texts, half)
        return await self._embed_slices(job, [places[:half], places[half:]])

    def _note(self, server: Server, failure: Failure) -> None:
        """Record a failure; if it makes the server suspect, test the server at once."""
        server.note(failure)
        if server.breaker.is_suspect:
            self._pool.look()

    def _check_blank(self, server: Server, prepared: Sequence[str], places: range) -> None:
        if server.quirks is not None and (refused := server.quirks.first_refused(prepared)) is not None:
            raise BadInput(
                f"text {places[refused]} is blank, and {server.name}, where model {self._entry.id!r} runs, rejects blank "
                "texts: leave it out",
                param="input",
            )

    async def _pause(self, attempt: int, failure: Failure, is_same_server: bool, deadline: float) -> bool:
        """Wait before the next attempt; return whether the deadline leaves time for it."""
        longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
        # A random length, so that requests that failed at the same time do not retry at the same time.
        pause_s = random.uniform(0, longest)  # noqa: S311  not for secrets
        if is_same_server and failure.retry_after_s is not None:
            pause_s += failure.retry_after_s
        if pause_s > _LONGEST_PAUSE_S or time.monotonic() + pause_s >= deadline:
            return False
        metrics.UPSTREAM_RETRIES.labels(self._entry.id).inc()
        await asyncio.sleep(pause_s)
        return True

    async def vocabulary(self) -> Vocabulary:
        raise UnsupportedOutput(
            f"model {self._entry.id!r} runs on another server, and its tokenizer is not on this one", param="model"
        )

    # -------------------------------------------------------------------------------------------------------- end

    async def stop(self) -> None:
        self._is_stopped = True
        await self._pool.close()


def _slices(texts: Sequence[str], max_texts: int) -> Iterator[range]:
    """Split texts into runs that fit into one request to a server."""
    first = num_chars = 0
    for i, text in enumerate(texts):
        num_chars += len(text)
        if i > first and (i - first == max_texts or num_chars > _MAX_BATCH_CHARS):
            yield range(first, i)
            first, num_chars = i, len(text)
    yield range(first, len(texts))
