"""A model that is loaded when a request needs it, and unloaded when it is idle or another model needs its memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol, TypeAlias

import structlog

from gateway.backends.base import Backend, Report, unreported
from gateway.backends.residents import Residents
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine.admission import Admission
from gateway.errors import LoadError, ModelNotReady, ModelUnavailable, RequestError, ShuttingDown, TooLittleMemory
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Vocabulary

log = structlog.get_logger(__name__)

Failure: TypeAlias = Callable[[], RequestError]
"""Creates the error of a request that waited for a failed load; each request needs a separate instance."""

# The pause between two attempts to load a model, doubled after each failure.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
# An estimate of the duration of a model's first load, from its size: reading, converting and compiling.
_LEAST_LOAD_S, _LOAD_BYTES_PER_S = 2.0, 250e6


class Loadable(Backend, Protocol):
    """A backend whose model can be loaded and unloaded again and again, by ``start`` and ``stop``."""

    async def require_room(self) -> None:
        """Reject a planned model that does not fit into the free memory.

        Raises:
            TooLittleMemory: one of its devices has too little.
        """


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock in seconds that can schedule calls."""

    now: Callable[[], float] = time.monotonic
    call_later: Callable[[float, Callable[[], None]], Timer] = lambda delay_s, call: (
        asyncio.get_running_loop().call_later(delay_s, call)
    )


@dataclass(eq=False, slots=True)
class _Load:
    """A load in progress.

    Attributes:
        outcome: the error of a failed load; ``None`` after a success.
        num_waiting: the number of jobs that wait for the load; they count as in flight once it ends.
    """

    outcome: asyncio.Future[Failure | None]
    began_at: float
    num_waiting: int = 0
    has_succeeded: bool = False


