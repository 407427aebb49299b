"""The measured speed of replicas, and the choice of a replica for each job."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.cluster.pace import Pace
from gateway.cluster.pool import Pool
from gateway.cluster.values import work_of
from gateway.errors import InternalError
from gateway.types import Embeddings, EmbedJob
from tests.cluster.test_wire import hosted, make_job, pool_of, until


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.ticks = 2000

    def __call__(self) -> float:
        return self.ticks * 0.05


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pass_time(pace: Pace, clock: Clock, seconds: float) -> None:
    """Let time pass, and measure every quarter of a second, as a replica does."""
    for _ in range(round(seconds / 0.05)):
        clock.ticks += 1
        if clock.ticks % 5 == 0:
            pace.measure()


def work(pace: Pace, clock: Clock, *, seconds: float, each: int, number: int, idle_s: float = 0.0) -> None:
    """Do jobs one after the other."""
    for _ in range(number):
        pace.set_busy(True)
        pass_time(pace, clock, seconds)
        pace.add(each)
        pace.set_busy(False)
        pass_time(pace, clock, idle_s)


@pytest.mark.parametrize("seconds", [0.05, 0.25, 0.6, 4.0])
@pytest.mark.parametrize("idle_s", [0.0, 0.4])
def test_the_rate_is_that_of_the_busy_time_however_long_a_job_takes(
    clock: Clock, seconds: float, idle_s: float
) -> None:
    pace = Pace(clock)
    work(pace, clock, seconds=seconds, each=100, number=40, idle_s=idle_s)
    assert pace.rate == pytest.approx(100 / seconds, rel=0.1)


def test_jobs_at_the_same_time_count_together(clock: Clock) -> None:
    pace = Pace(clock)
    for _ in range(20):
        pace.set_busy(True)
        pass_time(pace, clock, 0.5)
        pace.add(100)
        pace.add(100)
        pace.measure()  # the next ones are in progress already
    assert pace.rate == pytest.approx(400)


def test_an_idle_replica_forgets_that_it_was_slow_once(clock: Clock) -> None:
    pace = Pace(clock)
    work(pace, clock, seconds=10, each=100, number=1)
    pace.measure()
    assert pace.rate == pytest.approx(10)
    clock.ticks += 400
    pace.measure()
    assert pace.rate == pytest.approx(10)
    clock.ticks += 400
    pace.measure()
    assert pace.rate == 0
    work(pace, clock, seconds=0.5, each=100, number=1)
    pace.measure()
    assert pace.rate == pytest.approx(200)


def test_a_job_that_takes_long_is_not_idle(clock: Clock) -> None:
    pace = Pace(clock)
    work(pace, clock, seconds=100, each=100, number=2)
    pace.measure()
    assert pace.rate == pytest.approx(1, rel=0.01)


def leave(pace: Pace, clock: Clock, *, seconds: float, canceled: int) -> None:
    """Begin a job, and cancel it after a while."""
    pace.set_busy(True)
    pass_time(pace, clock, seconds)
    pace.cancel(canceled)
    pace.set_busy(False)


def test_a_client_that_leaves_does_not_make_a_replica_seem_slow(clock: Clock) -> None:
    pace = Pace(clock)
    leave(pace, clock, seconds=9, canceled=2_000)
    work(pace, clock, seconds=0.5, each=100, number=1)
    pace.measure()
    assert pace.rate == pytest.approx(200)
    leave(pace, clock, seconds=9, canceled=2_000)
    work(pace, clock, seconds=0.5, each=100, number=1)
    pace.measure()
    assert pace.rate == pytest.approx(200)


def test_clients_that_leave_because_a_replica_is_slow_make_it_slow(clock: Clock) -> None:
    pace = Pace(clock)
    work(pace, clock, seconds=0.5, each=100, number=1)
    pace.measure()
    leave(pace, clock, seconds=9, canceled=100)  # at its rate, it would have finished
    work(pace, clock, seconds=0.5, each=100, number=1)
    pace.measure()
    assert pace.rate == pytest.approx(200 - 0.3 * (200 - 100 / 9.5))


def test_canceled_work_next_to_finished_work_takes_no_time_from_it(clock: Clock) -> None:
    pace = Pace(clock)
    pace.set_busy(True)
    pass_time(pace, clock, 1)
    pace.cancel(5_000)  # while another job is in progress
    pass_time(pace, clock, 1)
    pace.add(100)
    pace.set_busy(False)
    pace.measure()
    assert pace.rate == pytest.approx(50)


class Counted(FakeBackend):
    """A backend that counts its jobs."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(fake_info(), delay_s=delay_s)
        self.num_jobs = 0

    async def embed(self, job: EmbedJob) -> Embeddings:
        self.num_jobs += 1
        return await super().embed(job)


async def ask_for(seconds: float, pool: Pool, num_clients: int) -> None:
    """Send requests without a pause, like several clients."""
    until_s = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < until_s:
            await pool.embed(make_job("a text"))

    await asyncio.gather(*(client() for _ in range(num_clients)))


async def test_a_new_replica_gets_its_share_although_its_rate_is_unknown() -> None:
    old, new = Counted(0.01), Counted(0.01)
    async with (
        hosted(old, fake_info(), "old") as (_old, first),
        hosted(new, fake_info(), "new") as (_new, second),
        pool_of(first) as pool,
    ):
        await ask_for(0.6, pool, 4)
        await until(lambda: pool.lines["old"].load.rate > 0)
        before = old.num_jobs
        pool.update({"old": first, "new": second})
        await until(lambda: len(pool.usable) == 2)
        await ask_for(0.2, pool, 4)  # before it has reported its rate
    assert new.num_jobs > (old.num_jobs - before) / 3


async def test_a_slow_replica_is_avoided() -> None:
    backends = {"fast": Counted(0.01), "slow": Counted(0.6)}
    async with AsyncExitStack() as stack:
        places = [
            (await stack.enter_async_context(hosted(backend, fake_info(), name)))[1]
            for name, backend in backends.items()
        ]
        pool = await stack.enter_async_context(pool_of(*places))
        await ask_for(1.5, pool, 6)  # until both have reported their rates
        before = Counter({name: backend.num_jobs for name, backend in backends.items()})
        await ask_for(1.0, pool, 6)
    asked = Counter({name: backend.num_jobs for name, backend in backends.items()}) - before
    assert asked["fast"] > 20 * max(1, asked["slow"])


class Noting(Pace):
    """A pace that includes the canceled work."""

    canceled = 0

    def cancel(self, work: int) -> None:
        self.canceled += work
        super().cancel(work)


async def test_a_replica_notes_the_work_of_a_client_that_left() -> None:
    async with hosted(Counted(60), fake_info()) as (host, place), pool_of(place) as pool:
        pace = host._pace = Noting()
        left = asyncio.create_task(pool.embed(make_job("a text")))
        await until(lambda: host.num_requests == 1)
        left.cancel()
        await until(lambda: host.num_requests == 0)
        assert pace.canceled == work_of(("a text",), None, None)


async def test_a_replica_that_fails_at_once_is_not_fast() -> None:
    def fail(_job: EmbedJob) -> None:
        raise InternalError("broken")

    async with hosted(FakeBackend(fake_info(), on_embed=fail), fake_info()) as (host, place), pool_of(place) as pool:
        for _ in range(20):
            with pytest.raises(InternalError):
                await pool.embed(make_job())
        host._pace.measure()
        assert host.load().rate == 0
