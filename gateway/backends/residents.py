"""The turn to load a model into memory, and the models that leave it to make room for another one."""

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
    """A model in memory that may leave it, because it can be loaded again when it is needed."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def is_busy(self) -> bool:
        """Whether it has work in flight."""

    @property
    def used_at(self) -> float:
        """When it was last used, on the clock that all residents share."""

    async def leave(self, reason: str) -> None:
        """Take no more work, finish what is in flight, and release the memory."""


class Residents:
    """The models of this process that may leave the memory, and one turn to load for all models.

    One model is loaded at a time, so that each sees the memory that the others left. Models that stay for good take turns
    here too, but are no residents.

    Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._present: list[Resident] = []

    def add(self, resident: Resident) -> None:
        """Note a model that is in memory now."""
        self._present.append(resident)

    def remove(self, resident: Resident) -> None:
        """Forget a model that has left."""
        self._present.remove(resident)

    async def load(self, load: Callable[[], Awaitable[T]]) -> T:
        """Load a model when its turn comes.

        While the model has too little memory, the one that has been idle for longest leaves, then the one among the busy
        that was used longest ago, once its work is done.

        Raises:
            TooLittleMemory: there is too little even without the models that may leave.
        """
        async with self._turn:
            while True:
                try:
                    return await load()
                except TooLittleMemory as error:
                    shortage = error
                await self._make_room(shortage)

    def can_make_room(self, shortage: TooLittleMemory) -> bool:
        """Return whether the models that may leave a device hold as much as is missing there."""
        on_device = self._on(shortage.device)
        return bool(on_device) and sum(one.info.memory_bytes for one in on_device) >= shortage.missing_bytes

    async def _make_room(self, shortage: TooLittleMemory) -> None:
        if not self.can_make_room(shortage):
            raise shortage
        leaving = min(self._on(shortage.device), key=lambda one: (one.is_busy, one.used_at))
        log.info("model_makes_room", model=leaving.info.id, device=shortage.device, reason=str(shortage))
        await leaving.leave("memory")

    def _on(self, device: str) -> list[Resident]:
        return [resident for resident in self._present if device in resident.info.devices]
