"""Write answers as JSON in pieces: up to hundreds of megabytes, of which no more than a piece is in memory as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import orjson

# orjson holds the interpreter lock for as long as it writes: about 40 ns a number, so some milliseconds a piece.
_NUMBERS_IN_PIECE = 1 << 16
PIECE_BYTES = 1 << 19
"""Smaller parts are put together to pieces of about this size."""


def dumps(value: object) -> bytes:
    """Return a value as JSON; numpy arrays as lists, float32 in the shortest form that reads back exactly."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def vector_list(vectors: npt.NDArray[np.generic]) -> Iterator[bytes]:
    """Write an array as a list of lists.

    Args:
        vectors: ``(n, d)``.
    """
    rows = max(1, _NUMBERS_IN_PIECE // max(1, vectors.shape[1]))
    return _list(dumps(vectors[first : first + rows])[1:-1] for first in range(0, len(vectors), rows))


def value_list(values: Iterable[object]) -> Iterator[bytes]:
    """Write values as a list; each is written in one go."""
    return _list(map(dumps, values))


def nested_list(items: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """Write a list of what has been written in parts itself."""
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
    """Put parts together to pieces that are worth sending."""
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
