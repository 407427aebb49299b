"""The counters that expire, as ``limits`` uses them."""

from __future__ import annotations

import pytest

from gateway.access.quotas import ProcessStorage


class Clock:
    """A clock for both of ``time``'s functions, one of which can be set."""

    now = 1000.0
    was_set_by = 0.0

    def time(self) -> float:
        return self.now + self.was_set_by

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gateway.access.quotas.time", clock)
    return clock


async def test_a_counter_adds_up_until_its_end_and_then_begins_again(clock: Clock) -> None:
    storage = ProcessStorage()

    assert await storage.incr("a", 60) == 1
    clock.now = 1059.0
    assert await storage.incr("a", 60, amount=4) == 5
    assert (await storage.get("a"), await storage.get_expiry("a")) == (5, 1060.0)
    clock.now = 1060.0
    assert (await storage.get("a"), await storage.get_expiry("a")) == (0, 1060.0)
    assert await storage.incr("a", 60) == 1
    assert await storage.get_expiry("a") == 1120.0


async def test_a_counter_that_ends_while_others_are_kept_begins_again(clock: Clock) -> None:
    """Between two sweeps the expired counter is still in memory."""
    storage = ProcessStorage()
    await storage.incr("a", 10, amount=7)

    clock.now = 1010.0

    assert await storage.incr("a", 10) == 1
    assert await storage.get_expiry("a") == 1020.0


async def test_an_unknown_counter_is_zero_and_ends_now(clock: Clock) -> None:
    storage = ProcessStorage()

    assert (await storage.get("a"), await storage.get_expiry("a")) == (0, 1000.0)
    assert len(storage) == 0


async def test_expired_counters_are_deleted_at_most_twice_per_minute(clock: Clock) -> None:
    """``limits``' own storage goes through all counters at each request."""
    storage = ProcessStorage()
    for number in range(100):
        await storage.incr(f"{number}", 10)

    clock.now = 1029.0
    await storage.incr("new", 60)
    assert len(storage) == 101
    clock.now = 1030.0
    await storage.incr("new", 60)
    assert len(storage) == 1
    await storage.incr("short", 10)
    clock.now = 1059.0
    await storage.incr("new", 60)
    assert len(storage) == 2
    clock.now = 1060.0
    await storage.incr("new", 60)
    assert (len(storage), await storage.get("new")) == (1, 4)


async def test_counters_can_be_ended_one_by_one_and_all_at_once(clock: Clock) -> None:
    storage = ProcessStorage()
    for name in "abc":
        await storage.incr(name, 60)

    await storage.clear("a")
    await storage.clear("never counted")

    assert [await storage.get(name) for name in "abc"] == [0, 1, 1]
    assert await storage.reset() == 2
    assert len(storage) == 0
    assert await storage.check() is True
    assert await storage.incr("a", 60) == 1


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_clock_that_is_set_makes_no_window_longer_or_shorter(clock: Clock, hours: int) -> None:
    storage = ProcessStorage()
    await storage.incr("a", 60)

    clock.was_set_by = hours * 3600.0
    clock.now += 59

    assert await storage.get("a") == 1
    assert await storage.get_expiry("a") == clock.time() + 1
    clock.now += 1
    assert await storage.get("a") == 0
    assert await storage.incr("a", 60) == 1
