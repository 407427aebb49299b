"""Similarities by token weights and token vectors, and their combination: compared with plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from gateway.cache.files import Ragged
from gateway.compare import similarities
from gateway.compare.embedding import WEIGHT
from gateway.compare.fusion import best, fuse_ranks, fuse_scores, union
from gateway.compare.similarities import Dense, Similarity, Sparse, Tokens

NUM_QUERIES, NUM_DOCUMENTS, WIDTH = 5, 60, 8
NOTHING = [None] * NUM_QUERIES


def ragged(parts: Sequence[np.ndarray], row: np.dtype) -> Ragged:
    ends = np.cumsum([len(part) for part in parts]).tolist()
    together = np.concatenate(parts).astype(row) if row.names is None else np.concatenate(parts)
    return Ragged(together, list(zip([0, *ends[:-1]], ends, strict=True)))


@pytest.fixture
def weights() -> tuple[Ragged, Ragged]:
    random = np.random.default_rng(3)

    def text() -> np.ndarray:
        tokens = np.flatnonzero(random.random(30) < 0.2)
        rows = np.empty(len(tokens), WEIGHT)
        rows["index"], rows["value"] = tokens * 1000, random.random(len(tokens))
        return rows

    return tuple(ragged([text() for _ in range(number)], WEIGHT) for number in (NUM_QUERIES, NUM_DOCUMENTS))


@pytest.fixture
def tokens() -> tuple[Ragged, Ragged]:
    random = np.random.default_rng(4)
    row = np.dtype("<f2")

    def texts(number: int, shortest: int) -> Ragged:
        return ragged([random.standard_normal((random.integers(shortest, 9), WIDTH)) for _ in range(number)], row)

    return texts(NUM_QUERIES, 1), texts(NUM_DOCUMENTS, 0)


def dot(query: np.ndarray, document: np.ndarray) -> float:
    both = dict(zip(document["index"].tolist(), document["value"].tolist(), strict=True))
    return sum(
        value * both.get(index, 0.0)
        for index, value in zip(*(query[name].tolist() for name in WEIGHT.names), strict=True)
    )


def max_similarity(query: np.ndarray, document: np.ndarray) -> float:
    if not len(document):
        return 0.0
    return float(np.mean([max(float(np.dot(q.astype(float), d.astype(float))) for d in document) for q in query]))


def check(similarity: Similarity, expected: np.ndarray, depth: int = 10) -> None:
    """Compare the first documents with those of all scores; -inf is not found."""
    places, scores = similarity.nearest(depth)
    for query in range(NUM_QUERIES):
        order = [
            place for place in np.argsort(-expected[query], kind="stable")[:depth] if expected[query, place] > -np.inf
        ]
        assert places[query][places[query] >= 0].tolist() == order
        np.testing.assert_allclose(scores[query, : len(order)], expected[query, order], rtol=1e-6)
    some = [np.array([0, 7, 9])] * NUM_QUERIES
    np.testing.assert_allclose(np.stack(similarity.of(some)), expected[:, [0, 7, 9]], rtol=1e-6)


def test_token_weights(weights: tuple[Ragged, Ragged], monkeypatch: pytest.MonkeyPatch) -> None:
    queries, documents = weights
    expected = np.array([[dot(queries[q], documents[d]) for d in range(NUM_DOCUMENTS)] for q in range(NUM_QUERIES)])
    expected[expected == 0] = -np.inf
    assert np.isinf(expected).any()
    check(Sparse(queries, documents, NOTHING), expected)
    monkeypatch.setattr(similarities, "_MAX_BYTES", 1)  # one query at a time
    check(Sparse(queries, documents, NOTHING), expected)
    first = int(np.argmax(expected[2]))
    expected[2, first] = -np.inf
    places, _ = Sparse(queries, documents, [None, None, first, None, None]).nearest(10)
    assert first not in places[2]


def test_token_vectors(tokens: tuple[Ragged, Ragged], monkeypatch: pytest.MonkeyPatch) -> None:
    queries, documents = tokens
    expected = np.array(
        [[max_similarity(queries[q], documents[d]) for d in range(NUM_DOCUMENTS)] for q in range(NUM_QUERIES)]
    )
    assert (expected == 0).any()  # documents without a vector
    everything = np.arange(NUM_DOCUMENTS)
    check(Tokens(queries, documents, everything, NOTHING), expected)
    monkeypatch.setattr(similarities, "_TOKENS_AT_ONCE", 1)  # one document at a time
    monkeypatch.setattr(similarities, "_SPARE", 0)
    check(Tokens(queries, documents, everything, NOTHING), expected)
    first = int(np.argmax(expected[2]))
    places, _ = Tokens(queries, documents, everything, [None, None, first, None, None]).nearest(10)
    assert first not in places[2]


def test_dense_vectors() -> None:
    random = np.random.default_rng(5)
    queries, documents = (random.standard_normal((n, WIDTH)).astype(np.float32) for n in (NUM_QUERIES, NUM_DOCUMENTS))
    check(Dense(queries, documents, NOTHING), queries.astype(float) @ documents.T.astype(float))


def test_ranks_are_fused_by_hand() -> None:
    """The second is found by one of them only."""
    first, second = np.array([0.9, 0.8, 0.7]), np.array([1.0, -np.inf, 2.0])
    np.testing.assert_allclose(fuse_ranks([first, second]), [1 / 61 + 1 / 62, 1 / 62, 1 / 63 + 1 / 61])


def test_ranks_beyond_the_first_200_count_nothing() -> None:
    fused = fuse_ranks([np.arange(250, 0, -1.0)])
    assert (fused[:200] > 0).all()
    assert (fused[200:] == 0).all()


def test_scores_are_fused_by_their_weights() -> None:
    fused = fuse_scores([np.array([1.0, 0.5]), np.array([-np.inf, 2.0])], [3, 1])
    np.testing.assert_allclose(fused, [0.75, 0.875])


def test_of_equal_scores_the_first_place_wins() -> None:
    places, scores = best([np.array([4, 7, 9])], [np.array([1.0, -np.inf, 1.0])], 4)
    assert places.tolist() == [[4, 9, -1, -1]]
    assert scores.tolist() == [[1.0, 1.0, -np.inf, -np.inf]]


def test_candidates_are_those_of_any_list() -> None:
    assert union([np.array([5, 1, -1]), np.array([1, 3, -1])]).tolist() == [1, 3, 5]
