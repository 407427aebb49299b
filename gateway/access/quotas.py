"""Quotas: the requests and tokens per minute of each client, counted by ``limits``.

Windows are fixed: a minute begins with a client's first request and ends 60 s later. That takes one counter per client,
in memory as in Redis, and OpenAI's headers can express it.

The tokens of a request are known only after tokenization, so they are charged at its end. While a request runs, an estimate
is reserved, so that a client cannot send any number of requests on its last token. So a client can exceed its quota by the
tokens of one request, once per replica. A client that disconnects before its answer is charged the estimate, because the
work may already be done.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog
from limits import RateLimitItem, RateLimitItemPerMinute, WindowStats
from limits.aio.storage import RedisStorage, Storage
from limits.errors import StorageError

from gateway.access.keyring import Client
from gateway.errors import ClientDisconnected, ConfigError, Problem, RateLimited
from gateway.telemetry import metrics

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

log = structlog.get_logger(__name__)

# English has about four characters per token in the tokenizers of these models.
_CHARACTERS_PER_TOKEN: Final = 4
_REDIS_SCHEMES: Final = ("redis://", "rediss://", "unix://")
_MAX_CONNECTIONS: Final = 16
_STORAGE_TIMEOUT_S: Final = 0.5
# The number of cached windows' ends; others are read from the storage again.
_MAX_ENDS: Final = 10_000
# Seconds without attempts after the storage failed, so that only one request waits for its timeout.
_SILENCE_S: Final = 5.0
# Seconds between deletions of expired counters.
_SWEEP_EVERY_S: Final = 30.0
T = TypeVar("T")


class Quotas:
    """Counts the requests and tokens of each client.

    If the storage cannot be reached, requests are not counted, and it is not tried again for some seconds: answering a
    request matters more than counting it. The log and ``gateway_quota_errors_total`` report it.

    The methods add OpenAI's ``x-ratelimit-*`` to the ``headers`` of the request's response, as the values become known.

    Args:
        storage: ``memory://``, or ``redis://HOST:PORT/DB`` for replicas that count together.

    Raises:
        ConfigError: the storage is unknown, or its library is not installed.

    Attributes:
        reserved: tokens of the requests that are being answered, by client; they are counted when their number is known.
    """

    def __init__(self, storage: str) -> None:
        connected, self._connections = _connect(storage)
        self._storage = connected
        # The end of each window, by `time.monotonic`: read once per window rather than for each request.
        self._ends: dict[str, float] = {}
        self.reserved: dict[str, int] = {}
        self._silent_until = 0.0

    async def admit(self, client: Client, headers: dict[str, str]) -> None:
        """Count a request.

        Raises:
            RateLimited: the client has no requests or no tokens left in this minute.
        """
        if client.requests_per_minute:
            item = RateLimitItemPerMinute(client.requests_per_minute, namespace="requests")
            num_requests, stats = await self._count(item, client, 1)
            headers |= _headers("requests", item.amount, stats)
            if num_requests > item.amount:
                raise _limited(client, "requests", item.amount, stats)
        if client.tokens_per_minute:
            await self._check_tokens(client, headers)

    @asynccontextmanager
    async def reserve(
        self, client: Client, headers: dict[str, str], lengths: Sequence[int], max_tokens: int
    ) -> AsyncIterator[None]:
        """Reserve an estimate of the texts' tokens while they are embedded.

        Args:
            lengths: characters that the model reads for each text.
            max_tokens: the length at which the longest model truncates a text.

        Raises:
            RateLimited: no tokens are left, apart from those that the client's running requests need.
        """
        if not client.tokens_per_minute:
            yield
            return
        # Again: other requests may have used tokens while this one's body arrived.
        await self._check_tokens(client, headers)
        num_tokens = sum(min(max_tokens, 1 + length // _CHARACTERS_PER_TOKEN) for length in lengths)
        self.reserved[client.name] = self.reserved.get(client.name, 0) + num_tokens
        try:
            yield
        except ClientDisconnected:
            await self.charge(client, headers, num_tokens)
            raise
        finally:
            self.reserved[client.name] -= num_tokens
            if self.reserved[client.name] <= 0:
                del self.reserved[client.name]

    async def charge(self, client: Client, headers: dict[str, str], num_tokens: int) -> None:
        """Count the tokens that a request used."""
        if client.tokens_per_minute:
            item = RateLimitItemPerMinute(client.tokens_per_minute, namespace="tokens")
            _num_tokens, stats = await self._count(item, client, num_tokens)
            headers |= _headers("tokens", item.amount, stats)

    async def close(self) -> None:
        """Close the connections to the storage."""
        if self._connections is not None:
            await self._connections.disconnect()

    async def _check_tokens(self, client: Client, headers: dict[str, str]) -> None:
        item = RateLimitItemPerMinute(client.tokens_per_minute, namespace="tokens")
        _num_tokens, stats = await self._count(item, client, 0)
        headers |= _headers("tokens", item.amount, stats)
        if stats.remaining <= 0:
            raise _limited(client, "tokens", item.amount, stats)
        if stats.remaining <= self.reserved.get(client.name, 0):
            raise RateLimited(
                f"rate limit reached for {client.name} ({item.amount} tokens per minute): its running requests may need the "
                f"remaining {stats.remaining}; retry when one of them is done",
                retry_after_s=1,
            )

    async def _count(self, item: RateLimitItem, client: Client, cost: int) -> tuple[int, WindowStats]:
        """Add to a client's window, or just read it if ``cost`` is 0; return its count and its remaining amount."""
        key = item.key_for(client.name)

        async def count() -> tuple[int, WindowStats]:
            num = await (self._storage.incr(key, item.get_expiry(), cost) if cost else self._storage.get(key))
            left_s = await self._left_s(key) if num else 0.0
            return num, WindowStats(time.time() + left_s, max(0, item.amount - num))

        return await self._ask(count, (0, WindowStats(time.time(), item.amount)))

    async def _left_s(self, key: str) -> float:
        """Return the seconds until the end of a window."""
        now = time.monotonic()
        if self._ends.get(key, 0.0) <= now:
            if len(self._ends) >= _MAX_ENDS:
                self._ends.clear()
            self._ends[key] = now + await self._storage.get_expiry(key) - time.time()
        return max(0.0, self._ends[key] - now)

    async def _ask(self, call: Callable[[], Awaitable[T]], default: T) -> T:
        """Query the storage, unless it failed to respond a moment ago."""
        if time.monotonic() >= self._silent_until:
            try:
                return await call()
            except StorageError as error:
                self._silent_until = time.monotonic() + _SILENCE_S
                log.warning("quota_not_counted", error=repr(error.storage_error), seconds=_SILENCE_S)
                await self._connect_again()
        metrics.QUOTA_ERRORS.inc()
        return default

    async def _connect_again(self) -> None:
        """Close idle connections: after a failover, they lead to a server that is no longer the primary."""
        if self._connections is not None:
            with suppress(Exception):  # they are not needed, whatever is wrong with them
                await self._connections.disconnect(inuse_connections=False)


