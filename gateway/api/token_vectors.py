"""Write a vector for each token of a text: up to hundreds of megabytes of JSON, while others are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import orjson

from gateway.embedding import MultiVector, States

# orjson holds the interpreter lock for as long as it writes: some 40 ns a number, so about 10 ms a piece.
_NUMBERS_IN_PIECE = 1 << 18


async def write_token_vectors(texts: Sequence[MultiVector | States]) -> list[orjson.Fragment]:
    """Return the JSON of each text's vectors, ``[[float]]``, to be put into an answer as it is.

    It is written in a thread and in pieces, so that nobody waits for more than one of them.

    Args:
        texts: ``(t, d)`` float32 each.
    """
    if not texts:
        return []
    return await asyncio.to_thread(lambda: [orjson.Fragment(_write(vectors)) for vectors in texts])


def _write(vectors: MultiVector | States) -> bytes:
    num_rows = max(1, _NUMBERS_IN_PIECE // max(1, vectors.shape[1]))
    pieces = [
        orjson.dumps(vectors[first : first + num_rows], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        for first in range(0, len(vectors), num_rows)
    ]
    return b"[" + b",".join(pieces) + b"]"