class OnDemandBackend:
    """The :class:`~gateway.backends.base.Backend` of a model that is in memory only while it is used.

    ``start`` reads the checkpoint's description, but not its weights. The first job begins the load, and all jobs wait for
    it until their deadlines. At most one load is in progress, and it does not belong to a job, so canceling a job does
    not affect it. After a failed load, jobs are rejected during a pause, which doubles with each failure.

    The model is unloaded when it has been idle for ``idle_unload_s``, when :class:`Residents` need its memory, or when
    the operator requests it. Then it accepts no more jobs, finishes its current ones, and stops; new jobs wait for the
    next load.

    Args:
        inner: runs the model while it is loaded.
    """

    def __init__(
        self, entry: ModelEntry, inner: Loadable, settings: Settings, residents: Residents, clock: Clock | None = None
    ) -> None:
        self._id = entry.id
        self._idle_unload_s = entry.idle_unload_s
        self.inner = inner
        self._settings = settings
        self._residents = residents
        self._clock = clock or Clock()
        self._info: ModelInfo | None = None
        self._admission = Admission(entry.id, settings.max_queue_texts, settings.max_queue_tokens, 0)
        self._report: Report = lambda _state, _reason: None
        self._is_loaded = False  # and accepts jobs
        self._is_loading = False
        self.is_started = False
        self._load: _Load | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._last_load_s: float | None = None
        self._num_failures, self._retry_at, self._reason = 0, 0.0, ""
        self._num_in_flight = 0
        self._has_nothing_in_flight = asyncio.Event()
        self._has_nothing_in_flight.set()
        self.used_at = 0.0
        self._idle_timer: Timer | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------------------- as a backend

    async def plan(self, report: Report = unreported) -> ModelInfo:
        self._info = await self.inner.plan(report)
        return self._info

    async def start(self, report: Report) -> ModelInfo:
        """Prepare to load the model; warn if it would not fit even after other models on demand are unloaded."""
        info = self._info or await self.plan()
        self._report = report
        settings = self._settings
        self._admission = Admission(self._id, settings.max_queue_texts, settings.max_queue_tokens, info.max_tokens)
        try:
            await self.inner.require_room()
        except TooLittleMemory as shortage:
            if not self._residents.can_make_room(shortage):
                log.warning("model_does_not_fit", model=self._id, reason=str(shortage))
        self.is_started = True
        return info

    async def embed(self, job: EmbedJob) -> Embeddings:
        """Embed the texts of a job, once the model is loaded.

        Raises:
            Overloaded: too many jobs already wait for the load.
            ModelNotReady: the load takes longer than the job's time limit or failed, or the job does not wait for
                loads.
            RequestError: the job was rejected or failed.
        """
        asked_at = self._clock.now()
        with nullcontext() if self._is_loaded else self._admission.admit(job):
            await self._enter(job.deadline, may_wait=job.may_wait)
        waited_s = self._clock.now() - asked_at
        try:
            result = await self.inner.embed(job)
        finally:
            self._count(-1)
        return replace(result, timings=replace(result.timings, queue_s=result.timings.queue_s + waited_s))

    async def vocabulary(self) -> Vocabulary:
        await self._enter(self._clock.now() + self._settings.request_timeout_s)
        try:
            return await self.inner.vocabulary()
        finally:
            self._count(-1)

    async def stop(self) -> None:
        self.is_started = False
        if self._load is not None and not self._load.outcome.done():
            self._load.outcome.set_result(_shutting_down)
        if self._is_loading:  # a loading thread cannot be ended; when its load ends, the model is stopped
            return
        if self._is_loaded:
            self._close()
            self._residents.remove(self)
        await self.inner.stop()

    # ----------------------------------------------------------------------------------------------- for the operator

    async def load(self) -> None:
        """Load the model unless it is loaded, and wait until it is.

        Raises:
            ModelNotReady: the load takes longer than a request's time limit, or failed.
        """
        await self._enter(self._clock.now() + self._settings.request_timeout_s)
        self._count(-1)

    async def unload(self) -> None:
        """Unload the model after its work in flight, and after a load in progress."""
        if self._load is not None:
            await asyncio.wait((self._load.outcome,))
        await self.leave("operator")

    # ------------------------------------------------------------------------------------------------- as a resident

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None  # noqa: S101  a model that is loaded has been planned
        return self._info

    @property
    def is_busy(self) -> bool:
        return self._num_in_flight > 0

    async def leave(self, reason: str) -> None:
        if self._is_loaded:
            self._close()
            self._leaving = self._run(self._leave(reason))
        if self._leaving is not None:  # a caller that gives up must not interrupt this
            await asyncio.shield(self._leaving)

    # ----------------------------------------------------------------------------------------------------- loading

    async def _enter(self, deadline: float, *, may_wait: bool = True) -> None:
        """Count a job as in flight once the model is loaded, and begin the load if necessary.

        Raises:
            ModelNotReady: the load takes too long, or failed.
        """
        while not self._is_loaded:
            load = self._begin_load()
            left_s = deadline - self._clock.now()
            is_too_late = self._last_load_s is not None and self._remaining_s(load) > left_s
            if not may_wait or is_too_late:
                raise self._still_loading(load)
            if await self._wait(load, left_s):
                return
            if not load.outcome.done():
                raise self._still_loading(load)
            if (failure := load.outcome.result()) is not None:
                raise failure()
        self._count(1)

    async def _wait(self, load: _Load, timeout_s: float) -> bool:
        """Wait for a load; return whether it succeeded and counted this job as in flight."""
        load.num_waiting += 1
        has_entered = False
        try:
            await asyncio.wait((load.outcome,), timeout=max(0.0, timeout_s))
            has_entered = load.has_succeeded
        finally:
            if not load.has_succeeded:
                load.num_waiting -= 1
            elif not has_entered:  # canceled at this very moment
                self._count(-1)
        return has_entered

    def _begin_load(self) -> _Load:
        """Return the load in progress; begin one unless the last one failed a moment ago."""
        if not self.is_started:
            raise _shutting_down()
        if self._load is None:
            if self._clock.now() < self._retry_at:
                raise self._failed()
            self._load = _Load(asyncio.get_running_loop().create_future(), self._clock.now())
            self._run(self._run_load(self._load))
        return self._load

    async def _run_load(self, load: _Load) -> None:
        failure: Failure | None = None
        try:
            if self._leaving is not None:
                await asyncio.wait((self._leaving,))
            failure = await self._start_inner(load)
        finally:
            self._load = None
            if not load.outcome.done():
                load.outcome.set_result(failure)

    async def _start_inner(self, load: _Load) -> Failure | None:
        """Start the inner backend; if that fails, return the error for the waiting jobs."""
        if not self.is_started:
            return None
        self._set_state(ModelState.LOADING)
        log.info("model_loading", model=self._id)
        self._is_loading = True
        try:
            await self.inner.plan()  # read the checkpoint again, because its files may have changed
            self._info = await self.inner.start(self._report_inner)
        except Exception as error:  # a checkpoint can make the libraries raise any error
            self._note_failure(error)
        else:
            self._num_failures, self._reason = 0, ""
        finally:
            self._is_loading = False
        if self._reason or not self.is_started:
            await self.inner.stop()
            return self._failed if self._reason else None
        self._open(load)
        return None

    def _open(self, load: _Load) -> None:
        """Accept jobs, first those that waited, before the model may be unloaded again."""
        self._last_load_s = self._clock.now() - load.began_at
        self._is_loaded = load.has_succeeded = True
        self._count(load.num_waiting)
        self._residents.add(self)
        self._watch_idleness()
        self._set_state(ModelState.READY)
        metrics.MODEL_LOADS.labels(self._id, "ok").inc()
        metrics.MODEL_LOAD_SECONDS.labels(self._id).observe(self._last_load_s)
        log.info("model_loaded", model=self._id, seconds=round(self._last_load_s, 2))

    def _note_failure(self, error: Exception) -> None:
        is_expected = isinstance(error, LoadError)
        self._reason = str(error) if is_expected else f"{type(error).__name__}: {error}"
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._num_failures)
        self._num_failures += 1
        self._retry_at = self._clock.now() + pause_s
        self._set_state(ModelState.UNLOADED, f"failed to load: {self._reason}")
        metrics.MODEL_LOADS.labels(self._id, "failed").inc()
        log.error("model_load_failed", model=self._id, reason=self._reason, pause_s=pause_s, exc_info=not is_expected)

    def _set_state(self, state: ModelState, reason: str = "") -> None:
        if self.is_started:  # otherwise the fleet decides
            self._report(state, reason)

    def _report_inner(self, state: ModelState, reason: str) -> None:
        if self._is_loaded:  # ignore reports of a watchdog that is being stopped
            self._report(state, reason)

    def _remaining_s(self, load: _Load) -> float:
        """Estimate the remaining seconds of a load in progress."""
        expected_s = self._last_load_s or _LEAST_LOAD_S + self.info.memory_bytes / _LOAD_BYTES_PER_S
        return max(0.0, expected_s - (self._clock.now() - load.began_at))

    def _still_loading(self, load: _Load) -> ModelNotReady:
        seconds = max(1, ceil(self._remaining_s(load)))
        return ModelNotReady(
            f"model {self._id!r} is loaded on demand, which will probably take {seconds} s more", retry_after_s=seconds
        )

    def _failed(self) -> ModelUnavailable:
        seconds = max(1, ceil(self._retry_at - self._clock.now()))
        return ModelUnavailable(
            f"model {self._id!r} failed to load: {self._reason}. The next attempt is possible in {seconds} s",
            retry_after_s=seconds,
        )

    # --------------------------------------------------------------------------------------------------- unloading

    def _count(self, change: int) -> None:
        """Count jobs that begin or end."""
        self._num_in_flight += change
        self.used_at = self._clock.now()
        if self._num_in_flight:
            self._has_nothing_in_flight.clear()
        else:
            self._has_nothing_in_flight.set()

    async def _leave(self, reason: str) -> None:
        await self._has_nothing_in_flight.wait()
        try:
            await self.inner.stop()
        finally:
            self._leaving = None
            self._residents.remove(self)
            self._set_state(ModelState.UNLOADED)
            metrics.MODEL_UNLOADS.labels(self._id, reason).inc()
        idle_s = self._clock.now() - self.used_at
        log.info("model_unloaded", model=self._id, reason=reason, idle_s=round(idle_s, 1))

    def _close(self) -> None:
        """Accept no more jobs."""
        self._is_loaded = False
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _watch_idleness(self) -> None:
        """Unload the model if it has been idle for long enough; otherwise schedule the next check."""
        if self._idle_unload_s is None:
            return
        idle_s = 0.0 if self.is_busy else self._clock.now() - self.used_at
        if idle_s >= self._idle_unload_s:
            self._run(self.leave("idle"))
        else:
            self._idle_timer = self._clock.call_later(self._idle_unload_s - idle_s, self._watch_idleness)

    def _run(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the gateway is shutting down", retry_after_s=5)
