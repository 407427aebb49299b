"""Stores of entries besides the memory. A store that is unavailable, slow or full never affects a request's result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import structlog

from gateway.cache.entries import Part
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

# The seconds to wait for a store: computing most texts takes less.
PATIENCE_S = 0.25
# The time limit of a write, in seconds; no request waits for writes.
_WRITING_S = 5.0
# The seconds that a failed store is left alone, so that not every request has to wait for it. A store that only cannot
# be written, such as a full one, is still read.
_SILENCE_S = 5.0
# The limit of entries that wait to be written, in bytes; further ones are dropped.
_MAX_WAITING_BYTES = 64 * 2**20


class Store(Protocol):
    """A store of entries that outlives the process or is shared with other processes."""

    name: str

    async def get(self, part: Part, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the undamaged entries, and ``None`` for others."""

    async def put(self, part: Part, entries: Mapping[bytes, bytes]) -> None:
        """Store entries."""

    async def forget(self, part: Part) -> None:
        """Forget all entries with a part's weights."""

    async def close(self) -> None:
        """Close connections and files."""


class Guarded:
    """A store that never fails a request, and delays one by a quarter of a second at most once in five seconds.

    It deletes entries that must be forgotten before it is used again.

    Args:
        model: the model's id, for the log and the metrics.
    """

    def __init__(self, model: str, store: Store) -> None:
        self._model = model
        self._store = store
        self._silent_until = self._unwritten_until = 0.0
        self._num_waiting_bytes = 0
        self._to_forget: dict[str, Part] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.name = store.name
        metrics.CACHE_ERRORS.labels(model, store.name)  # start at 0, so that the first error is an increase

    async def get(self, part: Part, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return entries, and ``None`` for those that are missing or late."""
        if time.monotonic() >= self._silent_until:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._forget_first()
                    return await self._store.get(part, keys)
            except Exception as error:  # the texts can be computed, whatever the error of the disk or server
                self._silent_until = self._note(error)
        return [None] * len(keys)

    def put(self, part: Part, entries: Mapping[bytes, bytes]) -> None:
        """Store entries later; drop them if too many wait."""
        num_bytes = sum(map(len, entries.values()))
        if (
            time.monotonic() < max(self._silent_until, self._unwritten_until)
            or self._num_waiting_bytes + num_bytes > _MAX_WAITING_BYTES
        ):
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
            self._unwritten_until = self._note(error)
        finally:
            self._num_waiting_bytes -= num_bytes

    def forget(self, parts: Sequence[Part]) -> None:
        """Forget all entries with these parts' weights, before any other operation."""
        for task in self._tasks:
            task.cancel()
        self._to_forget |= {part.group: part for part in parts}

    async def _forget_first(self) -> None:
        while self._to_forget:
            group, part = next(iter(self._to_forget.items()))
            await self._store.forget(part)
            self._to_forget.pop(group, None)

    async def flush(self) -> None:
        """Wait until all waiting entries are stored."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Store waiting entries if that is quick, and close connections and files."""
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

    def _note(self, error: Exception) -> float:
        """Report an error; return the time until which the store is left alone."""
        metrics.CACHE_ERRORS.labels(self._model, self.name).inc()
        reason = str(error) or type(error).__name__
        log.warning("cache_store_failed", model=self._model, store=self.name, error=reason, seconds=_SILENCE_S)
        return time.monotonic() + _SILENCE_S
