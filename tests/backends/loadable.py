"""Models without a checkpoint that are loaded on demand into a memory of a given size, and a clock that a test controls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.backends.base import Report
from gateway.backends.fake import FakeBackend, fake_info
from gateway.backends.on_demand import Clock, OnDemandBackend
from gateway.backends.residents import Residents
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import TooLittleMemory
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Truncate


@dataclass(eq=False)
class SteeredTimer:
    due: float
    call: Callable[[], None]
    is_canceled: bool = False

    def cancel(self) -> None:
        self.is_canceled = True


class SteeredClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.time = time.monotonic()
        self.timers: list[SteeredTimer] = []
        self.clock = Clock(lambda: self.time, self._call_later)

    def _call_later(self, delay_s: float, call: Callable[[], None]) -> SteeredTimer:
        self.timers.append(SteeredTimer(self.time + delay_s, call))
        return self.timers[-1]

    def advance(self, seconds: float) -> None:
        self.time += seconds
        for timer in [timer for timer in self.timers if timer.due <= self.time]:
            self.timers.remove(timer)
            if not timer.is_canceled:
                timer.call()


class Loadable(FakeBackend):
    """A fake that takes up memory while it runs.

    Attributes:
        gate: a load ends when it is open.
        error: raised by the next loads.
        held: texts whose jobs wait until ``release`` is set.
    """

    def __init__(self, info: ModelInfo, machine: Machine) -> None:
        super().__init__(info)
        self.gate = asyncio.Event()
        self.gate.set()
        self.has_begun = asyncio.Event()
        self.release = asyncio.Event()
        self.error: Exception | None = None
        self.num_loads = 0
        self._machine = machine

    async def require_room(self) -> None:
        missing = self._info.memory_bytes - self._machine.free
        if missing > 0:
            raise TooLittleMemory(f"too little memory on cpu: {missing} are missing", "cpu", missing)

    async def start(self, report: Report = lambda _state, _reason: None) -> ModelInfo:
        return await self._machine.residents.load(lambda: self._load(report))

    async def _load(self, report: Report) -> ModelInfo:
        await self.require_room()
        self.num_loads += 1
        self._machine.num_loading += 1
        self.has_begun.set()
        try:
            assert self._machine.num_loading == 1
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            await self.require_room()
            self._machine.free -= self._info.memory_bytes
            return await super().start(report)
        finally:
            self._machine.num_loading -= 1

    async def embed(self, job: EmbedJob) -> Embeddings:
        assert self._is_running
        if "held" in job.texts:
            await self.release.wait()
        assert self._is_running, "it was stopped with work in flight"
        return await super().embed(job)

    async def stop(self) -> None:
        await asyncio.sleep(0)
        if self._is_running:
            self._machine.free += self._info.memory_bytes
        await super().stop()


class Machine:
    """A machine with some memory, and the models on it."""

    def __init__(self, free: int = 100, **settings: object) -> None:
        self.free = free
        self.num_loading = 0
        self.residents = Residents()
        self.time = SteeredClock()
        self.settings = Settings(**settings)
        self.inner: dict[str, Loadable] = {}
        self.states: dict[str, list[tuple[str, str]]] = {}

    def make(self, name: str, size: int = 10, *, idle_unload_s: float | None = None, **info: object) -> OnDemandBackend:
        """Return the backend of a model that takes ``size`` of the memory."""
        entry = make_entry(name, idle_unload_s)
        self.inner[name] = Loadable(fake_info(name, memory_bytes=size, **info), self)
        return OnDemandBackend(entry, self.inner[name], self.settings, self.residents, self.time.clock)

    async def start(self, name: str, size: int = 10, *, idle_unload_s: float | None = None) -> OnDemandBackend:
        """Return the started backend of a model; its states are written down."""
        backend = self.make(name, size, idle_unload_s=idle_unload_s)
        states = self.states.setdefault(name, [])

        def report(state: ModelState, reason: str) -> None:
            states.append((state.value, reason))

        await backend.start(report)
        return backend

    def job(self, *texts: str, seconds: float = 60.0, may_wait: bool = True) -> EmbedJob:
        deadline = self.time.time + seconds
        return EmbedJob(texts or ("a b",), None, Truncate.END, deadline, "someone", may_wait=may_wait)


def make_entry(name: str, idle_unload_s: float | None = None) -> ModelEntry:
    return ModelEntry.model_validate(
        {"id": name, "source": f"./{name}", "enabled": True, "load": "on_demand", "idle_unload_s": idle_unload_s},
        context={"folder": Path()},
    )


async def settle() -> None:
    """Let all tasks run until they wait."""
    for _ in range(30):
        await asyncio.sleep(0)
