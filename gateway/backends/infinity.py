"""Run a model in this process, on an embedded Infinity engine, and replace the engine when it hangs or breaks."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING
from weakref import ReferenceType

import structlog

from gateway.backends.base import Report, unreported
from gateway.backends.residents import Residents
from gateway.backends.watchdog import Watchdog
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import (
    CardLostAtLoad,
    LoadError,
    ModelNotReady,
    ModelRecovering,
    RequestError,
    ShuttingDown,
    TooLittleMemory,
)
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Vocabulary

if TYPE_CHECKING:
    from gateway.engine.infinity import Engine
    from gateway.engine.loading import LoadPlan

log = structlog.get_logger(__name__)

_LONGEST_BACKOFF_S = 60.0
_CARD_LOST = "its card was lost, and the gateway is ending so that it can be restarted"


class InfinityBackend:
    """The :class:`~gateway.backends.base.Backend` of a model that runs here.

    A watchdog checks the engine. If a forward takes longer than ``forward_timeout_s``, or a replica fails on a text
    that it has embedded before, all waiting requests get a 503, and the model is reloaded, with growing pauses between
    failed attempts. Until it is loaded again, it is ``recovering``.

    A card on which a forward hangs, or after whose error no call to CUDA succeeds, is lost to this process: nothing is
    reloaded. Its requests get a 503, the replicas on other cards continue, and the process must end.

    Args:
        residents: schedules loads, and makes room in memory.
        on_card_lost: called when a card is lost, with the reason.

    Attributes:
        engine: the engine that serves; ``None`` before the start and while it is replaced.
    """

    def __init__(
        self,
        entry: ModelEntry,
        settings: Settings,
        residents: Residents | None = None,
        on_card_lost: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._entry = entry
        self._settings = settings
        self._residents = residents or Residents()
        self._on_card_lost = on_card_lost
        self._has_lost_card = False
        self._plan: LoadPlan | None = None
        self._fingerprint = ""
        self._watchdog = Watchdog(entry.id, settings)
        self.engine: Engine | None = None
        self._is_stopped = False
        self._stopping = asyncio.Lock()
        self._may_hold_memory = False
        self._watch: asyncio.Task[None] | None = None
        metrics.ENGINE_RESTARTS.labels(entry.id)  # starts at 0, so that the first restart is an increase
        metrics.DEVICES_LOST.labels(entry.id)

    async def plan(self, report: Report = unreported) -> ModelInfo:
        await asyncio.to_thread(self._download, asyncio.get_running_loop(), report)
        self._plan = await asyncio.to_thread(self._make_plan)
        return self._plan.info

    def _download(self, loop: asyncio.AbstractEventLoop, report: Report) -> None:
        """Download the checkpoint if it is not on this machine; before anything is imported, which takes seconds."""
        from gateway.engine.checkpoint.sources import is_whole, locate, require_present

        require_present(self._entry)
        if is_whole(self._entry):
            return

        def pass_on(state: ModelState, reason: str) -> None:
            with suppress(RuntimeError):  # the loop has ended, and the process is about to
                loop.call_soon_threadsafe(report, state, reason)

        locate(self._entry, report=lambda reason: pass_on(ModelState.DOWNLOADING, reason))
        pass_on(ModelState.LOADING, "")

    async def require_room(self) -> None:
        """Reject a planned model that does not fit now.

        Raises:
            TooLittleMemory: one of its devices has too little.
        """
        from gateway.engine.loading import require_room

        assert self._plan is not None  # noqa: S101  the caller has planned it
        await asyncio.to_thread(require_room, self._plan)

    async def may_fit(self) -> bool:
        """Return whether one of its devices has room now; the next plan chooses among them."""
        from gateway.engine.placement import has_room

        plan = self._plan
        return plan is None or await asyncio.to_thread(has_room, plan.devices, plan.memory)

    async def start(self, report: Report) -> ModelInfo:
        self._is_stopped, self._may_hold_memory = False, True
        engine, info = await self._load_in_turn()
        await self._start_engine(engine)
        self.engine = engine
        self._watch = asyncio.create_task(self._watch_engine(report))
        return info

    def _make_plan(self) -> LoadPlan:
        _import_libraries()
        from gateway.engine.loading import plan_load

        plan = plan_load(self._entry, compiled_folder=self._settings.compiled_folder)
        if self._fingerprint and plan.info.fingerprint != self._fingerprint:  # before gigabytes are loaded for nothing
            raise LoadError(
                "the checkpoint's files have changed, so their vectors would be in another space. Restore the files, or "
                "restart the gateway"
            )
        self._fingerprint = plan.info.fingerprint
        return plan

    def _load(self) -> tuple[Engine, ModelInfo]:
        # Used once: reloading the engine re-reads the checkpoint.
        plan, self._plan = self._plan or self._make_plan(), None
        try:
            return load(plan, self._settings)
        except TooLittleMemory:
            self._plan = plan  # for the next attempt, once there is room
            raise

    async def _load_in_turn(self) -> tuple[Engine, ModelInfo]:
        return await self._residents.load(lambda: asyncio.to_thread(self._load))

    @property
    def is_watched(self) -> bool:
        """Whether the watchdog still checks the engine, or replaces it."""
        return self._watch is not None and not self._watch.done()

    async def _start_engine(self, engine: Engine) -> None:
        """Start an engine, and find a text that it can embed, for the watchdog's tests.

        Raises:
            LoadError: it fails on every text.
        """
        await engine.astart()
        try:
            if problem := await self._watchdog.find_question(engine):
                raise LoadError(problem)
        except BaseException as error:  # also a canceled start must free the memory
            await engine.astop()
            if isinstance(error, RequestError):
                raise LoadError(f"it does not embed {self._watchdog.question!r}: {error.message}") from error
            raise

    async def embed(self, job: EmbedJob) -> Embeddings:
        return await self._running().submit(job)

    async def vocabulary(self) -> Vocabulary:
        return self._running().encoders[0].tokenizer

    def _running(self) -> Engine:
        if self._is_stopped:
            raise ShuttingDown("the gateway is shutting down", retry_after_s=5)
        if self.engine is None:
            raise ModelNotReady(f"model {self._entry.id!r} is not loaded", retry_after_s=5)
        return self.engine

    async def stop(self) -> None:
        self._is_stopped = True
        async with self._stopping:  # an unloading and the end of the gateway may stop it at the same time
            await self._stop()

    async def _stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait((self._watch,))
            self._watch = None  # the traceback of its end holds the engine
        holders = None
        if self.engine is not None:
            await self.engine.astop()
            holders, self.engine = self.engine.holders(), None
        if self._may_hold_memory and not self._has_lost_card:  # the process frees it, and a call may hang
            self._may_hold_memory = False
            await asyncio.to_thread(_free_memory, holders)

    # ------------------------------------------------------------------------------------------------------ trouble

    async def _watch_engine(self, report: Report) -> None:
        while self.engine is not None:
            engine, handled = self.engine, set[int]()
            while (trouble := await self._watchdog.until_wrong(engine, handled)).replica is not None:
                handled.add(trouble.replica)
                engine.lose(trouble.replica, trouble.reason)
                self._note_lost_card(engine.device(trouble.replica), trouble.reason)
                if len(handled) == engine.num_replicas:
                    report(
                        ModelState.RECOVERING,
                        f"its card was lost, and the gateway is ending so that it can be restarted: {trouble.reason}",
                    )
                    return
            await self._replace(engine, trouble.reason, report)

    def _note_lost_card(self, device: str, reason: str) -> None:
        self._has_lost_card = True
        log.error("device_lost", model=self._entry.id, device=device, reason=reason)
        metrics.DEVICES_LOST.labels(self._entry.id).inc()
        self._on_card_lost(f"{device}, on which {self._entry.id} runs: {reason}")

    async def _replace(self, engine: Engine, reason: str, report: Report) -> None:
        """Reload the model, until that succeeds."""
        log.error("engine_lost", model=self._entry.id, reason=reason)
        report(ModelState.RECOVERING, reason)
        self.engine = None  # its weights must be released before there is room to load them again
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
            except CardLostAtLoad as error:
                self._note_lost_card(error.device, str(error))
                report(ModelState.RECOVERING, f"{_CARD_LOST}: {error}")
                return
            except Exception as error:  # loading may raise any error; the device may work again at the next attempt
                log.exception("engine_restart_failed", model=self._entry.id, pause_s=pause_s)
                report(ModelState.RECOVERING, f"{reason}; reloading it failed: {error}")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_BACKOFF_S)
            else:
                self.engine = replacement
                report(ModelState.READY, "")
                log.info("engine_restarted", model=self._entry.id)
                return


@cache
def _import_libraries() -> None:
    """Import the modules that load models. This takes seconds: call it off the event loop, and only to load a model.

    The imported modules stay in memory, so the garbage collector need not scan their half million objects: a full
    collection would stop every request for 0.3 s.
    """
    import gateway.engine.loading  # noqa: F401

    gc.collect()
    gc.freeze()


def load(plan: LoadPlan, settings: Settings) -> tuple[Engine, ModelInfo]:
    from gateway.engine.faults import find_lost_card, is_out_of_memory
    from gateway.engine.loading import load_engine

    for note in plan.notes:
        log.warning("device_note", model=plan.entry.id, note=note)
    try:
        engine = load_engine(plan, settings)
        return engine, plan.as_loaded(engine).info
    except TooLittleMemory:
        raise
    except Exception as error:  # the libraries may raise any error
        if (device := find_lost_card(error, plan.devices)) is not None:
            lost = f"{device} was lost while the model was loading, and the gateway must be restarted: {error}"
            raise CardLostAtLoad(lost, device) from error
        if not is_out_of_memory(error.__cause__ or error):
            raise
        reason = str(error)
    # Outside the handler, because the old error keeps the loaded weights alive.
    raise TooLittleMemory(f"too little memory on {plan.device}, although the plan fitted: {reason}", plan.device)


def _free_memory(holders: Sequence[ReferenceType[object]] | None = None) -> None:
    """Release the memory of an engine that was stopped or abandoned.

    Args:
        holders: the objects that held its weights. If reference cycles keep some of them alive, as after the first load
            of a process, all garbage is collected, which stops every request for some tenths of a second. ``None``: always
            collect.
    """
    from gateway.engine.devices import trim_host_memory
    from gateway.engine.faults import release_memory

    if holders is None or any(holder() is not None for holder in holders):
        gc.collect()
    release_memory()
    trim_host_memory()
