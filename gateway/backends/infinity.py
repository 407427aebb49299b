"""Run a model in this process, on an embedded Infinity engine, and replace the engine when it hangs or breaks."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING
from weakref import ReferenceType

import structlog

from gateway.backends.base import Report, unreported
from gateway.backends.residents import Residents
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import (
    InternalError,
    LoadError,
    ModelNotReady,
    ModelRecovering,
    RequestError,
    ShuttingDown,
    TooLittleMemory,
)
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Truncate, Vocabulary

if TYPE_CHECKING:
    from gateway.engine.infinity import Engine
    from gateway.engine.loading import LoadPlan

log = structlog.get_logger(__name__)

# A poisoned request can fail a few batches by itself; after this many, the watchdog asks the model if it still works.
_SUSPICIOUS_FAILURES = 3
_LONGEST_BACKOFF_S = 60.0
# The watchdog asks the first of these that the model has embedded at its start: some model may fail on any one text.
_QUESTIONS = ("Does it still work?", "The quick brown fox jumps over the lazy dog.", "1", "a")


class InfinityBackend:
    """The :class:`~gateway.backends.base.Backend` of a model that runs here.

    A watchdog looks at the engine. When a forward takes longer than ``forward_timeout_s``, or a replica fails on a text
    that it has embedded before, all waiting requests get a 503, and the model is reloaded, with growing pauses between
    attempts that fail; until then it is ``recovering``.

    Args:
        residents: gives the turn to load, and makes room.
    """

    def __init__(self, entry: ModelEntry, settings: Settings, residents: Residents | None = None) -> None:
        self._entry = entry
        self._settings = settings
        self._residents = residents or Residents()
        self._plan: LoadPlan | None = None
        self._fingerprint = ""
        self._question = ""
        self._engine: Engine | None = None
        self._is_stopped = False
        self._may_hold_memory = False
        self._watch: asyncio.Task[None] | None = None
        metrics.ENGINE_RESTARTS.labels(entry.id)  # at 0: the first restart is an increase then

    async def plan(self, report: Report = unreported) -> ModelInfo:
        await asyncio.to_thread(self._download, asyncio.get_running_loop(), report)
        self._plan = await asyncio.to_thread(self._make_plan)
        return self._plan.info

    def _download(self, loop: asyncio.AbstractEventLoop, report: Report) -> None:
        """Download the checkpoint if it is not on this machine; before anything is imported, which takes seconds."""
        from gateway.engine.checkpoint.sources import is_cached, locate, require_present

        require_present(self._entry)
        if is_cached(self._entry):
            return

        def pass_on(state: ModelState, reason: str) -> None:
            with suppress(RuntimeError):  # the loop has ended, and the process is about to
                loop.call_soon_threadsafe(report, state, reason)

        locate(self._entry, report=lambda reason: pass_on(ModelState.DOWNLOADING, reason))
        pass_on(ModelState.LOADING, "")

    async def require_room(self) -> None:
        """Refuse a model that has been planned and does not fit now.

        Raises:
            TooLittleMemory: one of its devices has too little.
        """
        from gateway.engine.loading import require_room

        assert self._plan is not None  # noqa: S101  the caller has planned it
        await asyncio.to_thread(require_room, self._plan)

    async def start(self, report: Report) -> ModelInfo:
        self._is_stopped, self._may_hold_memory = False, True
        engine, info = await self._load_in_turn()
        await self._start_engine(engine)
        self._engine = engine
        self._watch = asyncio.create_task(self._watch_engine(report))
        return info

    def _make_plan(self) -> LoadPlan:
        _import_libraries()
        from gateway.engine.loading import plan_load

        plan = plan_load(self._entry)
        if self._fingerprint and plan.info.fingerprint != self._fingerprint:  # before gigabytes are loaded for nothing
            raise LoadError(
                "the checkpoint's files have changed: these would be vectors of another space. Put the files back, or "
                "restart the gateway"
            )
        self._fingerprint = plan.info.fingerprint
        return plan

    def _load(self) -> tuple[Engine, ModelInfo]:
        # Taken once: reloading the engine re-reads the checkpoint.
        plan, self._plan = self._plan or self._make_plan(), None
        try:
            return _load_engine(plan, self._settings)
        except TooLittleMemory:
            self._plan = plan  # for the next attempt, when there is room
            raise

    async def _load_in_turn(self) -> tuple[Engine, ModelInfo]:
        return await self._residents.load(lambda: asyncio.to_thread(self._load))

    async def _start_engine(self, engine: Engine) -> None:
        """Start an engine, and find a text that it can embed: the one that the watchdog asks.

        Raises:
            LoadError: it fails on every text.
        """
        await engine.astart()
        try:
            for self._question in _QUESTIONS:
                if not (problem := await self._try(engine, 0)):
                    return
            raise LoadError(problem)
        except RequestError as error:
            await engine.astop()
            raise LoadError(f"it does not embed {self._question!r}: {error.message}") from error
        except BaseException:
            await engine.astop()
            raise

    async def embed(self, job: EmbedJob) -> Embeddings:
        return await self._running().submit(job)

    async def vocabulary(self) -> Vocabulary:
        return self._running().encoders[0].tokenizer

    def _running(self) -> Engine:
        if self._is_stopped:
            raise ShuttingDown("the gateway is shutting down", retry_after_s=5)
        if self._engine is None:
            raise ModelNotReady(f"model {self._entry.id!r} is not loaded", retry_after_s=5)
        return self._engine

    async def stop(self) -> None:
        self._is_stopped = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait((self._watch,))
            self._watch = None  # the traceback of its end holds the engine
        holders = None
        if self._engine is not None:
            await self._engine.astop()
            holders, self._engine = self._engine.holders(), None
        if self._may_hold_memory:
            self._may_hold_memory = False
            await asyncio.to_thread(_free_memory, holders)

    # ------------------------------------------------------------------------------------------------- watchdog

    async def _watch_engine(self, report: Report) -> None:
        while self._engine is not None:
            reason = await self._until_wrong(self._engine)
            await self._replace(self._engine, reason, report)

    async def _until_wrong(self, engine: Engine) -> str:
        """Watch an engine until it has to be replaced, and return why. While it is asked something, the watch goes on."""
        limit_s = self._settings.forward_timeout_s
        interval_s = min(1.0, limit_s / 4)
        stopwatch = _Stopwatch(2 * interval_s, time.monotonic())
        next_recheck = time.monotonic() + self._settings.golden_interval_s
        question: asyncio.Task[str] | None = None
        try:
            while True:
                await asyncio.sleep(interval_s)
                replicas, now = range(engine.num_replicas), time.monotonic()
                busy_s = stopwatch.look([engine.busy_since(replica) for replica in replicas], now)
                if busy_s > limit_s:
                    return f"a forward has been running for {busy_s:.0f} s, the limit is {limit_s:.0f} s"
                if question is not None and question.done():
                    if reason := question.result():
                        return reason
                    question = None
                if question is not None:
                    continue
                suspects = [one for one in replicas if engine.num_failed_in_a_row(one) >= _SUSPICIOUS_FAILURES]
                if suspects:
                    question = asyncio.create_task(self._ask(self._try(engine, one) for one in suspects))
                elif now >= next_recheck:
                    next_recheck = now + self._settings.golden_interval_s
                    question = asyncio.create_task(self._ask(engine.recheck(limit_s, one) for one in replicas))
        finally:
            if question is not None:
                question.cancel()

    async def _try(self, engine: Engine, replica: int) -> str:
        deadline = time.monotonic() + self._settings.forward_timeout_s
        try:
            await engine.submit(EmbedJob([self._question], None, Truncate.END, deadline, caller="watchdog"), replica)
        except InternalError as error:
            return f"it fails on every text: {error.message}"
        return ""

    async def _ask(self, questions: Iterable[Awaitable[str]]) -> str:
        """Return the first problem that a question finds; a model that cannot be asked counts as healthy."""
        for question in questions:
            try:
                if reason := await question:
                    return reason
            except (
                Exception
            ) as error:  # a full queue, for example, says nothing about the model, and must not end the watch
                log.warning("watchdog_not_answered", model=self._entry.id, error=repr(error))
        return ""

    async def _replace(self, engine: Engine, reason: str, report: Report) -> None:
        """Reload the model, until that succeeds."""
        log.error("engine_lost", model=self._entry.id, reason=reason)
        report(ModelState.RECOVERING, reason)
        self._engine = None  # its weights have to go before there is room for them again
        engine.give_up(
            lambda: ModelRecovering(f"model {self._entry.id!r} is being reloaded: {reason}", retry_after_s=5)
        )
        del engine
        await asyncio.to_thread(_free_memory)
        pause_s = 1.0
        while True:
            metrics.ENGINE_RESTARTS.labels(self._entry.id).inc()
            try:
                replacement, _info = await self._load_in_turn()
                await self._start_engine(replacement)
            except Exception as error:  # loading may raise anything; the next attempt may find the device well again
                log.exception("engine_restart_failed", model=self._entry.id, pause_s=pause_s)
                report(ModelState.RECOVERING, f"{reason}; reloading it failed: {error}")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_BACKOFF_S)
            else:
                self._engine = replacement
                report(ModelState.READY, "")
                log.info("engine_restarted", model=self._entry.id)
                return


class _Stopwatch:
    """Measures for how long the same forwards have been running, in time that the watchdog has seen pass.

    A process that was stopped, or a machine that was asleep, has not computed meanwhile: between two looks no more than
    ``longest_look_s`` counts, whatever the clock says.
    """

    def __init__(self, longest_look_s: float, now: float) -> None:
        self._longest_look_s = longest_look_s
        self._looked_at = now
        self._seen: dict[int, tuple[float, float]] = {}  # when a replica's forward began, and how long it was seen

    def look(self, busy_since: Sequence[float | None], now: float) -> float:
        """Return the seconds of the forward that has been running longest; 0 if none is.

        Args:
            busy_since: when each replica's forward began.
        """
        elapsed_s = min(now - self._looked_at, self._longest_look_s)
        self._looked_at = now
        before, self._seen = self._seen, {}
        for replica, started in enumerate(busy_since):
            if started is not None:
                last_started, seen_s = before.get(replica, (None, 0.0))
                is_same = last_started == started
                self._seen[replica] = (started, seen_s + elapsed_s if is_same else min(now - started, elapsed_s))
        return max((seen_s for _started, seen_s in self._seen.values()), default=0.0)


@cache
def _import_libraries() -> None:
    """Import what loads models: takes seconds, so not on the event loop, and not for a command that loads nothing.

    What has been imported stays for good, so the garbage collector need not look at it: half a million objects, at which
    a full collection stops every request for 0.3 s.
    """
    import gateway.engine.loading  # noqa: F401

    gc.collect()
    gc.freeze()


def _load_engine(plan: LoadPlan, settings: Settings) -> tuple[Engine, ModelInfo]:
    from gateway.engine.devices import is_out_of_memory
    from gateway.engine.loading import load_engine

    try:
        engine = load_engine(plan, settings)
        return engine, plan.as_loaded(engine).info
    except TooLittleMemory:
        raise
    except Exception as error:  # the libraries raise anything
        if not is_out_of_memory(error.__cause__ or error):
            raise
        reason = str(error)
    # Outside of the handler: the old error holds what had been loaded.
    raise TooLittleMemory(f"too little memory on {plan.device}, although the plan fitted: {reason}", plan.device)


def _free_memory(holders: Sequence[ReferenceType[object]] | None = None) -> None:
    """Give back the memory of an engine that was stopped or given up.

    Args:
        holders: what held its weights. If cycles of references still hold some of it, which is so after the first load of a
            process, all garbage is collected: every request stops for some tenths of a second. ``None``: collect anyway.
    """
    from gateway.engine.devices import release_memory, trim_host_memory

    if holders is None or any(holder() is not None for holder in holders):
        gc.collect()
    release_memory()
    trim_host_memory()
