"""Entries in Redis, which replicas share, and which survive a restart."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import OutOfMemoryError, RedisError

from gateway.cache.entries import Part
from gateway.cache.files import CacheError

_PREFIX = b"gateway:cache:"
_MAX_CONNECTIONS = 8
# Redis serves no other request while it reads or writes a large value.
_LARGEST_ENTRY_BYTES = 2**20
_LONGEST_TTL_S = 1e9
"""Thirty years: Redis refuses a time that it cannot count in milliseconds."""
_HEADER_BYTES = 8


class RedisStore:
    """A :class:`~gateway.cache.stores.Store` in Redis: ``gateway:cache:<24 hex>:<32 hex>``, each with its time to live.

    A value is ``uint32 crc32 of the rest, uint32 generation, entry``. The generation of a model's weights is a random
    number in Redis, which is read together with the entries. Another number invalidates all entries at once, for every
    replica. So does its absence, because a full Redis may evict any key.

    Args:
        ttl_s: the lifetime of an entry, in seconds. Redis itself limits the memory: ``maxmemory-policy allkeys-lru``.
    """

    name = "redis"

    def __init__(self, uri: str, ttl_s: float, timeout_s: float) -> None:
        timeouts = dict.fromkeys(("timeout", "socket_timeout", "socket_connect_timeout"), timeout_s)
        self._pool = BlockingConnectionPool.from_url(uri, max_connections=_MAX_CONNECTIONS, **timeouts)
        self._redis = Redis(connection_pool=self._pool)
        self._ttl_ms = max(1, round(min(ttl_s, _LONGEST_TTL_S) * 1000))
        self._generations: dict[str, int] = {}

    async def get(self, part: Part, keys: Sequence[bytes]) -> list[bytes | None]:
        async with self._connecting_again():
            generation, *values = await self._redis.mget([_generation_key(part), *(_key(part, key) for key in keys)])
        if generation is None:
            self._generations.pop(part.group, None)
            return [None] * len(keys)
        self._generations[part.group] = current = int(generation)
        return [_read(key, value, current) for key, value in zip(keys, values, strict=True)]

    async def put(self, part: Part, entries: Mapping[bytes, bytes]) -> None:
        async with self._connecting_again():
            await self._put(part, entries)

    async def _put(self, part: Part, entries: Mapping[bytes, bytes]) -> None:
        generation = (await self._generation(part)).to_bytes(4, "little")
        pipeline = self._redis.pipeline(transaction=False)
        for key, entry in entries.items():
            if len(entry) <= _LARGEST_ENTRY_BYTES:
                value = generation + entry
                check = zlib.crc32(value, zlib.crc32(key)).to_bytes(4, "little")
                pipeline.set(_key(part, key), check + value, px=self._ttl_ms)
        # Redis names only the failed command, and a command contains a vector.
        for result in await pipeline.execute(raise_on_error=False):
            if isinstance(result, OutOfMemoryError):
                raise CacheError(
                    "Redis is full and evicts nothing: set its maxmemory-policy to allkeys-lru"
                ) from result
            if isinstance(result, Exception):
                raise result

    async def _generation(self, part: Part) -> int:
        """Return the generation that was last read, or else the one in Redis; begin one if it is missing."""
        if (known := self._generations.get(part.group)) is not None:
            return known
        key = _generation_key(part)
        await self._redis.set(key, secrets.randbits(32), nx=True)
        self._generations[part.group] = found = int(await self._redis.get(key) or 0)
        return found

    async def forget(self, part: Part) -> None:
        self._generations.pop(part.group, None)
        async with self._connecting_again():
            await self._redis.delete(_generation_key(part))  # which a full Redis does too

    @asynccontextmanager
    async def _connecting_again(self) -> AsyncIterator[None]:
        """Close idle connections after an error: after a failover, they lead to a server that no longer accepts writes."""
        try:
            yield
        except RedisError:
            await self._pool.disconnect(inuse_connections=False)
            raise

    async def close(self) -> None:
        await self._pool.disconnect()


def _key(part: Part, key: bytes) -> bytes:
    return _PREFIX + part.name.encode() + b":" + key.hex().encode()


def _generation_key(part: Part) -> bytes:
    return _PREFIX + b"generation:" + part.group.encode()


def _read(key: bytes, value: bytes | str | None, generation: int) -> bytes | None:
    """Return the entry in a value; ``None`` if it is damaged or was invalidated."""
    if not isinstance(value, bytes) or len(value) <= _HEADER_BYTES:
        return None
    is_whole = zlib.crc32(value[4:], zlib.crc32(key)).to_bytes(4, "little") == value[:4]
    return (
        value[_HEADER_BYTES:] if is_whole and int.from_bytes(value[4:_HEADER_BYTES], "little") == generation else None
    )
