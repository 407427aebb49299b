"""Looking names up: the resolver may fail, be slow or hang, and its answers come in any order."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from gateway.backends.upstream.resolver import NotResolved, Resolver, system_look_up
from tests.backends.remote import wait_until


class Blocking:
    """A look-up that hangs until it is released, and counts how often it began."""

    def __init__(self) -> None:
        self.begun = 0
        self.let_go = threading.Event()

    def __call__(self, _host: str, _port: int) -> list[str]:
        self.begun += 1
        self.let_go.wait(30)
        return ["10.0.0.1"]


@pytest.fixture
def blocking() -> Iterator[Blocking]:
    look_up = Blocking()
    yield look_up
    look_up.let_go.set()


async def test_addresses_are_distinct_and_in_numerical_order() -> None:
    found = ["fd00::a", "10.0.0.10", "10.0.0.9", "fd00::0009", "10.0.0.10", "fd00::9"]

    assert await Resolver(lambda _host, _port: found).resolve("a", 80) == [
        "10.0.0.9",
        "10.0.0.10",
        "fd00::9",
        "fd00::a",
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "'a' cannot be resolved: Name or service not known",
        ),
        (UnicodeError("label too long"), "'a' cannot be resolved: label too long"),
        (None, "'a' has no address"),
    ],
)
async def test_a_failure_is_in_words(error: Exception | None, reason: str) -> None:
    def look_up(_host: str, _port: int) -> list[str]:
        if error is not None:
            raise error
        return []

    with pytest.raises(NotResolved) as caught:
        await Resolver(look_up).resolve("a", 80)

    assert (str(caught.value), caught.value.outcome) == (reason, "failed")


async def test_a_resolver_that_hangs_has_one_thread_and_the_loop_runs_on(blocking: Blocking) -> None:
    resolver = Resolver(blocking, timeout_s=0.05)
    before = threading.active_count()

    outcomes = [await asyncio.gather(resolver.resolve("a", 80), return_exceptions=True) for _ in range(5)]

    assert [type(outcome) for [outcome] in outcomes] == [NotResolved] * 5
    assert str(outcomes[0][0]) == "the resolver has not responded for 'a' in 0.05 s"
    assert str(outcomes[4][0]) == "the resolver still has not responded for 'a'"
    assert blocking.begun == 1
    assert threading.active_count() == before + 1


async def test_it_is_asked_again_when_it_has_come_back(blocking: Blocking) -> None:
    resolver = Resolver(blocking, timeout_s=0.05)
    with pytest.raises(NotResolved):
        await resolver.resolve("a", 80)

    blocking.let_go.set()
    await wait_until(lambda: not resolver._running)

    assert await resolver.resolve("a", 80) == ["10.0.0.1"]
    assert blocking.begun == 2


async def test_concurrent_look_ups_of_a_name_share_one_query(blocking: Blocking) -> None:
    resolver = Resolver(blocking)
    waiting = [asyncio.create_task(resolver.resolve("a", 80)) for _ in range(3)]
    other = asyncio.create_task(resolver.resolve("b", 80))
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)

    blocking.let_go.set()

    assert await asyncio.gather(*waiting[1:], other) == [["10.0.0.1"]] * 3
    assert blocking.begun == 2


async def test_the_system_knows_this_machine() -> None:
    assert "127.0.0.1" in await Resolver(system_look_up).resolve("localhost", 80)
