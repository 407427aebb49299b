"""Taking turns to load models into memory, and unloading models to make room for others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import structlog

from gateway.errors import TooLittleMemory
from gateway.types import ModelInfo

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Resident(Protocol):
    """A model in memory that may be unloaded, because it can be loaded again on demand."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def is_busy(self) -> bool:
        """Whether it has work in flight."""

    @property
    def used_at(self) -> float:
        """The time of its last use, on the clock that all residents share."""

    async def leave(self, reason: str) -> None:
        """Accept no more work, finish the work in flight, and release the memory."""


class Residents:
    """The models of this process that may be unloaded, and the lock under which models are loaded.

    Only one model is loaded at a time, so that each sees the memory that the others left. Models that stay loaded take
    turns here too, but are not residents.

    An instance belongs to one event loop.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._present: list[Resident] = []

    def add(self, resident: Resident) -> None:
        """Register a model that is now in memory."""
        self._present.append(resident)

    def remove(self, resident: Resident) -> None:
        """Forget a model that was unloaded."""
        self._present.remove(resident)

    async def load(self, load: Callable[[], Awaitable[T]]) -> T:
        """Load a model when its turn comes.

        While there is too little memory, models are unloaded: first the one that has been idle for longest, then the
        least recently used busy one, after its work is done.

        Raises:
            TooLittleMemory: there is too little memory even without the models that may be unloaded.
        """
        async with self._turn:
            while True:
                try:
                    return await load()
                except TooLittleMemory as error:
                    shortage = error
                await self._make_room(shortage)

    def can_make_room(self, shortage: TooLittleMemory) -> bool:
        """Return whether unloading models would free the missing memory of a device."""
        on_device = self._residents_on(shortage.device)
        return bool(on_device) and sum(model.info.memory_bytes for model in on_device) >= shortage.missing_bytes

    async def _make_room(self, shortage: TooLittleMemory) -> None:
        if not self.can_make_room(shortage):
            raise shortage
        leaving = min(self._residents_on(shortage.device), key=lambda model: (model.is_busy, model.used_at))
        log.info("model_makes_room", model=leaving.info.id, device=shortage.device, reason=str(shortage))
        await leaving.leave("memory")

    def _residents_on(self, device: str) -> list[Resident]:
        return [resident for resident in self._present if device in resident.info.devices]
