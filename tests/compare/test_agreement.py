"""Agreement follows its definition, at the ends of the scale and in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.compare.agreement import overlap, rank_biased_overlap, same_first

rankings = st.lists(st.sampled_from([f"d{number}" for number in range(20)]), unique=True, max_size=20)


def by_equation_32(one: list[str], other: list[str], p: float) -> float:
    """Compute RBO_EXT exactly as published."""
    shorter, longer = sorted((one, other), key=len)
    s, l = len(shorter), len(longer)  # noqa: E741  (the paper's names)

    def x(depth: int) -> int:
        return len({*shorter[:depth]} & {*longer[:depth]})

    seen = sum(x(d) / d * p**d for d in range(1, l + 1))
    beyond_shorter = sum(x(s) * (d - s) / (s * d) * p**d for d in range(s + 1, l + 1))
    return (1 - p) / p * (seen + beyond_shorter) + ((x(l) - x(s)) / l + x(s) / s) * p**l


def test_overlap_is_of_the_first_ten() -> None:
    one = [f"d{place}" for place in range(20)]
    assert overlap(one, [*one[:9], "x", one[10]]) == 0.9
    assert overlap(one, [*one[:10], "x"]) == 1.0


@pytest.mark.parametrize(
    ("one", "other", "p", "value"),
    [
        ("abc", "abc", 0.9, 1.0),
        ("abc", "xyz", 0.9, 0.0),
        ("abc", "acb", 0.9, 0.955),  # 0.1 · (1 + 0.9 · 1/2 + 0.81 · 1) + 0.729 · 1
        ("abc", "acb", 0.5, 0.875),  # 0.5 · (1 + 0.5 · 1/2 + 0.25 · 1) + 0.125 · 1
        ("a", "ab", 0.9, 1.0),
        ("a", "ba", 0.9, 0.45),  # 0.1/0.9 · 0.81/2 + 0.81/2
        ("", "", 0.9, 1.0),
        ("", "a", 0.9, 0.0),
    ],
)
def test_rank_biased_overlap(one: str, other: str, p: float, value: float) -> None:
    assert rank_biased_overlap(one, other, p) == pytest.approx(value)
    assert rank_biased_overlap(other, one, p) == pytest.approx(value)


@given(rankings.filter(bool), rankings.filter(bool), st.floats(0.05, 0.99))
def test_rank_biased_overlap_is_equation_32(one: list[str], other: list[str], p: float) -> None:
    value = rank_biased_overlap(one, other, p)
    assert value == pytest.approx(by_equation_32(one, other, p))
    assert 0 <= value <= 1


@given(rankings)
def test_a_ranking_agrees_with_itself(one: list[str]) -> None:
    assert overlap(one, one) == same_first(one, one) == 1
    assert rank_biased_overlap(one, one) == pytest.approx(1)


def test_the_first_ranks_weigh_more() -> None:
    ten = list("abcdefghij")
    last, first = [*ten[:8], "j", "i"], ["b", "a", *ten[2:]]
    assert rank_biased_overlap(ten, first) < rank_biased_overlap(ten, last) < 1


@pytest.mark.parametrize(
    ("one", "other", "depth", "value"),
    [
        ("abcd", "dcxy", 4, 0.5),
        ("abcd", "dcxy", 2, 0.0),
        ("abcde", "abc", 10, 0.6),
        ("abc", "cab", 10, 1.0),
        ("", "ab", 10, 0.0),
        ("", "", 10, 1.0),
    ],
)
def test_overlap(one: str, other: str, depth: int, value: float) -> None:
    assert overlap(one, other, depth) == overlap(other, one, depth) == pytest.approx(value)


def test_same_first() -> None:
    assert [same_first(["a", "b"], ("a",)), same_first(["a"], ["b"]), same_first([], ["b"]), same_first([], ())] == [
        1, 0, 0, 1,
    ]  # fmt: skip
