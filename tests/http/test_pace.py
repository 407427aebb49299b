"""Large bodies are read at a bounded rate, in the order of their arrival."""

from __future__ import annotations

import asyncio
import socket
import time

from gateway.http.pace import HeldFlow, Pace


async def test_no_more_passes_in_a_second_than_may() -> None:
    pace = Pace(1_000_000)
    started = time.monotonic()

    await asyncio.gather(*(pace.take(10_000) for _ in range(20)))

    assert time.monotonic() - started >= 0.19


async def test_they_pass_in_their_order() -> None:
    pace = Pace(1_000_000)
    passed: list[int] = []

    async def take(i: int) -> None:
        await pace.take(5_000)
        passed.append(i)

    await asyncio.gather(*(take(i) for i in range(10)))

    assert passed == list(range(10))


async def test_unused_allowance_is_not_saved() -> None:
    pace = Pace(1_000_000)
    await pace.take(1_000)
    await asyncio.sleep(0.2)
    started = time.monotonic()

    await pace.take(100_000)

    assert time.monotonic() - started >= 0.09


async def test_small_pieces_are_not_slowed_down_by_the_grain_of_timers() -> None:
    """Each wait takes a millisecond at least: ten thousand of them took ten seconds for a hundredth of one's bytes."""
    pace = Pace(100_000_000)
    loop = asyncio.get_running_loop()
    waits: list[float] = []
    call_later = loop.call_later
    loop.call_later = lambda delay, *args, **kwargs: waits.append(delay) or call_later(delay, *args, **kwargs)  # type: ignore[method-assign]

    for _ in range(10_000):
        await pace.take(100)

    assert len(waits) < 10


async def test_a_connection_with_unparsed_data_is_not_read() -> None:
    one, other = socket.socketpair()
    transport, _protocol = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=one)
    held = [b"data"]
    flow = HeldFlow(transport, lambda: bool(held))
    flow.pause_reading()

    flow.resume_reading()

    assert not transport.is_reading()
    held.clear()
    flow.resume_reading()
    assert transport.is_reading()
    transport.abort()
    other.close()
