"""The similarity of a query and a text by their vectors."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.similarity import QueryVectors, dense_similarity, max_similarity, sparse_similarity
from gateway.types import Embeddings, Output, SparseVector, Timings


def array(*rows: object) -> np.ndarray:
    return np.array(rows, np.float32)


def sparse(**weights: float) -> SparseVector:
    indices = np.array([int(name[1:]) for name in weights], np.int64)
    return SparseVector(indices, np.array(list(weights.values()), np.float32))


QUERY = Embeddings(
    vectors=array([3.0, 4.0]),
    num_tokens=[3],
    truncated=[],
    timings=Timings(0, 0, 0),
    sparse=[sparse(t1=2.0, t5=1.0)],
    multivectors=[array([1.0, 0.0], [0.0, 1.0])],
)
DENSE, WEIGHTS, VECTORS = array([0.0, 2.0]), sparse(t0=9.0, t5=3.0), array([0.6, 0.8], [1.0, 0.0], [-1.0, 0.0])
ALL = {Output.DENSE: 0.8, Output.SPARSE: 3.0, Output.MULTIVECTOR: 0.9}


def test_dense_vectors_are_compared_by_their_product_or_their_cosine() -> None:
    assert dense_similarity(array(3.0, 4.0), array(0.0, 2.0), is_normalized=False) == 8.0
    assert dense_similarity(array(3.0, 4.0), array(0.0, 2.0), is_normalized=True) == pytest.approx(0.8)
    assert np.isnan(dense_similarity(array(3.0, 4.0), array(0.0, 0.0), is_normalized=True))


def test_sparse_vectors_are_compared_by_the_tokens_of_both() -> None:
    assert sparse_similarity(sparse(t1=2.0, t5=1.0, t7=0.5), sparse(t0=9.0, t5=3.0, t7=4.0)) == 5.0
    assert sparse_similarity(sparse(), sparse(t1=1.0)) == 0.0


def test_maxsim_is_the_sum_or_the_mean_of_the_best_matches() -> None:
    query, text = QUERY.multivectors[0], VECTORS

    assert max_similarity(query, text, is_mean=False) == pytest.approx(1.8)
    assert max_similarity(query, text, is_mean=True) == pytest.approx(0.9)
    assert max_similarity(query, text[:0], is_mean=True) == 0.0
    assert max_similarity(query[:0], text, is_mean=True) == 0.0


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        *(({output: 7.0}, score) for output, score in ALL.items()),
        (dict.fromkeys(ALL, 1.0), (0.8 + 3.0 + 0.9) / 3),
        ({Output.DENSE: 0.4, Output.SPARSE: 0.2, Output.MULTIVECTOR: 0.4}, 0.4 * 0.8 + 0.2 * 3.0 + 0.4 * 0.9),
        ({Output.DENSE: 2.0, Output.SPARSE: 6.0}, (2 * 0.8 + 6 * 3.0) / 8),
    ],
    ids=str,
)
def test_a_score_is_the_weighted_mean_of_the_similarities(weights: dict[Output, float], expected: float) -> None:
    query = QueryVectors(weights, QUERY, is_normalized=True, is_mean=True)

    assert query.score(DENSE, WEIGHTS, VECTORS) == pytest.approx(expected)
