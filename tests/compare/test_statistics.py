"""Intervals, p values and verdicts are right where they can be computed by hand, and never a warning or a NaN."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.compare.results import PRIMARY_MEASURE, Contrast, Estimate, Verdict
from gateway.compare.statistics import ALPHA, MIN_QUERIES, TIE, contrast, estimate, holm, randomization_p, with_holm


def compared(
    differences: Sequence[float], measure: str = PRIMARY_MEASURE, num_resamples: int = 999, seed: int = 0
) -> Contrast:
    baseline = {str(place): 0.5 for place in range(len(differences))}
    arm = {query: 0.5 + difference for query, difference in zip(baseline, differences, strict=True)}
    return contrast("new", "old", measure, arm, baseline, num_resamples, seed)


# ------------------------------------------------------------------------------------------------------- intervals


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
@settings(max_examples=60)
def test_interval_is_finite_and_within_the_values(values: list[float]) -> None:
    found = estimate(values, 99, 1)
    assert found.mean == pytest.approx(np.mean(values))
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12


@pytest.mark.parametrize("values", [[0.25], [0.25] * 9, [0.1 + 0.2, 0.3] * 4])
def test_equal_values_have_an_interval_of_no_width(values: list[float]) -> None:
    found = estimate(values, 999, 0)
    assert found.low == found.mean == found.high == pytest.approx(values[0])


def test_interval_of_many_values_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(0.4, 0.2, 500)
    found = estimate(values, 4999, 0)
    margin = 1.96 * values.std(ddof=1) / math.sqrt(500)
    assert found.low == pytest.approx(values.mean() - margin, abs=0.002)
    assert found.high == pytest.approx(values.mean() + margin, abs=0.002)


def test_interval_leans_to_where_the_values_are_far_out() -> None:
    found = estimate([0.0] * 57 + [1.0] * 3, 4999, 0)
    assert found.high - found.mean > found.mean - found.low


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    dice = np.random.default_rng(4)
    covered = 0
    for number in range(150):
        found = estimate(dice.beta(2, 1, 60), 399, number)
        covered += found.low <= 2 / 3 <= found.high
    assert 0.88 <= covered / 150 <= 0.99


def test_no_value_has_no_mean() -> None:
    with pytest.raises(ValueError, match="there are no values"):
        estimate([], 99, 0)


# --------------------------------------------------------------------------------------------------------- p values


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 1.0, 1.0], 2 / 8),
        ([1.0, 2.0, 3.0, 4.0, -5.0], 20 / 32),  # ten of the 32 subsets of 1 to 5 sum to 5 or less
        ([-0.1] * 8, 2 / 256),
        ([0.3], 1.0),
        ([0.0, 0.0], 1.0),
        ([], 1.0),
    ],
)
def test_p_of_few_queries_is_exact(differences: list[float], p: float) -> None:
    assert randomization_p(differences, 999, 0) == pytest.approx(p)


@given(st.lists(st.sampled_from([-0.5, -0.25, 0.0, 0.25, 1.0]), min_size=1, max_size=30))
@settings(max_examples=50)
def test_p_is_the_same_with_the_arms_exchanged(differences: list[float]) -> None:
    p = randomization_p(differences, 199, 0)
    assert 0 < p <= 1
    # One p is drawn by chance where there are too many signs to go through.
    margin = 1e-12 if 2 ** len(differences) <= 199 else 0.3
    assert randomization_p([-one for one in differences], 199, 0) == pytest.approx(p, abs=margin)


def test_p_is_even_where_there_is_no_difference() -> None:
    dice = np.random.default_rng(2)
    ps = [randomization_p(dice.normal(size=40), 199, number) for number in range(200)]
    assert 0.01 <= np.mean(np.array(ps) < 0.05) <= 0.1
    assert 0.4 <= np.mean(ps) <= 0.6


def test_p_of_a_clear_difference_is_as_small_as_the_resamples_allow() -> None:
    assert randomization_p(np.full(60, 0.1), 999, 0) == pytest.approx(2 / 1000)


def test_the_same_seed_gives_the_same_figures() -> None:
    differences = np.random.default_rng(1).normal(0.02, 0.2, 80).tolist()
    assert compared(differences, seed=5) == compared(differences, seed=5)
    assert compared(differences, seed=5) != compared(differences, seed=6)


def test_batches_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(1).normal(0.02, 0.2, 80).tolist()
    whole = compared(differences)
    monkeypatch.setattr("gateway.compare.statistics._MAX_BATCH_BYTES", 80 * 16 * 7)
    assert compared(differences) == whole


def test_memory_does_not_grow_with_the_resamples() -> None:
    """All at once, their indices and values would take 320 MB, and as much for the signs."""
    values = np.random.default_rng(1).normal(0.02, 0.2, 5_000)
    for compute in (estimate, randomization_p):
        tracemalloc.start()
        try:
            compute(values, 3_999, 0)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 200 * 2**20


# ------------------------------------------------------------------------------------------------------------- Holm


@pytest.mark.parametrize(
    ("ps", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.6, 0.9], [1.0, 1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.03], [0.03]),
        ([], []),
    ],
)
def test_holm(ps: list[float], corrected: list[float]) -> None:
    assert holm(ps) == pytest.approx(corrected)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_begins_as_bonferroni(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= own <= 1 for p, own in zip(ps, corrected, strict=True))
    assert min(corrected, default=0) == min(1, len(ps) * min(ps, default=0))
    order = np.argsort(ps, kind="stable")
    assert all(np.diff(np.array(corrected)[order]) >= 0)


# -------------------------------------------------------------------------------------------------------- contrasts


def test_wins_ties_and_losses() -> None:
    found = compared([0.1, 0.2, 1e-10, -1e-10, 0.0, -0.3, 1e-8, -1e-8])
    assert (found.wins, found.ties, found.losses) == (3, 3, 2)
    assert found.difference.mean == pytest.approx(0)
    assert (found.p_holm, found.verdict) == (found.p, None)


def test_values_that_differ_by_the_least_that_counts_are_a_tie() -> None:
    values = {"above": TIE, "below": -TIE, "equal": 0.0}
    found = contrast("new", "old", "R@10", values, dict.fromkeys(values, 0.0), 99, 0)
    assert (found.wins, found.ties, found.losses) == (0, 3, 0)
    assert estimate([0.0, TIE], 99, 0) == Estimate(TIE / 2, TIE / 2, TIE / 2)
    assert randomization_p([TIE] * 8, 999, 0) == 1


def test_queries_are_paired_by_their_ids() -> None:
    one = contrast("new", "old", "R@10", {"a": 0.75, "b": 0.25}, {"b": 0.0, "a": 0.5}, 99, 0)
    assert one.difference == Estimate(0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="new and old have values of different queries"):
        contrast("new", "old", "R@10", {"a": 0.75}, {"b": 0.0}, 99, 0)


def test_the_same_rankings_differ_in_nothing() -> None:
    (found,) = with_holm([compared([0.0] * 60)])
    assert found.difference == Estimate(0, 0, 0)
    assert (found.p, found.p_holm, found.ties, found.verdict) == (1, 1, 60, Verdict.INCONCLUSIVE)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.2] * 30, Verdict.BETTER),
        ([-0.1, -0.2] * 30, Verdict.WORSE),
        ([-0.1, 0.1] * 30, Verdict.INCONCLUSIVE),
        ([0.1] * (MIN_QUERIES - 1), Verdict.TOO_FEW_QUERIES),
        ([0.1] * MIN_QUERIES, Verdict.BETTER),
    ],
)
def test_verdict(differences: list[float], verdict: Verdict) -> None:
    assert [one.verdict for one in with_holm([compared(differences)])] == [verdict]


def test_verdict_needs_p_after_holm_and_the_interval() -> None:
    clear = compared([0.1, 0.2] * 30)
    near = replace(clear, p=0.03)
    assert [one.verdict for one in with_holm([near])] == [Verdict.BETTER]
    assert [one.verdict for one in with_holm([near, near])] == [Verdict.INCONCLUSIVE] * 2
    for difference in (Estimate(0.1, -0.01, 0.2), Estimate(0.1, 0.0, 0.2), Estimate(-0.1, -0.2, 0.0)):
        assert [one.verdict for one in with_holm([replace(clear, difference=difference)])] == [Verdict.INCONCLUSIVE]
    for unclear in (replace(clear, p=ALPHA), replace(compared([-0.1, -0.2] * 30), p=ALPHA)):
        assert [one.verdict for one in with_holm([unclear])] == [Verdict.INCONCLUSIVE]


def test_verdict_is_of_the_primary_measure_alone() -> None:
    assert [one.verdict for one in with_holm([compared([0.1, 0.2] * 30, "R@10")])] == [None]
    with pytest.raises(ValueError, match="of one measure"):
        with_holm([compared([0.1], "R@10"), compared([0.1], "R@100")])
    assert with_holm([]) == []
