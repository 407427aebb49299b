"""The cache of one model, between the service and the backend. The backend gets only the texts that are not cached."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np
import structlog

from gateway.cache.entries import Part, entries_of, is_usable, num_tokens_of, part_of
from gateway.cache.joining import complete, joined
from gateway.cache.keys import key_of
from gateway.cache.memory import MemoryStats, MemoryStore
from gateway.cache.stores import Guarded
from gateway.errors import BadInput, RequestError
from gateway.telemetry import metrics
from gateway.types import (
    Embeddings,
    EmbedJob,
    ModelInfo,
    ModelKind,
    Output,
    Timings,
    Truncate,
)

log = structlog.get_logger(__name__)

# Hashing this number of characters takes about a millisecond; more are hashed in a thread.
_SMALL_CHARACTERS = 500_000
_NOTHING = Embeddings(np.zeros((0, 0), np.float32), [], [], Timings(0.0, 0.0, 0.0))
_KEPT = (Output.DENSE, Output.SPARSE, Output.MULTIVECTOR)


class ModelCache:
    """Answers jobs from the entries of earlier jobs where possible, and has the other texts computed.

    The cache is exact: an entry is found by the hash of its text and of everything else that its vectors depend on. Pairs,
    late chunks and token states are always computed.

    Args:
        model: the model's id, for the metrics.
        max_bytes: the limit of the entries in memory.
        store: a further store of entries, or ``None``.
        is_remote: see :func:`gateway.cache.entries.part_of`.
        is_per_client: never serve a client entries that were computed for another client.
    """

    def __init__(
        self, model: str, max_bytes: int, store: Guarded | None, *, is_remote: bool, is_per_client: bool
    ) -> None:
        self._model = model
        self._memory = MemoryStore(max_bytes, self._note_change)
        self._store = store
        self._is_remote = is_remote
        self._is_per_client = is_per_client
        self._info: ModelInfo | None = None
        self._parts: dict[tuple[str | None, Truncate | None, Output], Part] = {}
        self._num_forgotten = 0
        self._num_texts = self._num_missed = 0
        self._num_bytes = metrics.CACHE_BYTES.labels(model)
        self._num_evicted = metrics.CACHE_EVICTIONS.labels(model)
        self._hits = metrics.CACHE_TEXTS.labels(model, "memory")
        self._misses = metrics.CACHE_TEXTS.labels(model, "miss")
        self._stored = metrics.CACHE_TEXTS.labels(model, "miss" if store is None else store.name)

    def _note_change(self, change: int, num_evicted: int) -> None:
        self._num_bytes.inc(change)
        self._num_evicted.inc(num_evicted)

    @property
    def hit_rate(self) -> float | None:
        """The fraction of all texts that came from the cache; ``None`` before the first text."""
        return 1 - self._num_missed / self._num_texts if self._num_texts else None

    async def embed(
        self, job: EmbedJob, info: ModelInfo, compute: Callable[[EmbedJob], Awaitable[Embeddings]]
    ) -> Embeddings:
        """Embed the texts of a job.

        Args:
            info: the model's current info.
            compute: embeds the texts of a job on the backend.

        Raises:
            RequestError: ``compute`` raised it.
        """
        parts = self._parts_of(job, info)
        if not parts:
            return await compute(job)
        keys = await self._keys(job)
        found = await self._find(keys, parts, job.truncate)
        missing = [i for i, entries in enumerate(found) if entries is None]
        self._misses.inc(len(missing))
        self._num_texts += len(found)
        self._num_missed += len(missing)
        num_cached = len(found) - len(missing)
        num_tokens = sum(num_tokens_of(entries[0]) for entries in found if entries is not None)
        if not missing:
            if not self._is_remote:  # servers do not check it either, and may report any number
                job.check_total(num_tokens)
            return joined(found, missing, _NOTHING, parts, info)
        rest = job
        if num_cached:
            rest = replace(
                job,
                texts=[job.texts[i] for i in missing],
                max_total_tokens=None,
                on_tokens=lambda num_others: job.check_total(num_tokens + num_others),
            )
        num_forgotten = self._num_forgotten
        try:
            result = await compute(rest)
        except RequestError as error:
            if not num_cached or not (isinstance(error, BadInput) or error.is_permanent):
                raise
            # The error counts the remaining texts, and perhaps their tokens. Without the cache, it counts those of the
            # request.
            return await compute(job)
        if result.vectors.shape != (len(missing), info.width):
            return result if not num_cached else await compute(job)  # the service reports the problem
        if num_forgotten == self._num_forgotten:
            self._keep([keys[i] for i in missing], rest, result, parts)
        return joined(found, missing, result, parts, info) if num_cached else replace(result, num_cached=0)

    def _parts_of(self, job: EmbedJob, info: ModelInfo) -> list[Part]:
        """Return the parts that a job needs; empty if the job cannot use the cache."""
        if info.kind is not ModelKind.EMBED:
            return []
        is_plain = job.query is None and job.firsts is None and job.scorer is None and job.max_text_tokens is None
        if not is_plain or job.is_late_chunked or not job.texts or not job.outputs <= set(_KEPT):
            return []
        if self._info is not info:
            self._info = info
            self._parts.clear()
            if not self._memory.holds(4 * info.width):
                log.warning(
                    "cache_too_small",
                    model=self._model,
                    dimensions=info.width,
                    reason="an entry takes an eighth of `max_bytes` at most, so no vector is kept in memory: raise it",
                )
        parts = []
        for output in _KEPT:
            # A model with dense vectors always computes them, and they are used to check the answer.
            is_needed = info.width > 0 if output is Output.DENSE else output in job.outputs
            if is_needed:
                place = (job.task, job.truncate if self._is_remote else None, output)
                if (part := self._parts.get(place)) is None:
                    part = self._parts[place] = part_of(
                        info, job, output, is_remote=self._is_remote, is_per_client=self._is_per_client
                    )
                parts.append(part)
        return parts

    async def _keys(self, job: EmbedJob) -> list[bytes]:
        def keys() -> list[bytes]:
            if not self._is_per_client:
                return [key_of(text) for text in job.texts]
            return [key_of(f"{job.caller}\0{text}") for text in job.texts]

        if sum(map(len, job.texts)) <= _SMALL_CHARACTERS:
            return keys()
        return await asyncio.to_thread(keys)

    async def _find(self, keys: Sequence[bytes], parts: Sequence[Part], truncate: Truncate) -> list[list[bytes] | None]:
        """Return the entries of each text, in the order of the parts; ``None`` if any entry of a text is missing."""
        found = [complete(key, parts, truncate, self._memory.get) for key in keys]
        missing = {key for key, entries in zip(keys, found, strict=True) if entries is None}
        self._hits.inc(sum(entries is not None for entries in found))
        if not missing or self._store is None:
            return found
        fetched: dict[bytes, bytes] = {}
        for part in parts:
            wanted = list(missing)
            for key, entry in zip(wanted, await self._store.get(part, wanted), strict=True):
                if entry is not None and is_usable(entry, part):
                    fetched[part.prefix + key] = entry
                    self._memory.put(part.prefix + key, entry)
                else:
                    missing.remove(key)
        for i, key in enumerate(keys):
            if found[i] is None:
                found[i] = complete(key, parts, truncate, fetched.get)
                self._stored.inc(found[i] is not None)
        return found

    def _keep(self, keys: Sequence[bytes], job: EmbedJob, result: Embeddings, parts: Sequence[Part]) -> None:
        new = entries_of(result, job, parts, is_remote=self._is_remote)
        for place, part in enumerate(parts):
            entries = {key: row[place] for key, row in zip(keys, new, strict=True) if row is not None}
            for key, entry in entries.items():
                self._memory.put(part.prefix + key, entry)
            if self._store is not None and entries:
                self._store.put(part, entries)

    def forget(self) -> None:
        """Forget everything, including entries that are being computed, because some may be wrong."""
        self._num_forgotten += 1
        self._memory.clear()
        if self._store is not None:
            self._store.forget(list(self._parts.values()))

    def stats(self) -> MemoryStats:
        """Return the size of the entries in memory."""
        return MemoryStats(len(self._memory), self._memory.num_bytes)

    async def close(self) -> None:
        """Release the memory, and close connections and files."""
        self._num_forgotten += 1
        self._memory.clear()
        if self._store is not None:
            await self._store.close()
