"""Requests and tokens per minute, in memory and in a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis.asyncio as asyncio_redis

from gateway.access.keyring import Client
from gateway.access.quotas import Quotas
from gateway.errors import ClientDisconnected, ConfigError, RateLimited
from gateway.telemetry import metrics
from tests.redis_server import Redis, failing_over


@pytest.fixture
def redis(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the address of a Redis that has time to answer, however busy the machine is."""
    monkeypatch.setattr("gateway.access.quotas._STORAGE_TIMEOUT_S", 30.0)
    return redis_server.uri


@pytest.fixture
def redis_socket(redis_server: Redis) -> Path:
    return redis_server.socket


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[str], Quotas]]:
    """Return a function that makes quotas, and close their connections in the end."""
    async with contextlib.AsyncExitStack() as stack:

        def connect(uri: str) -> Quotas:
            quotas = Quotas(uri)
            stack.push_async_callback(quotas.close)
            return quotas

        yield connect


@pytest.fixture(params=["memory", "redis"])
def quotas(request: pytest.FixtureRequest, connect: Callable[[str], Quotas]) -> Quotas:
    """Return quotas that count in one of the storages."""
    return connect("memory://" if request.param == "memory" else request.getfixturevalue("redis"))


def client(**limits: int) -> Client:
    """Return a client with a new name."""
    return Client(f"client-{time.monotonic_ns()}", **limits)


async def use(quotas: Quotas, client: Client, num_tokens: int = 0) -> dict[str, str]:
    headers: dict[str, str] = {}
    await quotas.admit(client, headers)
    await quotas.charge(client, headers, num_tokens)
    return headers


async def test_without_limits_nothing_is_counted(quotas: Quotas) -> None:
    one = client()

    assert [await use(quotas, one, 10**9) for _ in range(100)] == [{}] * 100


async def test_requests_of_a_minute(quotas: Quotas) -> None:
    one, other = client(requests_per_minute=3), client(requests_per_minute=3)

    left = [(await use(quotas, one))["x-ratelimit-remaining-requests"] for _ in range(3)]
    headers: dict[str, str] = {}
    with pytest.raises(RateLimited, match=r"\(3 requests per minute\); retry in") as caught:
        await quotas.admit(one, headers)

    assert left == ["2", "1", "0"]
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    reset = headers["x-ratelimit-reset-requests"]
    assert reset.endswith("s")
    assert 50 < float(reset[:-1]) <= 60
    assert caught.value.retry_after_s is not None
    assert 50 < caught.value.retry_after_s <= 60
    assert (await use(quotas, other))["x-ratelimit-remaining-requests"] == "2"


async def test_before_a_minute_s_first_token_no_request_waits(quotas: Quotas) -> None:
    headers: dict[str, str] = {}
    await quotas.admit(client(tokens_per_minute=10), headers)

    assert headers["x-ratelimit-remaining-tokens"] == "10"
    assert headers["x-ratelimit-reset-tokens"] == "0.000s"


async def test_tokens_are_charged_as_they_were_used(quotas: Quotas) -> None:
    one = client(tokens_per_minute=100)

    headers = await use(quotas, one, 60)
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("100", "40")
    headers = await use(quotas, one, 60)  # a single request may exceed the limit
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    refused: dict[str, str] = {}
    with pytest.raises(RateLimited, match=r"\(100 tokens per minute\); retry in") as caught:
        await quotas.admit(one, refused)
    assert caught.value.retry_after_s is not None
    assert 50 < caught.value.retry_after_s <= 60
    assert refused["x-ratelimit-remaining-tokens"] == "0"


async def test_running_requests_reserve_tokens() -> None:
    quotas, one = Quotas("memory://"), client(tokens_per_minute=100)
    for _ in range(3):
        await quotas.admit(one, {})

    async with quotas.reserve(one, {}, [200], 512), quotas.reserve(one, {}, [200], 512):  # 51 each
        with pytest.raises(RateLimited, match="its running requests may need the remaining 100; retry") as caught:
            await quotas.reserve(one, {}, [1], 512).__aenter__()
        assert caught.value.retry_after_s == 1
        with pytest.raises(RateLimited):
            await quotas.admit(one, {})

    async with quotas.reserve(one, {}, [1], 512):
        assert quotas.reserved == {one.name: 1}
    assert quotas.reserved == {}


