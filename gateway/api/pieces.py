"""Write answers as JSON in pieces, so that only one piece of an answer of hundreds of megabytes is in memory as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.errors import ClientDisconnected
from gateway.http.context import RequestContext
from gateway.http.turns import Turns

T = TypeVar("T")

Parts: TypeAlias = Callable[[], Iterator[bytes]]
"""Writes an answer as JSON, part by part. May be called several times."""

# orjson holds the interpreter lock while it writes: about 40 ns per number, so a few milliseconds per piece.
_NUMBERS_IN_PIECE = 1 << 16
PIECE_BYTES = 1 << 19
"""Smaller parts are joined to pieces of about this size."""
_WATCH_AFTER_S = 0.02


def dumps(value: object) -> bytes:
    """Return a value as JSON; numpy arrays as lists, float32 in the shortest form that reads back exactly."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def rows_in_piece(width: int) -> int:
    """Return how many vectors of this size are written in one step."""
    return max(1, _NUMBERS_IN_PIECE // max(1, width))


def vector_list(vectors: npt.NDArray[np.generic]) -> Iterator[bytes]:
    """Write an array as a list of lists.

    Args:
        vectors: ``(n, d)``.
    """
    rows = rows_in_piece(vectors.shape[1])
    return _list(dumps(vectors[first : first + rows])[1:-1] for first in range(0, len(vectors), rows))


def value_list(values: Iterable[object]) -> Iterator[bytes]:
    """Write values as a list; each value is written in one step."""
    return _list(map(dumps, values))


def nested_list(items: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """Write a list of items that are themselves written in parts."""
    yield b"["
    for i, parts in enumerate(items):
        if i:
            yield b","
        yield from parts
    yield b"]"


def object_around(
    before: Mapping[str, object], name: str, parts: Iterable[bytes], after: Mapping[str, object]
) -> Iterator[bytes]:
    """Write an object with one field that is written in parts.

    Args:
        before: the fields before it; at least one.
        after: the fields after it; at least one.
    """
    yield dumps(before)[:-1] + b',"%b":' % name.encode()
    yield from parts
    yield b"," + dumps(after)[1:]


def _list(items: Iterable[bytes]) -> Iterator[bytes]:
    return nested_list((item,) for item in items)


def in_pieces(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Join parts into pieces that are large enough to send."""
    held: list[bytes] = []
    num_bytes = 0
    for part in parts:
        held.append(part)
        num_bytes += len(part)
        if num_bytes >= PIECE_BYTES:
            yield b"".join(held)
            held, num_bytes = [], 0
    if held:
        yield b"".join(held)


# --------------------------------------------------------------------------------------------------------- sending


class Streamed(StreamingResponse):
    """An answer that is written while it is sent, in turns with other clients' work, until its client disconnects."""

    def __init__(
        self,
        request: Request,
        turns: Turns,
        parts: Parts,
        headers: Mapping[str, str],
        note: Callable[[float], None],
    ) -> None:
        super().__init__(self.pieces(), media_type="application/json", headers=headers)
        self._request = request
        self._turns = turns
        self._parts = parts
        self._note = note
        self._written_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(self._request, self.stream_response(send))
        finally:
            self._note(self._written_s)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the answer, written in the thread."""
        caller = RequestContext.of(self._request).caller
        pieces = in_pieces(self._parts())

        def write() -> bytes:
            started = time.monotonic()
            piece = next(pieces, b"")
            self._written_s += time.monotonic() - started
            return piece

        while piece := await self._turns.run(caller, PIECE_BYTES, write):
            yield piece


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, and cancel it if the client disconnects.

    Raises:
        ClientDisconnected: the client disconnected first.
    """
    loop, task = asyncio.get_running_loop(), cast("asyncio.Task[Any]", asyncio.current_task())
    num_cancels = task.cancelling()
    watching: asyncio.Task[None] | None = None
    is_gone = False

    def leave(watch: asyncio.Task[None]) -> None:
        nonlocal is_gone
        if not watch.cancelled():
            is_gone = True
            task.cancel()

    def watch() -> None:
        nonlocal watching
        watching = loop.create_task(_disconnected(request))
        watching.add_done_callback(leave)

    # Most work ends before a task that watches the client would pay off.
    timer = loop.call_later(_WATCH_AFTER_S, watch)
    try:
        try:
            return await work
        finally:
            if is_gone:  # perhaps just as the work ended, so that its cancellation is still pending
                await asyncio.sleep(0)
    except asyncio.CancelledError:
        if is_gone and task.uncancel() <= num_cancels:
            raise ClientDisconnected("the client closed the connection before the response") from None
        raise
    finally:
        timer.cancel()
        if watching is not None:
            watching.remove_done_callback(leave)
            watching.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
