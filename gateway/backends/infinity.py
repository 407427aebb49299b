"""Run a model in this process, on an embedded Infinity engine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.embedding import Embeddings, EmbedJob, ModelInfo
from gateway.errors import ModelNotReady

if TYPE_CHECKING:
    from gateway.engine.engine import Engine


class InfinityBackend:
    """The :class:`~gateway.backends.base.Backend` of a model that runs here."""

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        self._entry = entry
        self._settings = settings
        self._engine: Engine | None = None

    async def start(self) -> ModelInfo:
        engine, info = await asyncio.to_thread(self._load)
        await engine.astart()
        self._engine = engine
        return info

    def _load(self) -> tuple[Engine, ModelInfo]:
        # Imports torch, which takes seconds: not on the event loop, and not for a command that loads nothing.
        from gateway.engine.loading import load_engine, plan_load

        plan = plan_load(self._entry)
        return load_engine(plan, self._settings), plan.info

    async def embed(self, job: EmbedJob) -> Embeddings:
        if self._engine is None:
            raise ModelNotReady(f"model {self._entry.id!r} is not loaded", retry_after_s=5)
        return await self._engine.submit(job)

    async def stop(self) -> None:
        if self._engine is not None:
            await self._engine.astop()
