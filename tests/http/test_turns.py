"""One thread does the work of all clients, a piece at a time, and no client waits for all of another's."""

from __future__ import annotations

import asyncio
import threading
import weakref

import pytest

from gateway.http.turns import Turns


@pytest.fixture
def turns() -> Turns:
    return Turns("test")


class Recorder:
    """Work that waits until it may continue, and records the order of its turns."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.done: list[str] = []
        self.may_go_on = threading.Event()

    async def hold(self) -> asyncio.Task[None]:
        """Take the thread, so that later work has to wait."""
        task = asyncio.create_task(self._turns.run("holder", 1, lambda: self.may_go_on.wait(10) and None))
        await asyncio.sleep(0)
        return task

    def add(self, name: str, cost: int) -> asyncio.Task[None]:
        return asyncio.create_task(self._turns.run(name[0], cost, lambda: self.done.append(name)))


async def test_it_returns_the_result_of_the_work_or_raises_its_error(turns: Turns) -> None:
    assert await turns.run("a", 1, threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        await turns.run("a", 1, lambda: 1 // 0)
    assert await turns.run("a", 1, lambda: 5) == 5


async def test_clients_take_turns(turns: Turns) -> None:
    work = Recorder(turns)
    held = await work.hold()
    tasks = [work.add(name, 10) for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")]
    await asyncio.sleep(0)
    work.may_go_on.set()

    await asyncio.gather(held, *tasks)

    assert work.done == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


async def test_a_client_with_large_work_waits_for_those_with_small(turns: Turns) -> None:
    work = Recorder(turns)
    held = await work.hold()
    tasks = [work.add(name, cost) for name, cost in (("a1", 100), ("a2", 100), *((f"b{i}", 30) for i in range(4)))]
    await asyncio.sleep(0)
    work.may_go_on.set()

    await asyncio.gather(held, *tasks)

    assert work.done == ["a1", "b0", "b1", "b2", "b3", "a2"]


async def test_who_comes_late_is_not_served_for_the_time_that_it_was_away(turns: Turns) -> None:
    work, later = Recorder(turns), Recorder(turns)
    held = await work.hold()
    tasks = [work.add(f"a{i}", 10) for i in range(5)]
    tasks.append(asyncio.create_task(turns.run("a", 10, lambda: later.may_go_on.wait(10) and None)))
    await asyncio.sleep(0)
    work.may_go_on.set()
    await asyncio.gather(held, *tasks[:5])
    late = [later.add(name, 10) for name in ("b0", "b1", "b2", "a7", "a8", "a9")]
    await asyncio.sleep(0)
    later.may_go_on.set()

    await asyncio.gather(tasks[5], *late)

    assert later.done == ["b0", "b1", "a7", "b2", "a8", "a9"]


async def test_a_client_that_has_left_gets_no_turn_and_delays_no_other(turns: Turns) -> None:
    work = Recorder(turns)
    held = await work.hold()
    tasks = [work.add(name, 1) for name in ("a1", "b1", "c1")]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    work.may_go_on.set()

    await asyncio.gather(held, *tasks, return_exceptions=True)

    assert work.done == ["a1", "c1"]
    assert await turns.run("d", 1, lambda: 1) == 1


async def test_a_turn_that_comes_as_its_client_goes_is_passed_on(turns: Turns) -> None:
    async def run_and_cancel_the_next() -> None:
        await turns.run("holder", 1, lambda: None)
        going.cancel()  # it has its turn, but has not continued yet

    work = Recorder(turns)
    held = asyncio.create_task(run_and_cancel_the_next())
    await asyncio.sleep(0)
    going, staying = work.add("a1", 1), work.add("b1", 1)

    async with asyncio.timeout(5):
        await asyncio.gather(held, going, staying, return_exceptions=True)

        assert going.cancelled()
        assert work.done == ["b1"]
        assert await turns.run("d", 1, lambda: 1) == 1


async def test_clients_that_came_once_are_forgotten_while_others_keep_it_busy(turns: Turns) -> None:
    class Name(str):
        """A client's name, whose release shows."""

    work = Recorder(turns)
    held = await work.hold()
    names = [Name(f"client {i}") for i in range(500)]
    known = [weakref.ref(name) for name in names]
    tasks = [asyncio.create_task(turns.run(names.pop(), 1, lambda: None)) for _ in range(500)]
    tasks.append(work.add("z", 1))
    last = Recorder(turns)
    tasks.append(asyncio.create_task(turns.run("z", 1, lambda: last.may_go_on.wait(10) and None)))
    await asyncio.sleep(0)
    work.may_go_on.set()
    await asyncio.gather(held, *tasks[:-1])

    del tasks[:-1]
    assert not any(name() for name in known)
    last.may_go_on.set()
    await tasks[0]


async def test_clients_that_came_once_are_forgotten(turns: Turns) -> None:
    work = Recorder(turns)
    held = await work.hold()
    tasks = [work.add(chr(1000 + i), 1) for i in range(500)]
    await asyncio.sleep(0)
    work.may_go_on.set()
    await asyncio.gather(held, *tasks)

    assert len(work.done) == 500
    assert not turns._given
    assert not turns._waiting
