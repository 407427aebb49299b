"""Write answers as JSON in pieces: up to hundreds of megabytes, of which no more than a piece is in memory as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

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

# orjson holds the interpreter lock for as long as it writes: about 40 ns per number, so some milliseconds per piece.
_NUMBERS_IN_PIECE = 1 << 16
PIECE_BYTES = 1 << 19
"""Smaller parts are joined to pieces of about this size."""


def dumps(value: object) -> bytes:
    """Return a value as JSON; numpy arrays as lists, float32 in the shortest form that reads back exactly."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def rows_in_piece(width: int) -> int:
    """Return how many vectors of that many dimensions are written in one go."""
    return max(1, _NUMBERS_IN_PIECE // max(1, width))


def vector_list(vectors: npt.NDArray[np.generic]) -> Iterator[bytes]:
    """Write an array as a list of lists.

    Args:
        vectors: ``(n, d)``.
    """
    rows = rows_in_piece(vectors.shape[1])
    return _list(dumps(vectors[first : first + rows])[1:-1] for first in range(0, len(vectors), rows))


def value_list(values: Iterable[object]) -> Iterator[bytes]:
    """Write values as a list; each is written in one go."""
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
        before: the fields in front of it, one at least.
        after: those behind it, one at least.
    """
    yield dumps(before)[:-1] + b',"%b":' % name.encode()
    yield from parts
    yield b"," + dumps(after)[1:]


def _list(items: Iterable[bytes]) -> Iterator[bytes]:
    return nested_list((item,) for item in items)


def in_pieces(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Join parts to pieces that are worth sending."""
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
    """An answer that is written while it is sent, in turns with other clients' work, until its client goes away."""

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
    """Await ``work``, and cancel it when the client goes away.

    Raises:
        ClientDisconnected: the client went away first.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected("the client closed the connection before the answer")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