async def test_a_long_text_reserves_the_tokens_that_the_model_reads() -> None:
    quotas, one = Quotas("memory://"), client(tokens_per_minute=100)

    async with quotas.reserve(one, {}, [500_000, 1], 40):
        assert quotas.reserved == {one.name: 41}
        await quotas.admit(one, {})


async def test_a_query_counts_with_each_text() -> None:
    quotas, one = Quotas("memory://"), client(tokens_per_minute=100)

    async with quotas.reserve(one, {}, [28, 500_020], 40):
        assert quotas.reserved == {one.name: 8 + 40}


async def test_tokens_used_while_a_body_arrived_count(quotas: Quotas) -> None:
    """Any number of requests can be admitted before their bodies arrive, and then be sent one by one."""
    one = client(tokens_per_minute=10)
    for _ in range(20):
        await quotas.admit(one, {})

    num_answered = 0
    for _ in range(20):
        with contextlib.suppress(RateLimited):
            async with quotas.reserve(one, {}, [46], 512):
                await quotas.charge(one, {}, 10)
                num_answered += 1

    assert num_answered == 1


async def test_a_failed_request_reserves_nothing() -> None:
    quotas, one = Quotas("memory://"), client(tokens_per_minute=100)

    with pytest.raises(ValueError, match="it failed"):
        async with quotas.reserve(one, {}, [1000], 512):
            raise ValueError("it failed")

    assert quotas.reserved == {}
    await quotas.admit(one, {})


async def test_a_client_that_disconnects_is_charged_the_estimate(quotas: Quotas) -> None:
    one = client(tokens_per_minute=100)
    headers: dict[str, str] = {}

    with pytest.raises(ClientDisconnected):
        async with quotas.reserve(one, headers, [200], 512):
            raise ClientDisconnected("gone")

    assert headers["x-ratelimit-remaining-tokens"] == "49"
    assert quotas.reserved == {}


async def test_concurrent_requests_get_no_more_than_the_limit(quotas: Quotas) -> None:
    one = client(requests_per_minute=50)

    results = await asyncio.gather(*(quotas.admit(one, {}) for _ in range(200)), return_exceptions=True)

    assert results.count(None) == 50
    assert sum(isinstance(result, RateLimited) for result in results) == 150


async def test_many_concurrent_requests_share_a_few_connections(connect: Callable[[str], Quotas], redis: str) -> None:
    quotas, one = connect(redis), client(requests_per_minute=1000)
    async with asyncio_redis.from_url(redis) as operator:
        before = (await operator.info("stats"))["total_connections_received"]

        await asyncio.gather(*(quotas.admit(one, {}) for _ in range(300)))

        assert (await operator.info("stats"))["total_connections_received"] - before <= 16


async def test_replicas_count_together_in_redis(connect: Callable[[str], Quotas], redis: str) -> None:
    replicas, one = [connect(redis), connect(redis)], client(requests_per_minute=3)

    left = [(await use(replicas[i % 2], one))["x-ratelimit-remaining-requests"] for i in range(3)]

    assert left == ["2", "1", "0"]
    for replica in replicas:
        with pytest.raises(RateLimited):
            await replica.admit(one, {})


