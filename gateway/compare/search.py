"""Exact search: every query against every document, as nothing but the vectors is to make a difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ranking: TypeAlias = Mapping[str, Sequence[tuple[str, float]]]
"""For each query the documents with their scores, best first."""

FloatMatrix: TypeAlias = npt.NDArray[np.float32]
IntMatrix: TypeAlias = npt.NDArray[np.int64]

_MAX_BYTES = 256 * 2**20
# What a query and a document take together: a score, its key, and copies of both.
_BYTES_PER_SCORE = 32
_QUERIES_AT_ONCE = 256
# Candidates beyond the depth: which of two nearly equal scores comes first is settled by the exact scores.
_SPARE = 32
_NOWHERE = np.iinfo(np.uint32).max


def search(
    query_vectors: FloatMatrix,
    document_vectors: FloatMatrix,
    depth: int = 100,
    excluded: Sequence[int | None] | None = None,
) -> tuple[IntMatrix, FloatMatrix]:
    """Find the documents with the highest dot products.

    Of documents with equal scores the one that comes first is preferred. The scores are summed in double precision and
    rounded: matrix products are not, and give the same text another score on another number of threads.

    Args:
        query_vectors: (queries, width), float32.
        document_vectors: (documents, width), float32; may be a memory map.
        depth: how many documents to find for a query.
        excluded: for each query the place of a document that it must not find, if there is one: BEIR leaves out a
            document with the query's own id.

    Returns:
        Places of the documents and their scores, each (queries, min(depth, documents)), best first. A row that has
        fewer documents, because one is excluded, ends with place -1 and score -inf.
    """
    num_queries, num_documents = len(query_vectors), len(document_vectors)
    if depth < 1:
        raise ValueError(f"depth must be at least 1, and is {depth}")
    if num_documents >= _NOWHERE:
        raise ValueError(f"at most {_NOWHERE - 1:,} documents can be searched, and there are {num_documents:,}")
    left_out = np.array([-1 if place is None else place for place in excluded or [None] * num_queries], dtype=np.int64)
    if len(left_out) != num_queries:
        raise ValueError(f"excluded must be as long as the queries ({num_queries}), and is {len(left_out)}")
    width = min(depth, num_documents)
    indices = np.full((num_queries, width), -1, dtype=np.int64)
    scores = np.full((num_queries, width), -np.inf, dtype=np.float32)
    for start in range(0, num_queries, _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        candidates = _candidates(query_vectors[rows], document_vectors, depth + _SPARE, left_out[rows])
        for row, places in enumerate(candidates, start=start):
            best, exact = _exact_order(query_vectors[row], document_vectors, places[places != _NOWHERE])
            indices[row, : len(best[:width])] = best[:width]
            scores[row, : len(best[:width])] = exact[:width]
    return indices, scores


def make_ranking(
    query_ids: Sequence[str], document_ids: Sequence[str], indices: IntMatrix, scores: FloatMatrix
) -> dict[str, list[tuple[str, float]]]:
    """Put ids to what ``search`` returned."""
    return {
        query: [(document_ids[place], score) for place, score in zip(places, values, strict=True) if place >= 0]
        for query, places, values in zip(query_ids, indices.tolist(), scores.tolist(), strict=True)
    }


def without_ties(ranking: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Lower the scores of a query's ranking, where needed, until each is below the one before, in single precision.

    Tools that measure a ranking sort it anew, and differ in how: ir-measures takes the greater document id first of
    two with equal scores in nDCG and recall, and the smaller one in RR@10 and Judged@10. Without equal scores, all of
    them see the ranking that was made. A score that is not equal to the one before is left as it is.
    """
    lowered: list[tuple[str, float]] = []
    before = np.float32(np.inf)
    for document, score in ranking:
        own = np.float32(score)
        is_lowered = not own < before
        if is_lowered:
            # The second is for scores about 0, where the next number is too small for some tools to tell from 0.
            own = min(np.nextafter(before, np.float32(-np.inf)), before - np.float32(1e-9))
        lowered.append((document, float(own) if is_lowered else score))
        before = own
    return lowered


def _candidates(
    queries: FloatMatrix, documents: FloatMatrix, depth: int, left_out: IntMatrix
) -> npt.NDArray[np.uint32]:
    """Return (queries, min(depth, documents)) places of the best documents in no order; ``_NOWHERE`` for none."""
    at_once = max(1, _MAX_BYTES // (_BYTES_PER_SCORE * max(1, len(queries))))
    best = np.empty((len(queries), 0), dtype=np.uint64)
    for start in range(0, len(documents), at_once):
        keys = _keys(queries @ documents[start : start + at_once].T, start)
        here = np.flatnonzero((left_out >= start) & (left_out < start + at_once))
        keys[here, left_out[here] - start] = 0
        best = np.concatenate((best, keys), axis=1)
        if best.shape[1] > depth:
            best = np.partition(best, best.shape[1] - depth, axis=1)[:, -depth:]
    places = _NOWHERE - (best & np.uint64(_NOWHERE)).astype(np.uint32)
    return np.asarray(places, dtype=np.uint32)


def _keys(scores: FloatMatrix, start: int) -> npt.NDArray[np.uint64]:
    """Return integers that sort as the scores do, and of equal scores the earlier document above the later.

    The bits of a float32 sort as integers do, once those of a negative number are turned round.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # the sum makes 0 of -0
    sign = np.uint32(1 << 31)
    ordered = np.where(bits & sign, ~bits, bits | sign).astype(np.uint64)
    places = np.arange(start, start + scores.shape[1], dtype=np.uint64)
    return np.asarray((ordered << np.uint64(32)) | (np.uint64(_NOWHERE) - places))


def _exact_order(
    query: npt.NDArray[np.float32], documents: FloatMatrix, places: npt.NDArray[np.uint32]
) -> tuple[IntMatrix, npt.NDArray[np.float32]]:
    found = np.sort(places).astype(np.int64)
    scores = (documents[found].astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    return found[order], scores[order]
