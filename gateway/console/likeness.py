"""The similarity of texts by the outputs of one arm, and their order for a query. Pure, on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gateway.precision import Precision
from gateway.requests import EmbedAnswer
from gateway.similarity import max_similarity, sparse_similarity
from gateway.types import Output, Vectors
from gateway.vectors import quantize

_BYTES_OF_WEIGHT = 8  # an index and a weight of 4 bytes each
_BYTES_OF_FLOAT = 4


def between(one: EmbedAnswer, other: EmbedAnswer, output: Output) -> Vectors:
    """Return the similarity of each text of one answer with each of another: ``(n, m)`` float32.

    Dense vectors are compared by their cosine, in the precision of the answer; sparse weights by the sum over common
    tokens; token vectors by the mean over the first text's vectors.
    """
    if output is Output.SPARSE:
        rows = [[sparse_similarity(a, b) for b in other.sparse or ()] for a in one.sparse or ()]
        return np.array(rows, np.float32)
    if output is Output.MULTIVECTOR:
        rows = [[max_similarity(a, b, is_mean=True) for b in other.multivectors or ()] for a in one.multivectors or ()]
        return np.array(rows, np.float32)
    return np.asarray(np.clip(_directions(one) @ _directions(other).T, -1, 1), np.float32)


def _directions(answer: EmbedAnswer) -> Vectors:
    """Return the vectors as a store with this precision compares them, normalized to length 1."""
    vectors = answer.vectors
    match answer.precision:
        case Precision.BINARY | Precision.UBINARY:
            vectors = np.where(vectors > 0, 1, -1).astype(np.float32)
        case Precision.INT8 | Precision.UINT8 if answer.ranges is not None:
            steps = (answer.ranges.high - answer.ranges.low) / 255
            places = quantize(vectors, Precision.UINT8, answer.ranges)
            vectors = (answer.ranges.low + places * steps).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)


def order(scores: Sequence[float]) -> list[int]:
    """Return the indices of texts, best first; equal scores keep the order of the texts."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, highest first, from 1; equal values share the mean of their ranks."""
    numbers = np.asarray(values, np.float64)
    _levels, level, counts = np.unique(-numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return [float(rank) for rank in (last - (counts - 1) / 2)[level]]


def bytes_per_text(answer: EmbedAnswer, output: Output) -> int:
    """Return the bytes that a store needs for a text; the median if texts differ."""
    if output is Output.SPARSE:
        return int(np.median([_BYTES_OF_WEIGHT * len(weights.indices) for weights in answer.sparse or ()]))
    if output is Output.MULTIVECTOR:
        return int(np.median([vectors.nbytes for vectors in answer.multivectors or ()]))
    width = int(answer.vectors.shape[1])
    match answer.precision:
        case Precision.BINARY | Precision.UBINARY:
            return -(-width // 8)
        case Precision.INT8 | Precision.UINT8:
            return width
    return _BYTES_OF_FLOAT * width
