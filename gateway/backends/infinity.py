"""Run a model in this process, on an embedded Infinity engine, and replace the engine when it hangs or breaks."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable
from functools import cache
from typing import TYPE_CHECKING

import structlog

from gateway.backends.base import Report
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.embedding import Embeddings, EmbedJob, ModelInfo, ModelState, Truncate, Vocabulary
from gateway.errors import InternalError, LoadError, ModelNotReady, ModelRecovering, ShuttingDown
from gateway.telemetry import metrics

if TYPE_CHECKING:
    from gateway.engine.engine import Engine
    from gateway.engine.loading import LoadPlan

log = structlog.get_logger(__name__)

# A poisoned request can fail a few batches by itself; from here on the model is asked whether it still works.
_SUSPICIOUS_FAILURES = 3
_LONGEST_BACKOFF_S = 60.0


class InfinityBackend:
    """The :class:`~gateway.backends.base.Backend` of a model that runs here.

    A watchdog looks at the engine. When a forward takes longer than ``forward_timeout_s``, or the model fails on a text
    that it should know, everybody who waits gets a 503, and the model is loaded anew, with growing pauses between
    attempts that fail; until then it is ``recovering``.
    """

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        self._entry = entry
        self._settings = settings
        self._plan: LoadPlan | None = None
        self._fingerprint = ""
        self._engine: Engine | None = None
        self._is_stopped = False
        self._watch: asyncio.Task[None] | None = None
        metrics.ENGINE_RESTARTS.labels(entry.id)  # at 0: the first restart is an increase then

    async def plan(self) -> ModelInfo:
        self._plan = await asyncio.to_thread(self._make_plan)
        return self._plan.info

    async def start(self, report: Report) -> ModelInfo:
        engine, info = await asyncio.to_thread(self._load)
        await engine.astart()
        self._engine = engine
        self._fingerprint = info.fingerprint
        self._watch = asyncio.create_task(self._watch_engine(report))
        return info

    def _make_plan(self) -> LoadPlan:
        _import_libraries()
        from gateway.engine.loading import plan_load

        return plan_load(self._entry)

    def _load(self) -> tuple[Engine, ModelInfo]:
        _import_libraries()
        from gateway.engine.loading import load_engine

        # Taken once: an engine that is loaded anew reads the checkpoint anew.
        plan, self._plan = self._plan or self._make_plan(), None
        return load_engine(plan, self._settings), plan.info

    async def embed(self, job: EmbedJob) -> Embeddings:
        return await self._running().submit(job)

    def vocabulary(self) -> Vocabulary:
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
        if self._engine is not None:
            await self._engine.astop()
            self._engine = None
            await asyncio.to_thread(_free_memory)

    # ------------------------------------------------------------------------------------------------- watchdog

    async def _watch_engine(self, report: Report) -> None:
        interval_s = min(1.0, self._settings.forward_timeout_s / 4)
        next_recheck = time.monotonic() + self._settings.golden_interval_s
        while self._engine is not None:
            await asyncio.sleep(interval_s)
            reason = await self._what_is_wrong(self._engine)
            if not reason and time.monotonic() >= next_recheck:
                reason = await self._ask(self._engine.recheck(self._settings.forward_timeout_s))
            if reason:
                await self._replace(self._engine, reason, report)
            if time.monotonic() >= next_recheck:
                next_recheck = time.monotonic() + self._settings.golden_interval_s

    async def _what_is_wrong(self, engine: Engine) -> str:
        """Return why the engine has to be replaced; empty if it need not be."""
        busy_s = engine.busy_s()
        if busy_s > self._settings.forward_timeout_s:
            return (
                f"a forward has been running for {busy_s:.0f} s, the limit is {self._settings.forward_timeout_s:.0f} s"
            )
        if engine.num_failed_in_a_row() < _SUSPICIOUS_FAILURES:
            return ""
        return await self._ask(self._try(engine))

    async def _try(self, engine: Engine) -> str:
        deadline = time.monotonic() + self._settings.forward_timeout_s
        try:
            await engine.submit(EmbedJob(["Does it still work?"], None, Truncate.END, deadline, caller="watchdog"))
        except InternalError as error:
            return f"it fails on every text: {error.message}"
        return ""

    async def _ask(self, question: Awaitable[str]) -> str:
        """Return what a question to the model found wrong; nothing if the model could not be asked."""
        try:
            return await question
        except Exception as error:  # a full queue, say: tells nothing about the model, and must not end the watch
            log.warning("watchdog_not_answered", model=self._entry.id, error=repr(error))
            return ""

    async def _replace(self, engine: Engine, reason: str, report: Report) -> None:
        """Load the model anew, until that succeeds."""
        log.error("engine_lost", model=self._entry.id, reason=reason)
        report(ModelState.RECOVERING, reason)
        self._engine = None  # its weights have to go before there is room for them again
        engine.give_up(
            lambda: ModelRecovering(f"model {self._entry.id!r} is being loaded anew: {reason}", retry_after_s=5)
        )
        del engine
        await asyncio.to_thread(_free_memory)
        pause_s = 1.0
        while True:
            metrics.ENGINE_RESTARTS.labels(self._entry.id).inc()
            try:
                replacement, info = await asyncio.to_thread(self._load)
                if info.fingerprint != self._fingerprint:
                    raise LoadError("the checkpoint's files have changed: these would be vectors of another space")
                await replacement.astart()
            except Exception as error:  # loading may raise anything; the next attempt may find the device well again
                log.exception("engine_restart_failed", model=self._entry.id, pause_s=pause_s)
                report(ModelState.RECOVERING, f"{reason}; loading it anew failed: {error}")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_BACKOFF_S)
            else:
                self._engine = replacement
                report(ModelState.READY, "")
                log.info("engine_restarted", model=self._entry.id)
                return


@cache
def _import_libraries() -> None:
    """Import what loads models: takes seconds, so not on the event loop, and not for a command that loads nothing.

    What has been imported stays for good, so the garbage collector need not look at it: half a million objects, at which
    a full collection stops every request for 0.3 s.
    """
    import gateway.engine.loading  # noqa: F401

    gc.collect()
    gc.freeze()


def _free_memory() -> None:
    """Give back the memory of an engine that was stopped or given up: cycles of references still hold it."""
    from gateway.engine.devices import release_memory, trim_host_memory

    gc.collect()
    release_memory()
    trim_host_memory()
