"""Replicas that stop without a word, as when their machine loses its power or its network."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.cluster.host import Host
from gateway.cluster.line import Place
from gateway.types import ModelInfo
from tests.cluster.test_wire import Slow, hosted, make_job, pool_of, until


@pytest.fixture
def info() -> ModelInfo:
    return fake_info("mini", 8)


@pytest.fixture
def other_process() -> Iterator[tuple[subprocess.Popen[str], Place]]:
    """Yield a replica in another process, and its place."""
    command = [sys.executable, "-m", "tests.cluster.replica_process", "r1", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Place(**json.loads(process.stdout.readline()))
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


async def test_the_requests_of_a_stopped_process_are_answered_by_another_within_seconds(
    info: ModelInfo, other_process: tuple[subprocess.Popen[str], Place]
) -> None:
    process, place = other_process
    async with hosted(FakeBackend(info), info, "r2", "n2") as (_host, here), pool_of(place, here) as pool:
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()

        async def seconds() -> float:
            await pool.embed(make_job(left_s=30))
            return time.monotonic() - began

        took = await asyncio.gather(*(seconds() for _ in range(16)))
        assert max(took) > 0.5  # some went to the stopped process
        assert max(took) < 4
        assert pool.lines["r1"].is_usable  # the connection stays for a while
        began = time.monotonic()
        assert max(await asyncio.gather(*(seconds() for _ in range(16)))) < 1  # new ones avoid it
        process.send_signal(signal.SIGCONT)
        await until(lambda: not pool.lines["r1"].is_quiet)


async def test_a_silent_replica_drops_the_jobs_that_others_have_got_when_it_is_back(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.cluster.line._QUIET_S", 0.1)
    monkeypatch.setattr("gateway.cluster.line._CHECK_S", 0.05)
    busy = Slow(info)
    async with hosted(busy, info, "r1", "n1") as (host, there), pool_of(there) as pool:
        jobs = [asyncio.create_task(pool.embed(make_job(f"text {n}"))) for n in range(4)]
        await until(lambda: len(busy.begun) == 4)
        silence(host)
        await until(lambda: pool.lines["r1"].is_quiet)
        assert not any(job.done() for job in jobs)  # there is no other

        async with hosted(FakeBackend(info), info, "r2", "n2") as (_host, here):
            pool.update({place.id: place for place in (there, here)})
            assert [len((await job).vectors) for job in jobs] == [1] * 4
            await until(lambda: len(busy.canceled) == 4)
            assert not host.num_requests


async def test_a_job_returns_to_a_replica_that_is_back_when_the_other_falls_silent(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary is of one replica, so its requests wait for it."""
    monkeypatch.setattr("gateway.cluster.line._QUIET_S", 0.7)
    monkeypatch.setattr("gateway.cluster.line._CHECK_S", 0.05)
    silenced, busy = Slow(info), Slow(info)
    async with (
        hosted(silenced, info, "r1", "n1") as (first, one),
        hosted(busy, info, "r2", "n2") as (second, two),
        pool_of(one) as pool,
    ):
        job = asyncio.create_task(pool.embed(make_job()))
        await until(lambda: len(silenced.begun) == 1)
        pool.update({place.id: place for place in (one, two)})
        await until(lambda: len(pool.usable) == 2)
        silence(first)
        await until(lambda: len(busy.begun) == 1)
        first._reporting = asyncio.create_task(first._report_load())
        await until(lambda: not pool.lines["r1"].is_quiet)

        async def vocabulary() -> Any:
            await asyncio.sleep(10)

        monkeypatch.setattr(busy, "vocabulary", vocabulary)
        splitting = asyncio.create_task(pool.lines["r2"].vocabulary("split", ["x"], flag=True, limit_s=30))
        silence(second)
        await until(lambda: len(silenced.begun) == 2)
        silenced.may_go.set()
        assert len((await job).vectors) == 1
        assert not splitting.done()
        splitting.cancel()


def silence(host: Host) -> None:
    assert host._reporting is not None
    host._reporting.cancel()
