"""Commands in separate processes: however they end, nothing of them stays."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from gateway.comparisons import child as module
from gateway.comparisons.child import Child

Work = Callable[[], Coroutine[None, None, None]]

_FLOOD = "import sys, time\nfor _ in range(9_000): sys.stderr.write('a line that is never read\\n')\ntime.sleep(600)"
_STUBBORN = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', file=sys.stderr, flush=True)"
)


def run_and_look(work: Work) -> list[str]:
    """Run work in a separate event loop, and return what the loop has left open."""
    with warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always")
        asyncio.run(work())
        gc.collect()
    return [str(warning.message) for warning in left]


async def start(program: str, *, has_stdin: bool = True) -> Child:
    return await Child.start([sys.executable, "-c", program], os.environ, has_stdin=has_stdin)


def is_gone(child: Child) -> bool:
    try:
        os.kill(child.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("has_stdin", [True, False])
def test_messages_and_code_are_read_to_the_end(has_stdin: bool) -> None:
    async def work() -> None:
        child = await start("import sys; sys.stderr.write('one\\ntwo'); sys.exit(3)", has_stdin=has_stdin)
        assert (child.stdin is not None) is has_stdin
        assert await child.stderr.read() == b"one\ntwo"
        assert await child.wait() == 3
        await child.end()

    assert run_and_look(work) == []


def test_messages_that_were_not_read_keep_no_pipe_open_and_cost_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its buffer full, the library stops to read, and never learns that the process has closed the pipe."""
    monkeypatch.setattr(module, "_GRACE_S", 60.0)

    async def work() -> None:
        child = await start(_FLOOD)
        await child.stderr.readline()
        began = time.monotonic()
        await child.end()
        assert time.monotonic() - began < 30  # less than the grace
        assert is_gone(child)

    assert run_and_look(work) == []


def test_a_pipe_that_another_process_holds_delays_nothing(tmp_path: Path) -> None:
    holds = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '300']).pid, file=sys.stderr, flush=True)"

    async def work() -> None:
        child = await start(f"{holds}; time.sleep(600)")
        grandchild = int(await child.stderr.readline())
        await child.end()
        assert is_gone(child)
        os.kill(grandchild, 9)

    assert run_and_look(work) == []


def test_a_process_that_does_not_want_to_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.2)

    async def work() -> None:
        child = await start(f"{_STUBBORN}; time.sleep(600)")
        assert await child.stderr.readline() == b"on\n"
        await child.end()
        assert is_gone(child)
        await child.end()  # again, which changes nothing

    assert run_and_look(work) == []


def test_a_process_is_killed_even_if_the_wait_for_its_end_is_canceled() -> None:
    async def work() -> None:
        child = await start(f"{_STUBBORN}; time.sleep(600)")
        assert await child.stderr.readline() == b"on\n"
        ending = asyncio.create_task(child.end())
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.wait([ending])
        assert await child.wait() == -9

    assert run_and_look(work) == []


@pytest.mark.parametrize("num_steps", range(12))
def test_a_start_that_is_canceled_at_any_moment_leaves_nothing(num_steps: int) -> None:
    started: list[Child] = []

    async def run() -> None:
        child = await start("import time; time.sleep(600)")
        started.append(child)
        try:
            await child.stderr.read()
        finally:
            await child.end()

    async def work() -> None:
        task = asyncio.create_task(run())
        for _ in range(num_steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    assert run_and_look(work) == []
    assert all(map(is_gone, started))
