"""Similarities of a query and a text by dense, sparse or per-token vectors. Pure functions on numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gateway.types import Embeddings, MultiVector, Output, SparseVector, Vectors


@dataclass(frozen=True, slots=True, eq=False)
class QueryVectors:
    """The vectors of a query, which score a text by its vectors.

    The rule is FlagEmbedding's (``inference/embedder/encoder_only/m3.py``): the mean of the similarities, with weights.

    Attributes:
        weights: the weight of each output's similarity; only the ratio of the weights matters.
        query: the outputs of the query alone.
        is_normalized: whether dense vectors are compared by their cosine, rather than by their product.
        is_mean: whether :func:`max_similarity` is the mean over the query's vectors, rather than the sum.
    """

    weights: Mapping[Output, float]
    query: Embeddings
    is_normalized: bool
    is_mean: bool

    def score(self, dense: Vectors, sparse: SparseVector | None, multivector: MultiVector | None) -> float:
        """Return the score of a text; a larger score means a better match.

        Args:
            dense: ``(1, width)`` float32, not normalized.
        """
        found = {}
        if Output.DENSE in self.weights:
            found[Output.DENSE] = dense_similarity(self.query.vectors[0], dense[0], is_normalized=self.is_normalized)
        if self.query.sparse and sparse is not None:
            found[Output.SPARSE] = sparse_similarity(self.query.sparse[0], sparse)
        if self.query.multivectors and multivector is not None:
            found[Output.MULTIVECTOR] = max_similarity(self.query.multivectors[0], multivector, is_mean=self.is_mean)
        return sum(weight * found[output] for output, weight in self.weights.items()) / sum(self.weights.values())


def dense_similarity(query: Vectors, text: Vectors, *, is_normalized: bool) -> float:
    """Return the dot product of two vectors, ``(width,)`` each, or their cosine if ``is_normalized``."""
    product = float(np.dot(query.astype(np.float64), text))
    if not is_normalized:
        return product
    with np.errstate(all="ignore"):  # the result shows which numbers are not finite
        return float(np.divide(product, np.linalg.norm(query) * np.linalg.norm(text)))


def sparse_similarity(query: SparseVector, text: SparseVector) -> float:
    """Return the sum, over the tokens that both have, of the product of the two weights."""
    _both, mine, theirs = np.intersect1d(query.indices, text.indices, assume_unique=True, return_indices=True)
    return float(np.dot(query.values[mine].astype(np.float64), text.values[theirs]))


def max_similarity(query: MultiVector, text: MultiVector, *, is_mean: bool) -> float:
    """Return MaxSim (Khattab, Zaharia: "ColBERT", SIGIR 2020): the sum, over the query's vectors, of each one's best match.

    Args:
        is_mean: divide the sum by the number of the query's vectors.
    """
    if not len(query) or not len(text):
        return 0.0
    best = (query @ text.T).max(axis=1).astype(np.float64)
    return float(best.mean() if is_mean else best.sum())
