"""Kappa and the corrected difference: equal to results computed by hand, and correct as often as they claim."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from bench.judging import ErrorRates, Judge, simulate
from gateway.compare.judge.inference import corrected_difference, kappa, mean_of, self_agreement


def by_query(values: Sequence[float]) -> dict[str, float]:
    return {f"q{i}": value for i, value in enumerate(values)}


def test_kappa_by_hand() -> None:
    """Six documents, two of them a grade apart; the weights are the squares of the distances.

    Observed: (1 + 1) / 6. Expected by the margins, of people 2, 1, 1, 2 and of the judge 1, 3, 0, 2: the sum of people *
    judge * distance**2 is 2 * (1*3 + 9*2) + (1*1 + 4*2) + (4*1 + 1*3 + 1*2) + 2 * (9*1 + 4*3) = 102, over 36.
    """
    people = {"q1": {"a": 0, "b": 0, "c": 1}, "q2": {"d": 2, "e": 3, "f": 3}}
    judge = {"q1": {"a": 0, "b": 1, "c": 1}, "q2": {"d": 1, "e": 3, "f": 3}}
    found = kappa(people, judge, 200, 0)
    assert found.mean == pytest.approx(1 - (2 / 6) / (102 / 36))
    assert found.low <= found.mean <= found.high <= 1


def test_kappa_of_equal_grades_is_1_and_of_opposite_ones_negative() -> None:
    people = {f"q{i}": {"a": 0, "b": 1, "c": 3} for i in range(10)}
    opposite = {query: {document: 3 - grade for document, grade in scores.items()} for query, scores in people.items()}
    assert kappa(people, people, 100, 0).low == 1
    assert kappa(people, opposite, 100, 0).high < 0


def test_kappa_of_constant_grades_is_0() -> None:
    """Equal grades that never differ show nothing."""
    people = {"q1": {"a": 0, "b": 0}}
    found = kappa(people, people, 100, 0)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_kappa_takes_only_pairs_with_both_grades() -> None:
    people = {"q1": {"a": 0, "b": 3}, "q2": {"c": 1}}
    assert kappa(people, {"q1": {"a": 0, "b": 3, "x": 1}}, 100, 0).mean == 1
    with pytest.raises(ValueError, match="no document has a grade of people and of the judge"):
        kappa(people, {}, 100, 0)


def test_a_corrected_difference_by_hand() -> None:
    """Four checked queries, four others; the terms one by one."""
    people = by_query([0.2, 0.0, 0.4, -0.1])
    judged = by_query([0.3, 0.1, 0.4, 0.1, 0.2, 0.5, 0.0, 0.3])
    ours, rest = np.array([0.3, 0.1, 0.4, 0.1]), np.array([0.2, 0.5, 0.0, 0.3])
    theirs = np.array([0.2, 0.0, 0.4, -0.1])
    weight = np.cov(theirs, ours)[0, 1] / np.var(ours, ddof=1) / (1 + 4 / 4)
    error = np.sum((theirs - weight * ours - np.mean(theirs - weight * ours)) ** 2) / (4 - 2)
    gap = ours.mean() - rest.mean()
    variance = error / 4 + weight**2 * np.var(rest, ddof=1) / 4 + gap**2 * error * 0.25 / (3 * np.var(ours, ddof=1))

    found = corrected_difference(people, judged)

    assert 0 < weight < 1
    assert found.weight == pytest.approx(weight)
    assert found.figure.mean == pytest.approx(theirs.mean() - weight * gap)
    half = stats.t.ppf(0.975, 2) * np.sqrt(variance)
    assert found.figure.high == pytest.approx(min(1, found.figure.mean + half))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.figure.mean) / np.sqrt(variance), 2))


@pytest.mark.parametrize(
    "judged",
    [[0.1] * 8, [0.5, -0.2, -0.4, 0.3, 0, 0, 0, 0], [0.2, 0.0, 0.4, -0.1]],
    ids=["says nothing", "says the opposite", "all queries are checked"],
)
def test_a_judge_that_says_nothing_does_not_count(judged: list[float]) -> None:
    people = [0.2, 0.0, 0.4, -0.1]
    found = corrected_difference(by_query(people), by_query(judged))
    assert found.weight == 0
    assert found.figure.mean == pytest.approx(np.mean(people))


def test_too_few_or_unknown_queries() -> None:
    with pytest.raises(ValueError, match="at least 3 queries must be checked, and 2 are"):
        corrected_difference(by_query([0.1, 0.2]), by_query([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="'q2' was checked, and has no difference"):
        corrected_difference(by_query([0.1, 0.2, 0.3]), by_query([0.1, 0.2]))


def test_a_mean_is_that_of_the_t_test() -> None:
    values = [0.1, 0.4, -0.2, 0.3, 0.0]
    found = mean_of(values)
    reference = stats.ttest_1samp(values, 0)
    interval = reference.confidence_interval(0.95)
    assert (found.figure.low, found.figure.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(reference.pvalue)
    assert mean_of([0.5]).p == 1


def test_self_agreement_is_over_all_pairs_of_gradings() -> None:
    assert self_agreement([[1, 1, 1], [1, 1, 2]]) == pytest.approx(4 / 6)
    assert self_agreement([]) == 1


# ------------------------------------------------------------------------------------------------------- simulated


@pytest.fixture(scope="module")
def rates() -> dict[str, ErrorRates]:
    """Return the rates of a judge who favors an arm in a tenth of the queries, and of one that is only noisy."""
    judges = {"biased": Judge(noise=0.2, bias_share=0.1), "noisy": Judge(noise=0.5)}
    return {
        name: simulate(judge, num_queries=300, num_checked=60, num_runs=1500, seed=5) for name, judge in judges.items()
    }


def test_a_judge_alone_gives_false_verdicts(rates: dict[str, ErrorRates]) -> None:
    assert rates["biased"].false_by_judge > 0.5
    assert rates["biased"].covered_by_judge < 0.5


@pytest.mark.parametrize("name", ["biased", "noisy"])
def test_corrected_by_people_the_interval_covers_the_truth(rates: dict[str, ErrorRates], name: str) -> None:
    """1,500 runs: the standard error of a rate of 5 % is 0.56 points."""
    assert rates[name].covered > 0.935
    assert rates[name].false_verdicts < 0.065


def test_the_judge_makes_the_interval_narrower(rates: dict[str, ErrorRates]) -> None:
    assert rates["biased"].width < 0.9 * rates["biased"].width_by_people
    assert rates["noisy"].width < rates["noisy"].width_by_people
