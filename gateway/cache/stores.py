"""Where entries are kept besides the memory, and what happens when that place is away, slow or full: nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import structlog

from gateway.cache.entries import Part
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

# An answer that takes longer is given up: computing most texts is faster.
PATIENCE_S = 0.25
# No request waits for what is written.
_WRITING_S = 5.0
# A place that failed costs one request the patience, not every request.
_SILENCE_S = 5.0
# Entries that are on their way there; more are not kept.
_MAX_WAITING_BYTES = 64 * 2**20


class Store(Protocol):
    """A place for entries that lasts longer than the process, or is shared with others."""

    name: str

    async def get(self, part: Part, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return entries that are undamaged, ``None`` for those that are not there."""

    async def put(self, part: Part, entries: Mapping[bytes, bytes]) -> None:
        """Keep entries."""

    async def forget(self, part: Part) -> None:
        """Forget all entries with the weights of a part."""

    async def close(self) -> None:
        """Close connections and files."""


class Guarded:
    """A store that never fails a request, and delays it by a quarter of a second at most, at most every five seconds.

    What a store should forget, it forgets before it is asked again.

    Args:
        model: for the log and the metrics.
    """

    def __init__(self, model: str, store: Store) -> None:
        self._model = model
        self._store = store
        self._silent_until = 0.0
        self._num_waiting_bytes = 0
        self._to_forget: dict[str, Part] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.name = store.name
        metrics.CACHE_ERRORS.labels(model, store.name)  # at 0: the first error is an increase then

    async def get(self, part: Part, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return entries, ``None`` for those that are not there or do not come in time."""
        if time.monotonic() >= self._silent_until:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._forget_first()
                    return await self._store.get(part, keys)
            except Exception as error:  # whatever a disk or a server does: the texts can be computed
                self._note(error)
        return [None] * len(keys)

    def put(self, part: Part, entries: Mapping[bytes, bytes]) -> None:
        """Keep entries, at some time; drop them if too many wait."""
        num_bytes = sum(map(len, entries.values()))
        if time.monotonic() < self._silent_until or self._num_waiting_bytes + num_bytes > _MAX_WAITING_BYTES:
            metrics.CACHE_ERRORS.labels(self._model, self.name).inc()
            return
        self._num_waiting_bytes += num_bytes
        task = asyncio.create_task(self._put(part, entries, num_bytes))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _put(self, part: Part, entries: Mapping[bytes, bytes], num_bytes: int) -> None:
        try:
            async with asyncio.timeout(_WRITING_S):
                await self._forget_first()
                await self._store.put(part, entries)
        except Exception as error:  # as above
            self._note(error)
        finally:
            self._num_waiting_bytes -= num_bytes

    def forget(self, parts: Sequence[Part]) -> None:
        """Forget all entries with the weights of these parts, before anything else is asked or kept."""
        for task in self._tasks:
            task.cancel()
        self._to_forget |= {part.group: part for part in parts}

    async def _forget_first(self) -> None:
        while self._to_forget:
            group, part = next(iter(self._to_forget.items()))
            await self._store.forget(part)
            self._to_forget.pop(group, None)

    async def flush(self) -> None:
        """Wait until everything is kept that waits."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Keep what waits, if that is quick, and close connections and files."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=PATIENCE_S)
        for task in self._tasks:
            task.cancel()
        await self.flush()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._forget_first()
        except Exception as error:  # as above
            self._note(error)
        await self._store.close()

    def _note(self, error: Exception) -> None:
        self._silent_until = time.monotonic() + _SILENCE_S
        metrics.CACHE_ERRORS.labels(self._model, self.name).inc()
        reason = str(error) or type(error).__name__
        log.warning("cache_store_failed", model=self._model, store=self.name, error=reason, seconds=_SILENCE_S)
