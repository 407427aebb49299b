"""Vectors of tokens are written as they are, however large, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import orjson
import pytest

from gateway.api.token_vectors import write_token_vectors


@pytest.mark.parametrize("width", [1, 8, 1024, 300_000])
async def test_what_is_written_in_pieces_reads_back_exactly(width: int) -> None:
    rng = np.random.default_rng(5)
    texts = [
        rng.standard_normal((length, width)).astype(np.float32) for length in (0, 1, 2, 3, max(4, 600_000 // width))
    ]

    written = orjson.loads(orjson.dumps(await write_token_vectors(texts)))

    for vectors, rows in zip(texts, written, strict=True):
        np.testing.assert_array_equal(np.array(rows, np.float32).reshape(-1, width), vectors)


async def test_nothing_is_written_of_nothing() -> None:
    assert await write_token_vectors([]) == []


async def test_the_event_loop_goes_on_while_much_is_written() -> None:
    vectors = np.random.default_rng(5).standard_normal((4_096, 1_024)).astype(np.float32)
    started = time.monotonic()
    writing = asyncio.create_task(write_token_vectors([vectors]))

    num_turns = 0
    while not writing.done():
        await asyncio.sleep(0)
        num_turns += 1

    assert num_turns > 3, f"{num_turns} turns in {time.monotonic() - started:.3f} s"