def _connect(uri: str) -> tuple[Storage, ConnectionPool | None]:
    """Return the storage, and its connections, which the caller closes at the end."""
    if uri == "memory://":
        return ProcessStorage(), None
    try:
        if not uri.startswith(_REDIS_SCHEMES):
            raise ValueError("must be `memory://` or begin with `redis://`, `rediss://` or `unix://`")
        from redis.asyncio import BlockingConnectionPool

        timeouts = dict.fromkeys(("timeout", "socket_timeout", "socket_connect_timeout"), _STORAGE_TIMEOUT_S)
        pool = BlockingConnectionPool.from_url(uri, max_connections=_MAX_CONNECTIONS, **timeouts)
    except ImportError as error:
        problem = f"needs the package redis: pip install 'embedding-gateway[redis]' ({error})"
        raise ConfigError([Problem("environment", 0, 0, "GATEWAY_QUOTA_STORAGE", problem)]) from error
    except ValueError as error:
        raise ConfigError([Problem("environment", 0, 0, "GATEWAY_QUOTA_STORAGE", str(error))]) from error
    options: dict[str, Any] = {"connection_pool": pool}
    # The pool connects; `limits` reads only the kind of server from the URI, and would take a socket's for Valkey's.
    return RedisStorage(f"async+redis+{uri}", wrap_exceptions=True, implementation="redispy", **options), pool


class ProcessStorage(Storage):
    """Counts in a dictionary of this process; counters expire.

    The memory storage of ``limits`` iterates over all counters on every request: 12 ms with those of 100,000 addresses,
    and the owner of an IPv6 network has as many as they like.
    """

    STORAGE_SCHEME = None  # not created from a URI

    def __init__(self) -> None:
        super().__init__()
        # The count, and the end on `time.monotonic`, so that setting the clock does not change a window.
        self._counts: dict[str, tuple[int, float]] = {}
        self._next_sweep = 0.0

    @property
    def base_exceptions(self) -> type[Exception]:
        return OSError

    def __len__(self) -> int:
        return len(self._counts)

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add to a counter; a new one ends ``expiry`` seconds later."""
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_EVERY_S
            self._counts = {key: entry for key, entry in self._counts.items() if entry[1] > now}
        count, end = self._counts.get(key, (0, 0.0))
        if end <= now:
            count, end = 0, now + expiry
        self._counts[key] = (count + amount, end)
        return count + amount

    async def get(self, key: str) -> int:
        """Return the value of a counter, 0 if it does not exist."""
        count, end = self._counts.get(key, (0, 0.0))
        return count if end > time.monotonic() else 0

    async def get_expiry(self, key: str) -> float:
        """Return the end of a counter in seconds since the epoch; now if it does not exist."""
        return time.time() + max(0.0, self._counts.get(key, (0, 0.0))[1] - time.monotonic())

    async def check(self) -> bool:
        """Return whether the storage works."""
        return True

    async def reset(self) -> int:
        """Delete all counters, and return how many there were."""
        count = len(self._counts)
        self._counts = {}
        return count

    async def clear(self, key: str) -> None:
        """Delete a counter."""
        self._counts.pop(key, None)


def _limited(client: Client, what: str, limit: int, stats: WindowStats) -> RateLimited:
    wait_s = math.ceil(_reset_s(stats))
    return RateLimited(
        f"rate limit reached for {client.name} ({limit} {what} per minute); retry in {wait_s} s",
        retry_after_s=wait_s,
    )


def _headers(what: str, limit: int, stats: WindowStats) -> dict[str, str]:
    """Return the headers in OpenAI's form, see https://platform.openai.com/docs/guides/rate-limits."""
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(max(0, stats.remaining)),
        f"x-ratelimit-reset-{what}": f"{_reset_s(stats):.3f}s",
    }


def _reset_s(stats: WindowStats) -> float:
    return max(0.0, stats.reset_time - time.time())
