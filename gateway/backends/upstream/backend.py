"""Run a model on other servers: spread its texts over them, ask again where that is safe, and watch over them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path

import numpy as np
import structlog

from gateway.backends.base import Report
from gateway.backends.upstream.dialects import DEFAULT_BATCH_TEXTS, Answer, Facts, make_dialect
from gateway.backends.upstream.probe import Probe, agree
from gateway.backends.upstream.server import Failure, Server
from gateway.backends.upstream.tasks import Tasks, read_tasks
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from gateway.embedding import Embeddings, EmbedJob, ModelInfo, ModelState, Timings, Vocabulary, canonical_task
from gateway.engine import golden
from gateway.engine.golden import GoldenVector
from gateway.errors import (
    DeadlineExceeded,
    LoadError,
    ModelNotReady,
    Overloaded,
    RequestError,
    ShuttingDown,
    UnsupportedOutput,
    UpstreamFailed,
    UpstreamUnavailable,
)
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

# TEI takes bodies of 2 MB by default.
_MAX_BATCH_CHARS = 500_000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_RETRY_AFTER_S = 5
_WATCH_S = 0.5
_DEFAULT_MAX_TOKENS = 8192


class UpstreamBackend:
    """The :class:`~gateway.backends.base.Backend` of a model that runs on other servers.

    A :class:`~gateway.backends.upstream.probe.Probe` is taken when the model is loaded, or read from its golden file. A
    server takes part while it gives these same vectors: at the start, after it failed, and from time to time.
    """

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        if entry.upstream is None:
            raise ValueError(f"model {entry.id!r} has no upstream")
        self._entry = entry
        self._upstream = entry.upstream
        self._settings = settings
        self._dialect = make_dialect(entry, entry.upstream)
        self._tasks = Tasks({}, {})
        self._servers: list[Server] = []
        self._max_batch_texts = DEFAULT_BATCH_TEXTS
        self._num_texts = 0
        self._probe: Probe | None = None
        self._info: ModelInfo | None = None
        self._is_stopped = False
        self._watch: asyncio.Task[None] | None = None

    # -------------------------------------------------------------------------------------------------- loading

    async def plan(self) -> ModelInfo:
        await self._close()
        self._is_stopped = False
        self._tasks = read_tasks(self._entry, self._upstream)
        self._servers = [Server(self._entry.id, url, self._dialect, self._upstream) for url in self._upstream.urls]
        try:
            facts = await self._learn_facts()
            recorded = self._read_golden()
            self._probe = await agree(self._entry.id, self._tasks, self._servers, recorded)
            self._info = self._describe(facts, recorded, self._probe.width)
        except BaseException:
            await self._close()
            raise
        self._max_batch_texts = self._upstream.max_batch_texts or facts.max_batch_texts or DEFAULT_BATCH_TEXTS
        for server in self._servers:
            server.width = self._probe.width
        return self._info

    async def start(self, report: Report) -> ModelInfo:
        info = self._info or await self.plan()
        self._watch = asyncio.create_task(self._watch_servers(report))
        return info

    async def _learn_facts(self) -> Facts:
        """Ask every server what it is, shut out those that do not answer, and return what the first says.

        Raises:
            LoadError: one serves something else.
        """
        found: list[Facts] = []
        results = await asyncio.gather(*(server.facts() for server in self._servers), return_exceptions=True)
        for server, result in zip(self._servers, results, strict=True):
            if isinstance(result, Failure):
                server.shut_out(str(result))
            elif isinstance(result, BaseException):
                raise result
            else:
                self._check_model(server, result)
                found.append(result)
        return found[0] if found else Facts()

    def _check_model(self, server: Server, facts: Facts) -> None:
        wanted = self._upstream.model or self._entry.source
        # Ollama calls a model without a tag `:latest`; a gateway answers to a model's source and aliases as well.
        known = {name.casefold().removesuffix(":latest") for name in facts.models}
        if self._entry.backend == "tei" and known and wanted.casefold() not in known:
            raise LoadError(
                f"{server.name} serves {', '.join(facts.models)}, and not {wanted}; say what it calls the model in "
                "`upstream.model`"
            )

    def _read_golden(self) -> Sequence[GoldenVector] | None:
        if self._entry.golden is not None:
            return golden.read(Path(self._entry.golden), self.base_fingerprint(), self._tasks.instructions)
        log.warning(
            "upstream_not_pinned",
            model=self._entry.id,
            hint="another model behind the same name is noticed while this process runs, and not from one start to the "
            "next: set `golden`, and write it with gateway verify MODEL --record",
        )
        return None

    def base_fingerprint(self) -> str:
        """Return what identifies the model but for its vectors: its name, and what is sent beside a text."""
        content = [
            self._upstream.model or self._entry.source,
            dict(self._tasks.names),
            dict(self._upstream.extra_body),
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def probe(self) -> Sequence[GoldenVector]:
        """The vectors that the servers must give; none before the model has been planned."""
        return self._probe.vectors if self._probe else ()

    def _describe(self, facts: Facts, recorded: Sequence[GoldenVector] | None, width: int) -> ModelInfo:
        entry = self._entry
        if too_wide := [size for size in entry.dimensions if size > width]:
            raise LoadError(f"dimensions lists {too_wide[0]}, but the model's vectors have {width}")
        identity = f"{self.base_fingerprint()} {width}".encode()
        vectors = b"".join(one.vector.astype("<f4").tobytes() for one in recorded or ())
        return ModelInfo(
            id=entry.id,
            source=entry.source,
            revision=entry.revision,
            fingerprint=hashlib.sha256(identity + vectors).hexdigest(),
            width=width,
            dimensions=tuple(sorted({width, *entry.dimensions}, reverse=True)),
            max_tokens=entry.max_tokens or facts.max_tokens or _DEFAULT_MAX_TOKENS,
            pooling="unknown",
            is_normalised=True,
            device="remote",
            dtype=facts.dtype or "unknown",
            engine=f"{entry.backend} at {', '.join(server.name for server in self._servers)}",
            memory_bytes=0,
            tasks=self._tasks.instructions,
            default_task=entry.default_task and canonical_task(entry.default_task),
            has_raw=self._dialect.gives_raw,
        )

    # ------------------------------------------------------------------------------------------------ a request

    async def embed(self, job: EmbedJob) -> Embeddings:
        if self._is_stopped:
            raise ShuttingDown("the gateway is shutting down", retry_after_s=_RETRY_AFTER_S)
        if self._info is None:
            raise ModelNotReady(f"model {self._entry.id!r} is not loaded", retry_after_s=_RETRY_AFTER_S)
        self._admit(len(job.texts))
        self._num_texts += len(job.texts)
        started = time.monotonic()
        try:
            answers = await self._embed_slices(job)
        finally:
            self._num_texts -= len(job.texts)
            metrics.QUEUE_TEXTS.labels(self._entry.id).set(self._num_texts)
        vectors = np.concatenate([answer.vectors for answer in answers]) if len(answers) > 1 else answers[0].vectors
        return Embeddings(
            vectors=vectors,
            # Servers say how many tokens a request had, not each text.
            num_tokens=[sum(answer.num_tokens for answer in answers), *[0] * (len(job.texts) - 1)],
            truncated=[],
            timings=Timings(0.0, 0.0, time.monotonic() - started),
        )

    def _admit(self, num_texts: int) -> None:
        limit = self._settings.max_queue_texts
        if self._num_texts and self._num_texts + num_texts > limit:
            raise Overloaded(
                f"model {self._entry.id!r} is full: {self._num_texts} texts are on their way, this request has {num_texts}; "
                f"the limit is {limit}",
                retry_after_s=1,
            )

    async def _embed_slices(self, job: EmbedJob) -> list[Answer]:
        """Embed a job in as many requests as the servers' limits ask for, side by side; the first failure ends all."""
        slices = list(_slices(job.texts, self._max_batch_texts))
        if len(slices) == 1:
            return [await self._embed_slice(job, slices[0])]
        tasks: list[asyncio.Task[Answer]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks += [group.create_task(self._embed_slice(job, texts)) for texts in slices]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _embed_slice(self, job: EmbedJob, texts: Sequence[str]) -> Answer:
        """Embed texts on one server, and if it does not answer, on another one, or on it again."""
        prepared, name = self._tasks.prepare(texts, job.task)
        failed: list[Server] = []
        failure: Failure | None = None
        for attempt in range(self._upstream.max_retries + 1):
            server = self._choose(failed, failure)
            if server is None:
                break
            if failure is not None and not await self._pause(attempt, failure, server in failed, job.deadline):
                break
            try:
                return await server.embed(prepared, name, job.truncate, job.deadline)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"not done within the time limit: {server.name} had not answered yet"
                ) from failure
            except Failure as error:
                failure = error
                failed.append(server)
        raise self._given_up(failure)

    def _choose(self, failed: Sequence[Server], failure: Failure | None) -> Server | None:
        """Return the server with the fewest texts on their way, one that has not failed yet if there is one."""
        working = [server for server in self._servers if server.breaker.is_closed]
        fresh = [server for server in working if server not in failed]
        if not fresh and failure is not None and not failure.is_worth_repeating:
            return None
        return min(fresh or working, key=lambda server: (server.num_texts, random.random()), default=None)  # noqa: S311

    async def _pause(self, attempt: int, failure: Failure, is_same_server: bool, deadline: float) -> bool:
        """Wait before the next attempt; tell whether there is time for one."""
        longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
        # Of random length, so that requests that failed together do not come back together.
        pause_s = random.uniform(0, longest)  # noqa: S311  not for secrets
        if is_same_server and failure.retry_after_s is not None:
            pause_s += failure.retry_after_s
        if pause_s > _LONGEST_PAUSE_S or time.monotonic() + pause_s >= deadline:
            return False
        metrics.UPSTREAM_RETRIES.labels(self._entry.id).inc()
        await asyncio.sleep(pause_s)
        return True

    def _given_up(self, failure: Failure | None) -> RequestError:
        """Return what the client is told when no server has answered."""
        what = f"model {self._entry.id!r} runs elsewhere"
        if failure is None:
            reasons = "; ".join(server.breaker.reason for server in self._servers)
            return UpstreamUnavailable(f"{what}, and no server answers: {reasons}", retry_after_s=_RETRY_AFTER_S)
        after = _RETRY_AFTER_S if failure.retry_after_s is None else ceil(failure.retry_after_s)
        match failure.outcome:
            case "overloaded":
                return Overloaded(f"{what}, and {failure}", retry_after_s=after)
            case "unready" | "unreachable" | "refused":
                return UpstreamUnavailable(f"{what}, and {failure}", retry_after_s=after)
            case _:
                return UpstreamFailed(f"{what}, and {failure}")

    def vocabulary(self) -> Vocabulary:
        raise UnsupportedOutput(
            f"model {self._entry.id!r} runs elsewhere, and its tokenizer is not here", param="model"
        )

    # -------------------------------------------------------------------------------------------------- watching

    async def _watch_servers(self, report: Report) -> None:
        """Try the servers that are shut out, hold all others against the probe from time to time, and report."""
        was_ready = True
        next_check = time.monotonic() + self._settings.golden_interval_s
        while True:
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            is_check_due = now >= next_check
            if is_check_due:
                next_check = now + self._settings.golden_interval_s
            due = [
                server
                for server in self._servers
                if server.breaker.is_trial_due(now) or (is_check_due and server.breaker.is_closed)
            ]
            await asyncio.gather(*(self._try(server) for server in due))
            is_ready = any(server.breaker.is_closed for server in self._servers)
            if is_ready != was_ready:
                reasons = "; ".join(server.breaker.reason for server in self._servers)
                report(ModelState.READY if is_ready else ModelState.RECOVERING, "" if is_ready else reasons)
                log.warning("upstream_state", model=self._entry.id, is_ready=is_ready, reasons=reasons)
                was_ready = is_ready

    async def _try(self, server: Server) -> None:
        """Let a server in, or shut it out, by whether it gives the vectors that it must give."""
        assert self._probe is not None  # noqa: S101  it has been planned
        try:
            problem = await self._probe.compare(server)
        except Failure as failure:
            if server.breaker.is_closed:
                server.note(failure)
            else:
                server.shut_out(str(failure))
        except Exception as error:  # nothing that a server does may be the end of the watch
            server.shut_out(f"{server.name} does not give the vectors that it is known for: {error!r}")
        else:
            if problem:
                server.shut_out(f"{server.name} gives other vectors than before, and may run another model: {problem}")
            else:
                server.let_in()

    async def stop(self) -> None:
        self._is_stopped = True
        await self._close()

    async def _close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait((self._watch,))
            self._watch = None
        for server in self._servers:
            await server.close()


def _slices(texts: Sequence[str], max_texts: int) -> Iterator[Sequence[str]]:
    """Cut texts into runs that a server takes in one request."""
    first = num_chars = 0
    for i, text in enumerate(texts):
        num_chars += len(text)
        if i > first and (i - first == max_texts or num_chars > _MAX_BATCH_CHARS):
            yield texts[first:i]
            first, num_chars = i, len(text)
    yield texts[first:]
