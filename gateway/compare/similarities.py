"""The similarities of queries and documents by one output of a model: find the nearest documents, and score candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse as matrices

from gateway.cache.files import Ragged
from gateway.compare.fusion import Places, Scores, best
from gateway.compare.search import FloatMatrix, IntMatrix, search

_MAX_BYTES = 128 * 2**20
_BYTES_PER_SCORE = 16  # the previous block is still in memory
_TOKENS_AT_ONCE = 8_192
# Scores in single precision can order near-equal documents wrongly, so this many more are computed exactly.
_SPARE = 32

Found = tuple[IntMatrix, FloatMatrix]
"""Places of documents and their scores, ``(queries, depth)`` each; a row with fewer ends with place -1 and score -inf."""


class Similarity(Protocol):
    """The similarities by one output."""

    def nearest(self, depth: int) -> Found:
        """Return the documents with the highest scores for each query; among equal scores, the first document wins."""

    def of(self, candidates: Sequence[Places]) -> list[Scores]:
        """Return the score of each candidate of each query; -inf for one without anything in common."""


@dataclass(frozen=True, slots=True)
class Dense:
    """The dot products of dense vectors, ``(n, width)`` float32.

    Attributes:
        excluded: for each query, the place of a document to leave out, or ``None``.
    """

    queries: FloatMatrix
    documents: FloatMatrix
    excluded: Sequence[int | None]

    def nearest(self, depth: int) -> Found:
        return search(self.queries, self.documents, depth, self.excluded)

    def of(self, candidates: Sequence[Places]) -> list[Scores]:
        return [
            self.documents[places].astype(np.float64) @ query.astype(np.float64)
            for query, places in zip(self.queries, candidates, strict=True)
        ]


class Sparse:
    """The sums, over the tokens of both texts, of the products of their weights.

    Args:
        queries, documents: rows with ``index`` and ``value``.
        excluded: for each query, the place of a document to leave out, or ``None``.
    """

    def __init__(self, queries: Ragged, documents: Ragged, excluded: Sequence[int | None]) -> None:
        size = 1 + max((int(side.rows["index"].max()) for side in (queries, documents) if len(side.rows)), default=0)
        self._queries = _as_matrix(queries, size)
        self._documents = _as_matrix(documents, size)
        self._excluded = excluded

    def nearest(self, depth: int) -> Found:
        num_queries, num_documents = self._queries.shape[0], self._documents.shape[0]
        at_once = max(1, _MAX_BYTES // (_BYTES_PER_SCORE * max(1, num_documents)))
        transposed = self._documents.T.tocsr()
        parts = []
        for start in range(0, num_queries, at_once):
            block = self._queries[start : start + at_once] @ transposed
            for row, left_out in enumerate(self._excluded[start : start + at_once]):
                own = slice(block.indptr[row], block.indptr[row + 1])
                order = np.argsort(block.indices[own])
                places, scores = block.indices[own][order].astype(np.int64), block.data[own][order]
                is_found = (scores > 0) & (places != (-1 if left_out is None else left_out))
                parts.append((places[is_found], scores[is_found]))
        return best([places for places, _ in parts], [scores for _, scores in parts], min(depth, num_documents))

    def of(self, candidates: Sequence[Places]) -> list[Scores]:
        found = []
        for number, places in enumerate(candidates):
            scores = (self._documents[places] @ self._queries[[number]].T).toarray()[:, 0]
            found.append(np.where(scores > 0, scores, -np.inf))
        return found


def _as_matrix(weights: Ragged, size: int) -> matrices.csr_array:
    """Return the weights as a matrix ``(texts, size)``, in double precision."""
    lengths = [end - start for start, end in weights.places]
    rows = [weights[place] for place in range(len(weights))]
    together = np.concatenate(rows) if rows else weights.rows[:0]
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    values = together["value"].astype(np.float64)
    return matrices.csr_array((values, together["index"].astype(np.int64), starts), shape=(len(lengths), size))


@dataclass(frozen=True, slots=True)
class Tokens:
    """MaxSim: the mean, over the vectors of the query, of the best dot product with a vector of the document.

    A document without vectors scores 0. (Khattab & Zaharia 2020, "ColBERT", https://arxiv.org/abs/2004.12832, takes the
    sum, which gives the same order of documents.)

    Attributes:
        queries: vectors of each query.
        documents: vectors of the documents in ``places``.
        places: places of all documents with known vectors, ascending.
        excluded: for each query, the place of a document to leave out, or ``None``.
    """

    queries: Ragged
    documents: Ragged
    places: Places
    excluded: Sequence[int | None]

    def nearest(self, depth: int) -> Found:
        """Compare every query with every document."""
        candidates = []
        for number in range(len(self.queries)):
            rough = self._rough(number)
            if (left_out := self.excluded[number]) is not None:
                rough[self.places == left_out] = -np.inf
            number_kept = min(len(rough), depth + _SPARE)
            kept = np.sort(np.argpartition(-rough, number_kept - 1)[:number_kept])
            candidates.append(self.places[kept[rough[kept] > -np.inf]])
        return best(candidates, self.of(candidates), min(depth, len(self.places)))

    def of(self, candidates: Sequence[Places]) -> list[Scores]:
        found = []
        for number, places in enumerate(candidates):
            query = np.asarray(self.queries[number], dtype=np.float64)
            own = np.searchsorted(self.places, places)
            found.append(_max_similarities(query, [self.documents[place] for place in own]))
        return found

    def _rough(self, number: int) -> Scores:
        """Return the scores of all documents for a query, in single precision."""
        query = np.asarray(self.queries[number], dtype=np.float32)
        scores = []
        block: list[npt.NDArray[np.float16]] = []
        size = 0
        for place in range(len(self.documents)):
            block.append(self.documents[place])
            size += len(block[-1])
            if size >= _TOKENS_AT_ONCE or place == len(self.documents) - 1:
                scores.append(_max_similarities(query, block))
                block, size = [], 0
        return np.concatenate(scores) if scores else np.zeros(0)


def _max_similarities(query: npt.NDArray[np.floating], documents: Sequence[npt.NDArray[np.float16]]) -> Scores:
    """Return MaxSim of a query with each document, in the precision of the query."""
    scores = np.zeros(len(documents))
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    has_vectors = lengths > 0
    if not len(query) or not has_vectors.any():
        return scores
    vectors = np.concatenate([document for document in documents if len(document)]).astype(query.dtype)
    starts = np.concatenate(([0], np.cumsum(lengths[has_vectors])[:-1]))
    scores[has_vectors] = np.maximum.reduceat(query @ vectors.T, starts, axis=1).mean(axis=0, dtype=np.float64)
    return scores