async def test_without_an_answer_from_the_storage_requests_pass(connect: Callable[[str], Quotas]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quotas, one = connect(f"redis://127.0.0.1:{port}/0"), client(requests_per_minute=1, tokens_per_minute=1)
    before = metrics.values(metrics.QUOTA_ERRORS)[()]

    for _ in range(3):
        assert (await use(quotas, one, 5))["x-ratelimit-remaining-requests"] == "1"

    assert metrics.values(metrics.QUOTA_ERRORS)[()] > before


async def test_a_storage_that_hangs_holds_up_one_request_and_no_other(connect: Callable[[str], Quotas]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its backlog forever
        quotas, one = connect(f"redis://127.0.0.1:{silent.getsockname()[1]}/0"), client(requests_per_minute=1)
        await quotas.admit(one, {})
        started = time.monotonic()

        for _ in range(100):
            await use(quotas, one, 5)

    assert time.monotonic() - started < 20  # a hundred time-outs would be 50 s


async def test_after_a_failover_the_new_primary_counts(
    connect: Callable[[str], Quotas], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one keeps its connections, and refuses to count."""
    monkeypatch.setattr("gateway.access.quotas._STORAGE_TIMEOUT_S", 30.0)
    monkeypatch.setattr("gateway.access.quotas._SILENCE_S", 0.0)
    with failing_over(tmp_path) as (uri, fail_over):
        quotas, one = connect(uri), client(requests_per_minute=2)
        await use(quotas, one)
        await fail_over()
        await use(quotas, one)  # not counted

        left = [(await use(quotas, one))["x-ratelimit-remaining-requests"] for _ in range(2)]

        assert left == ["1", "0"]
        await quotas.close()


async def test_redis_may_listen_at_a_socket_of_the_file_system(
    connect: Callable[[str], Quotas], redis_socket: Path
) -> None:
    quotas, one = connect(f"unix://{redis_socket}"), client(requests_per_minute=2)

    assert [(await use(quotas, one))["x-ratelimit-remaining-requests"] for _ in range(2)] == ["1", "0"]
    with pytest.raises(RateLimited):
        await quotas.admit(one, {})


async def test_a_client_without_a_token_limit_reserves_none(quotas: Quotas) -> None:
    one = client(requests_per_minute=2)
    headers: dict[str, str] = {}

    await quotas.admit(one, headers)
    async with quotas.reserve(one, headers, [200], 512):
        await quotas.charge(one, headers, 10**9)

    assert set(headers) == {f"x-ratelimit-{part}-requests" for part in ("limit", "remaining", "reset")}


@pytest.mark.parametrize("uri", ["nowhere://", "redis", "etcd://127.0.0.1:2379", ""])
def test_an_unknown_storage_is_refused_at_the_start(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"^environment: GATEWAY_QUOTA_STORAGE: must be `memory://` or begin with "):
        Quotas(uri)


def test_a_missing_package_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)

    with pytest.raises(ConfigError, match=r"^environment: GATEWAY_QUOTA_STORAGE: .* pip install 'embedding-gateway\[r"):
        Quotas("redis://127.0.0.1/0")


async def test_replicas_share_the_tokens_of_a_minute(connect: Callable[[str], Quotas], redis: str) -> None:
    """Each sees the other's charges, but reserves tokens only for its own requests."""
    first, second = connect(redis), connect(redis)
    one = client(tokens_per_minute=100)
    from_first: dict[str, str] = {}
    from_second: dict[str, str] = {}

    async with first.reserve(one, from_first, [200], 512):
        async with second.reserve(one, from_second, [200], 512):
            await second.charge(one, from_second, 60)
        await first.charge(one, from_first, 50)

    assert from_second["x-ratelimit-remaining-tokens"] == "40"
    assert from_first["x-ratelimit-remaining-tokens"] == "0"
    for replica in (first, second):
        with pytest.raises(RateLimited, match=r"\(100 tokens per minute\); retry in"):
            await replica.admit(one, {})


async def test_a_request_asks_redis_four_times(
    connect: Callable[[str], Quotas], redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request and its tokens are counted, read twice and charged. By then the end of the minute is known."""
    from redis.asyncio.connection import AbstractConnection

    quotas, one = connect(redis), client(requests_per_minute=100, tokens_per_minute=1000)

    async def whole_request() -> dict[str, str]:
        headers: dict[str, str] = {}
        await quotas.admit(one, headers)
        async with quotas.reserve(one, headers, [6], 512):
            await quotas.charge(one, headers, 3)
        return headers

    await whole_request()
    num_sent = 0
    send = AbstractConnection.send_packed_command

    async def count(*args: object, **options: object) -> None:
        nonlocal num_sent
        num_sent += 1
        await send(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(AbstractConnection, "send_packed_command", count)
    headers = await whole_request()

    assert num_sent == 4
    assert (headers["x-ratelimit-remaining-requests"], headers["x-ratelimit-remaining-tokens"]) == ("98", "994")
    for what in ("requests", "tokens"):
        assert 30 < float(headers[f"x-ratelimit-reset-{what}"].removesuffix("s")) <= 60


async def test_the_number_of_remembered_ends_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.access.quotas._MAX_ENDS", 3)
    quotas = Quotas("memory://")
    clients = [Client(f"c{number}", requests_per_minute=5) for number in range(10)]

    left = [(await use(quotas, one))["x-ratelimit-remaining-requests"] for one in (*clients, *clients)]

    assert left == ["4"] * 10 + ["3"] * 10
    assert len(quotas._ends) <= 3
