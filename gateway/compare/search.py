"""Exact search of every query against every document, so that rankings differ only by the vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ranking: TypeAlias = Mapping[str, Sequence[tuple[str, float]]]
"""The documents of each query with their scores, best first."""

FloatMatrix: TypeAlias = npt.NDArray[np.float32]
IntMatrix: TypeAlias = npt.NDArray[np.int64]

_MAX_BYTES = 256 * 2**20
_BYTES_PER_SCORE = 8  # the previous block is still in memory
# Candidates beyond the depth. Scores in single precision can order near-equal documents wrongly; the exact scores decide.
_SPARE = 32


def search(
    query_vectors: FloatMatrix,
    document_vectors: FloatMatrix,
    depth: int = 100,
    excluded: Sequence[int | None] | None = None,
) -> tuple[IntMatrix, FloatMatrix]:
    """Find the documents with the highest dot products.

    Among documents with equal scores, the first wins. Scores are summed in double precision and rounded, because a matrix
    product in single precision gives the same text different scores, depending on its place and the number of threads.

    Args:
        query_vectors: (queries, width), float32.
        document_vectors: (documents, width), float32; may be a memory map.
        depth: number of documents to find for each query.
        excluded: for each query, the place of a document to leave out, or ``None``: BEIR leaves out a document with the
            query's own id.

    Returns:
        Places of the documents and their scores, each (queries, min(depth, documents)), best first. A row that is short of
        a document, because one is excluded, ends with place -1 and score -inf.
    """
    num_queries, num_documents = len(query_vectors), len(document_vectors)
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    left_out = [None] * num_queries if excluded is None else excluded
    if len(left_out) != num_queries:
        raise ValueError(f"excluded must be as long as the queries ({num_queries}), got {len(left_out)}")
    width = min(depth, num_documents)
    indices = np.full((num_queries, width), -1, dtype=np.int64)
    scores = np.full((num_queries, width), -np.inf, dtype=np.float32)
    at_once = max(1, _MAX_BYTES // (_BYTES_PER_SCORE * max(1, num_documents)))
    for start in range(0, num_queries, at_once):
        for query, rough in enumerate(query_vectors[start : start + at_once] @ document_vectors.T, start):
            candidates = _highest(
                rough, depth + 1 + _SPARE
            )  # one more than is needed, if the excluded one is among them
            candidates = candidates[candidates != left_out[query]]
            exact = document_vectors[candidates].astype(np.float64) @ query_vectors[query].astype(np.float64)
            rounded = exact.astype(np.float32)
            best = np.argsort(-rounded, kind="stable")[:width]
            indices[query, : len(best)] = candidates[best]
            scores[query, : len(best)] = rounded[best]
    return indices, scores


def _highest(scores: npt.NDArray[np.float32], number: int) -> npt.NDArray[np.int64]:
    """Return the places of the highest scores in ascending order; among equal scores, the first places win."""
    if len(scores) <= number:
        return np.arange(len(scores))
    lowest = np.partition(scores, -number)[-number]
    above = np.flatnonzero(scores > lowest)
    level = np.flatnonzero(scores == lowest)[: number - len(above)]
    return np.sort(np.concatenate((above, level)))


def make_ranking(
    query_ids: Sequence[str], document_ids: Sequence[str], indices: IntMatrix, scores: FloatMatrix
) -> dict[str, list[tuple[str, float]]]:
    """Return the ranking of each query, with ids instead of the indices of ``search``."""
    return {
        query: [(document_ids[place], score) for place, score in zip(places, values, strict=True) if place >= 0]
        for query, places, values in zip(query_ids, indices.tolist(), scores.tolist(), strict=True)
    }


def without_ties(ranking: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Lower equal scores of a ranking until each is below the previous one, in single precision.

    Tools that measure a ranking sort it again, each in its own way: of two documents with equal scores, ir-measures puts
    the greater id first in nDCG and recall, and the smaller id first in RR@10 and Judged@10. Without equal scores, all
    tools see the original ranking. Scores below the previous one are unchanged.
    """
    lowered: list[tuple[str, float]] = []
    before = np.float32(np.inf)
    for document, score in ranking:
        own = np.float32(score)
        is_lowered = not own < before
        if is_lowered:
            # The subtraction is for scores near 0, where some tools cannot tell the next number from 0.
            own = min(np.nextafter(before, np.float32(-np.inf)), before - np.float32(1e-9))
        lowered.append((document, float(own) if is_lowered else score))
        before = own
    return lowered
