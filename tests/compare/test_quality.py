"""Measures follow their definitions, cover every judged query, and use one order of the documents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ir_measures
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.compare.quality import measure
from gateway.compare.results import MEASURES


def ranked(*documents: str) -> list[tuple[str, float]]:
    return [(document, 1 - place / 1000) for place, document in enumerate(documents)]


def by_definition(documents: Sequence[str], judged: dict[str, int]) -> dict[str, float]:
    def dcg(gains: Sequence[int]) -> float:
        return sum(max(gain, 0) / math.log2(place + 2) for place, gain in enumerate(gains[:10]))

    gains = [judged.get(document, 0) for document in documents]
    num_relevant = sum(score > 0 for score in judged.values())
    first = next((place for place, gain in enumerate(gains) if gain > 0), 10)
    best = dcg(sorted(judged.values(), reverse=True))
    top = documents[:10]
    return {
        "nDCG@10": dcg(gains) / best if best else 0,
        "R@10": sum(gain > 0 for gain in gains[:10]) / num_relevant if num_relevant else 0,
        "R@100": sum(gain > 0 for gain in gains[:100]) / num_relevant if num_relevant else 0,
        "RR@10": 1 / (first + 1) if first < 10 else 0,
        "Success@1": float(first == 0),
        "Judged@10": sum(document in judged for document in top) / len(top) if top else 0,
    }


def test_hand_computed() -> None:
    found = measure({"q": ranked("a", "b", "c", "d")}, {"q": {"b": 1, "d": 2, "z": 1, "a": 0}})
    best = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["nDCG@10"]["q"] == pytest.approx((1 / math.log2(3) + 2 / math.log2(5)) / best)
    assert found["R@10"]["q"] == found["R@100"]["q"] == pytest.approx(2 / 3)
    assert (found["RR@10"]["q"], found["Success@1"]["q"], found["Judged@10"]["q"]) == (0.5, 0, 0.75)


@given(
    st.lists(st.sampled_from([f"d{number}" for number in range(130)]), unique=True, max_size=130),
    st.dictionaries(st.sampled_from([f"d{number}" for number in range(130)]), st.integers(-1, 3), min_size=1),
    st.integers(1, 130),
)
def test_every_measure_follows_its_definition_with_any_equal_scores(
    documents: list[str], judged: dict[str, int], num_scores: int
) -> None:
    ranking = [(document, -float(min(place, num_scores))) for place, document in enumerate(documents)]
    found = measure({"q": ranking}, {"q": judged})
    assert list(found) == list(MEASURES)
    for name, value in by_definition(documents, judged).items():
        assert found[name]["q"] == pytest.approx(value), name


def test_ties_are_why_the_order_is_given() -> None:
    """The rules of ir-measures: of equal scores, nDCG takes the greater id first, and RR@10 the smaller one."""
    run = {"q": {"a": 0.5, "b": 0.5}}
    values = {
        str(one.measure): one.value
        for one in ir_measures.iter_calc([ir_measures.Success @ 1, ir_measures.RR @ 10], {"q": {"b": 1}}, run)
    }
    assert values == {"Success@1": 1.0, "RR@10": 0.5}
    found = measure({"q": [("b", 0.5), ("a", 0.5)]}, {"q": {"b": 1}})
    assert (found["Success@1"]["q"], found["RR@10"]["q"]) == (1.0, 1.0)


def test_every_judged_query_has_a_value_of_each_measure() -> None:
    judgments = {"q3": {"a": 1}, "none found": {"a": 1}, "no ranking": {"a": 1}, "nothing relevant": {"a": 0}}
    rankings = {
        "q3": ranked("a"),
        "none found": [],
        "nothing relevant": ranked("a", "b"),
        "without a judgment": ranked("a"),
    }
    found = measure(rankings, {**judgments, "empty": {}})
    assert all(list(values) == list(judgments) for values in found.values())
    assert [found[name]["q3"] for name in MEASURES] == [1] * len(MEASURES)
    for query in ("none found", "no ranking"):
        assert [found[name][query] for name in MEASURES] == [0] * len(MEASURES)
    assert [found[name]["nothing relevant"] for name in MEASURES] == [0, 0, 0, 0, 0, 0.5]


def test_without_judgments_there_is_no_measure() -> None:
    assert measure({"q": ranked("a")}, {}) == {}
