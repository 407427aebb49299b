"""The search returns the same as comparing every query with every document, always in the same order."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.compare import search as search_module
from gateway.compare.search import make_ranking, search, without_ties


def expected(
    query: npt.NDArray[np.float32], documents: npt.NDArray[np.float32], depth: int, excluded: int | None
) -> list[tuple[int, float]]:
    scores = documents.astype(np.float64) @ query.astype(np.float64)
    order = sorted(range(len(documents)), key=lambda place: (-scores[place], place))
    return [(place, float(scores[place])) for place in order if place != excluded][:depth]


@given(st.data())
def test_returns_the_same_as_a_full_sort(data: st.DataObject) -> None:
    num_documents, num_queries = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 5))
    depth, at_once = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    # Small integers: many scores are equal, and all are exact.
    documents = rng.integers(-1, 2, (num_documents, 3)).astype(np.float32)
    queries = rng.integers(-1, 2, (num_queries, 3)).astype(np.float32)
    choices = st.none() | st.integers(0, num_documents - 1) if num_documents else st.none()
    excluded = [data.draw(choices) for _ in range(num_queries)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "_MAX_BYTES", 8 * num_documents * at_once)
        patch.setattr(search_module, "_SPARE", 0)
        indices, scores = search(queries, documents, depth, excluded)
    width = min(depth, num_documents)
    assert indices.shape == scores.shape == (num_queries, width)
    assert [indices.dtype, scores.dtype] == [np.dtype(np.int64), np.dtype(np.float32)]
    for row, query in enumerate(queries):
        found = [(int(place), float(score)) for place, score in zip(indices[row], scores[row], strict=True)]
        wanted = expected(query, documents, depth, excluded[row])
        assert found == wanted + [(-1, -np.inf)] * (width - len(wanted))


def test_the_same_text_has_the_same_score_at_any_position() -> None:
    rng = np.random.default_rng(3)
    documents = rng.normal(size=(1003, 384)).astype(np.float32)
    query = rng.normal(size=(2, 384)).astype(np.float32)
    best = int(np.argmax(documents @ query[0]))
    twins = [1, 500, 1002]
    documents[twins] = documents[best]
    indices, scores = search(query, documents, 4)
    assert indices[0].tolist() == sorted({*twins, best})
    assert len(set(scores[0].tolist())) == 1


def test_finds_the_best_among_many_and_orders_by_the_exact_score() -> None:
    rng = np.random.default_rng(5)
    documents = rng.normal(size=(3000, 32)).astype(np.float32)
    queries = rng.normal(size=(300, 32)).astype(np.float32)
    indices, scores = search(queries, documents)
    assert indices.shape == (300, 100)
    exact = (queries.astype(np.float64) @ documents.astype(np.float64).T).astype(np.float32)
    assert np.array_equal(scores, -np.sort(-exact, axis=1)[:, :100])
    assert np.array_equal(np.take_along_axis(exact, indices, axis=1), scores)


def test_zeros_of_both_signs_are_equal() -> None:
    indices, _ = search(np.array([[1.0]], dtype=np.float32), np.array([[-0.0], [0.0], [-0.0]], dtype=np.float32), 3)
    assert indices.tolist() == [[0, 1, 2]]


def test_small_scores_stay_distinct() -> None:
    documents = np.arange(1, 101, dtype=np.float32)[:, None] * np.float32(1e-9)
    indices, _ = search(np.ones((1, 1), dtype=np.float32), documents, 1)
    assert indices.tolist() == [[99]]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores at once would take 5 MB."""
    monkeypatch.setattr(search_module, "_MAX_BYTES", 2**20)
    rng = np.random.default_rng(6)
    documents = rng.normal(size=(20_000, 4)).astype(np.float32)
    tracemalloc.start()
    try:
        search(documents[:64], documents, 10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20


def test_many_queries_take_no_more_memory_than_a_few() -> None:
    """All scores at once would take half a gigabyte."""
    documents = np.arange(1_000_000, dtype=np.float32)[:, None]
    tracemalloc.start()
    try:
        search(documents[1:129], documents, 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 300 * 2**20


def test_impossible_arguments_are_refused() -> None:
    vectors = np.ones((2, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        search(vectors, vectors, 0)
    with pytest.raises(ValueError, match=r"excluded must be as long as the queries \(2\), got 1"):
        search(vectors, vectors, 1, [None])


def test_a_ranking_has_ids_and_no_empty_places() -> None:
    vectors = np.array([[1.0], [3.0], [2.0]], dtype=np.float32)
    ranking = make_ranking(["q1", "q2"], ["a", "b", "c"], *search(vectors[:2], vectors, 3, [None, 1]))
    assert ranking == {"q1": [("b", 3.0), ("c", 2.0), ("a", 1.0)], "q2": [("c", 6.0), ("a", 3.0)]}


@given(st.lists(st.sampled_from([0.0, -0.0, 1e-12, 0.25, 0.5, 0.50000000001, -1.0, 1e30]), max_size=150))
def test_scores_without_ties_fall_and_keep_the_order(scores: list[float]) -> None:
    ranking = [(str(place), score) for place, score in enumerate(sorted(scores, reverse=True))]
    lowered = without_ties(ranking)
    assert [document for document, _ in lowered] == [document for document, _ in ranking]
    single = [np.float32(score) for _, score in lowered]
    assert all(one > after for one, after in pairwise(single))
    assert all(new <= old for (_, new), (_, old) in zip(lowered, ranking, strict=True))


def test_equal_scores_about_zero_become_far_enough_apart_for_any_tool() -> None:
    """The next number below 0 is 1e-45, which some programs read as 0."""
    assert without_ties([("a", 0.0), ("b", 0.0)]) == [("a", 0.0), ("b", pytest.approx(-1e-9))]


def test_scores_that_are_not_equal_stay_as_they_are() -> None:
    ranking = [("a", 0.9), ("b", 0.1 + 0.2), ("c", -0.5)]
    assert without_ties(ranking) == ranking
