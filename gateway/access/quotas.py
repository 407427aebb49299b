"""How much a client may ask for in a minute: requests and tokens, counted by ``limits``.

Windows are fixed: a minute begins with a client's first request and ends 60 s later. That is one counter a client, the
same in memory and in Redis, and what OpenAI's headers can express.

What a request costs in tokens is known only when it has been tokenised, so tokens are charged afterwards. While it runs,
a rough number of them is kept aside, so that a client cannot send any number of requests on its last token. A client can
thus go over its tokens by what one request takes, and by as much in each further replica.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import structlog
from limits import RateLimitItem, RateLimitItemPerMinute, WindowStats
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError

from gateway.access.keyring import Client
from gateway.errors import ConfigError, Problem, RateLimited
from gateway.telemetry import metrics

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

log = structlog.get_logger(__name__)

# English has about four characters a token in the tokenizers of these models.
_CHARACTERS_PER_TOKEN: Final = 4
_REDIS_SCHEMES: Final = ("redis://", "rediss://", "unix://")
_MAX_CONNECTIONS: Final = 16
_STORAGE_TIMEOUT_S: Final = 0.5


@dataclass(slots=True)
class Ticket:
    """A request that was admitted, on its way.

    Attributes:
        headers: those of the answer; OpenAI's ``x-ratelimit-*`` are added as the figures become known.
        tokens: what was left of the tokens when the request was admitted.
    """

    client: Client
    headers: dict[str, str]
    tokens: WindowStats = field(default_factory=lambda: WindowStats(reset_time=0.0, remaining=0))


class Quotas:
    """Counts what each client uses.

    When the storage cannot be reached, requests pass uncounted: an embedding is worth more than its count. The log and
    ``gateway_quota_errors_total`` tell.

    Args:
        storage: ``memory://``, or ``redis://HOST:PORT/DB`` for several replicas that count together.

    Raises:
        ConfigError: there is no such storage, or its library is not installed.
    """

    def __init__(self, storage: str) -> None:
        connected, self._connections = _connect(storage)
        self._limiter = FixedWindowRateLimiter(connected)
        self._reserved: dict[str, int] = {}

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
            is_within = await self._hit(item, client, 1)
            stats = await self._stats(item, client)
            headers |= _headers("requests", item.amount, stats)
            if not is_within:
                raise _limited(client, "requests", item.amount, stats)
        if client.tokens_per_minute:
            item = RateLimitItemPerMinute(client.tokens_per_minute, namespace="tokens")
            ticket.tokens = await self._stats(item, client)
            headers |= _headers("tokens", item.amount, ticket.tokens)
            self._check_tokens(ticket)
        return ticket

    @contextmanager
    def reserve(self, ticket: Ticket, texts: Sequence[str]) -> Iterator[None]:
        """Keep about as many tokens aside as the texts have, while they are embedded.

        Raises:
            RateLimited: other requests of the client that run by now need what is left.
        """
        client = ticket.client
        if not client.tokens_per_minute:
            yield
            return
        self._check_tokens(ticket)
        num_tokens = len(texts) + sum(map(len, texts)) // _CHARACTERS_PER_TOKEN
        self._reserved[client.name] = self._reserved.get(client.name, 0) + num_tokens
        try:
            yield
        finally:
            self._reserved[client.name] -= num_tokens
            if self._reserved[client.name] <= 0:
                del self._reserved[client.name]

    async def charge(self, ticket: Ticket, num_tokens: int) -> None:
        """Count the tokens that a request has used."""
        client = ticket.client
        if client.tokens_per_minute:
            item = RateLimitItemPerMinute(client.tokens_per_minute, namespace="tokens")
            await self._hit(item, client, num_tokens)
            ticket.headers |= _headers("tokens", item.amount, await self._stats(item, client))

    async def close(self) -> None:
        """Close the connections to the storage."""
        if self._connections is not None:
            await self._connections.disconnect()

    def _check_tokens(self, ticket: Ticket) -> None:
        client = ticket.client
        if ticket.tokens.remaining <= self._reserved.get(client.name, 0):
            raise _limited(client, "tokens", client.tokens_per_minute, ticket.tokens)

    async def _hit(self, item: RateLimitItem, client: Client, cost: int) -> bool:
        try:
            return await self._limiter.hit(item, client.name, cost=cost)
        except StorageError as error:
            _tell(error)
            return True

    async def _stats(self, item: RateLimitItem, client: Client) -> WindowStats:
        try:
            return await self._limiter.get_window_stats(item, client.name)
        except StorageError as error:
            _tell(error)
            return WindowStats(reset_time=time.time(), remaining=item.amount)


def _connect(uri: str) -> tuple[Storage, ConnectionPool | None]:
    """Return the storage, and its connections if it has any: to close them."""
    if uri == "memory://":
        return MemoryStorage(), None
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
    return RedisStorage(f"async+{uri}", wrap_exceptions=True, implementation="redispy", **options), pool


def _tell(error: StorageError) -> None:
    metrics.QUOTA_ERRORS.inc()
    log.warning("quota_not_counted", error=repr(error.storage_error))


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
