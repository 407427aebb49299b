"""How much a client may ask for in a minute: requests and tokens, counted by ``limits``.

Windows are fixed: a minute begins with a client's first request and ends 60 s later. That is one counter a client, the
same in memory and in Redis, and what OpenAI's headers can express.

What a request costs in tokens is known only when it has been tokenized, so tokens are charged afterwards. While it runs,
a rough number of them is kept aside, so that a client cannot send any number of requests on its last token. A client can
thus go over its tokens by what one request takes, and by as much in each further replica. A client that goes away before
its answer is charged what was kept aside: the work may be done by then.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog
from limits import RateLimitItem, RateLimitItemPerMinute, WindowStats
from limits.aio.storage import RedisStorage, Storage
from limits.errors import StorageError

from gateway.access.keyring import Client
from gateway.access.windows import ProcessStorage
from gateway.errors import ClientDisconnected, ConfigError, Problem, RateLimited
from gateway.telemetry import metrics

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

log = structlog.get_logger(__name__)

# English has about four characters a token in the tokenizers of these models.
_CHARACTERS_PER_TOKEN: Final = 4
_REDIS_SCHEMES: Final = ("redis://", "rediss://", "unix://")
_MAX_CONNECTIONS: Final = 16
_STORAGE_TIMEOUT_S: Final = 0.5
# How many windows' ends are remembered; forgotten ones are asked for again.
_MAX_ENDS: Final = 10_000
# A storage that hangs costs one request its time-out, not each.
_SILENCE_S: Final = 5.0
T = TypeVar("T")


@dataclass(slots=True)
class Ticket:
    """A request that was admitted, on its way.

    Attributes:
        headers: those of the answer; OpenAI's ``x-ratelimit-*`` are added as the figures become known.
    """

    client: Client
    headers: dict[str, str]


class Quotas:
    """Counts what each client uses.

    When the storage cannot be reached, requests pass uncounted, and it is not asked again for some seconds: an embedding is
    worth more than its count. The log and ``gateway_quota_errors_total`` tell.

    Args:
        storage: ``memory://``, or ``redis://HOST:PORT/DB`` for several replicas that count together.

    Raises:
        ConfigError: there is no such storage, or its library is not installed.
    """

    def __init__(self, storage: str) -> None:
        connected, self._connections = _connect(storage)
        self._storage = connected
        # When each window ends, by `time.monotonic`: asked once a window rather than at each request.
        self._ends: dict[str, float] = {}
        self._reserved: dict[str, int] = {}
        self._silent_until = 0.0

    async def admit(self, client: Client, headers: dict[str, str]) -> Ticket:
        """Count a request.

        Args:
            headers: those of the answer, whatever it will be.

        Raises:
            RateLimited: the client has no request or no token left in this minute.
        """
        ticket = Ticket(client, headers)
        if client.requests_per_minute:
            item = RateLimitItemPerMinute(client.requests_per_minute, namespace="requests")
            num_requests, stats = await self._count(item, client, 1)
            headers |= _headers("requests", item.amount, stats)
            if num_requests > item.amount:
                raise _limited(client, "requests", item.amount, stats)
        if client.tokens_per_minute:
            await self._check_tokens(ticket)
        return ticket

    @asynccontextmanager
    async def reserve(
        self, ticket: Ticket, texts: Sequence[str], max_tokens: int, beside: str = ""
    ) -> AsyncIterator[None]:
        """Keep about as many tokens aside as the texts have, while they are embedded.

        Args:
            max_tokens: where the longest model cuts a text.
            beside: what the model reads with each text: a query.

        Raises:
            RateLimited: nothing is left by now, beside what the client's requests that run need.
        """
        client = ticket.client
        if not client.tokens_per_minute:
            yield
            return
        # Again: what others have used while this request's body came.
        await self._check_tokens(ticket)
        num_tokens = sum(min(max_tokens, 1 + (len(beside) + len(text)) // _CHARACTERS_PER_TOKEN) for text in texts)
        self._reserved[client.name] = self._reserved.get(client.name, 0) + num_tokens
        try:
            yield
        except ClientDisconnected:
            await self.charge(ticket, num_tokens)
            raise
        finally:
            self._reserved[client.name] -= num_tokens
            if self._reserved[client.name] <= 0:
                del self._reserved[client.name]

    async def charge(self, ticket: Ticket, num_tokens: int) -> None:
        """Count the tokens that a request has used."""
        client = ticket.client
        if client.tokens_per_minute:
            item = RateLimitItemPerMinute(client.tokens_per_minute, namespace="tokens")
            _num_tokens, stats = await self._count(item, client, num_tokens)
            ticket.headers |= _headers("tokens", item.amount, stats)

    async def close(self) -> None:
        """Close the connections to the storage."""
        if self._connections is not None:
            await self._connections.disconnect()

    async def _check_tokens(self, ticket: Ticket) -> None:
        client = ticket.client
        item = RateLimitItemPerMinute(client.tokens_per_minute, namespace="tokens")
        _num_tokens, stats = await self._count(item, client, 0)
        ticket.headers |= _headers("tokens", item.amount, stats)
        if stats.remaining <= 0:
            raise _limited(client, "tokens", item.amount, stats)
        if stats.remaining <= self._reserved.get(client.name, 0):
            raise RateLimited(
                f"{client.name} may use {item.amount} tokens a minute, and its requests that run may need the "
                f"{stats.remaining} that are left: wait for one of them",
                retry_after_s=1,
            )

    async def _count(self, item: RateLimitItem, client: Client, cost: int) -> tuple[int, WindowStats]:
        """Add to a client's window, or just look at it where ``cost`` is 0; return its count, and what is left."""
        key = item.key_for(client.name)

        async def count() -> tuple[int, WindowStats]:
            num = await (self._storage.incr(key, item.get_expiry(), cost) if cost else self._storage.get(key))
            left_s = await self._left_s(key) if num else 0.0
            return num, WindowStats(time.time() + left_s, max(0, item.amount - num))

        return await self._ask(count, (0, WindowStats(time.time(), item.amount)))

    async def _left_s(self, key: str) -> float:
        """Return for how many seconds a window goes on."""
        now = time.monotonic()
        if self._ends.get(key, 0.0) <= now:
            if len(self._ends) >= _MAX_ENDS:
                self._ends.clear()
            self._ends[key] = now + await self._storage.get_expiry(key) - time.time()
        return max(0.0, self._ends[key] - now)

    async def _ask(self, question: Callable[[], Awaitable[T]], otherwise: T) -> T:
        """Ask the storage, unless it has not answered a moment ago."""
        if time.monotonic() >= self._silent_until:
            try:
                return await question()
            except StorageError as error:
                self._silent_until = time.monotonic() + _SILENCE_S
                log.warning("quota_not_counted", error=repr(error.storage_error), seconds=_SILENCE_S)
        metrics.QUOTA_ERRORS.inc()
        return otherwise


def _connect(uri: str) -> tuple[Storage, ConnectionPool | None]:
    """Return the storage, and its connections if it has any: to close them."""
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
    # The pool connects; `limits` reads no more of the address than which server it is, and takes a socket's for Valkey's.
    return RedisStorage(f"async+redis+{uri}", wrap_exceptions=True, implementation="redispy", **options), pool


def _limited(client: Client, what: str, limit: int, stats: WindowStats) -> RateLimited:
    wait_s = math.ceil(_reset_s(stats))
    return RateLimited(
        f"{client.name} may use {limit} {what} a minute, and those of this minute are used: wait {wait_s} s",
        retry_after_s=wait_s,
    )


def _headers(what: str, limit: int, stats: WindowStats) -> dict[str, str]:
    """Return the headers as OpenAI writes them, see https://platform.openai.com/docs/guides/rate-limits."""
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(max(0, stats.remaining)),
        f"x-ratelimit-reset-{what}": f"{_reset_s(stats):.3f}s",
    }


def _reset_s(stats: WindowStats) -> float:
    return max(0.0, stats.reset_time - time.time())
