"""Intervals, p values and verdicts match results computed by hand, and never cause a warning or a NaN."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from gateway.compare.likelihood import TIE, Bounds, likelihood_interval, likelihood_p
from gateway.compare.results import PRIMARY_MEASURE, Contrast, Estimate, Verdict
from gateway.compare.statistics import (
    ALPHA,
    Design,
    contrast,
    estimate,
    holm,
    randomization_p,
    with_verdicts,
)


def compared(
    differences: Sequence[float],
    measure: str = PRIMARY_MEASURE,
    num_resamples: int = 999,
    seed: int = 0,
    groups: Sequence[int] | None = None,
    num_arms: int = 1,
) -> Contrast:
    baseline = {f"q{place}": 0.5 for place in range(len(differences))}
    arm = {query: 0.5 + difference for query, difference in zip(baseline, differences, strict=True)}
    named = {query: str(group) for query, group in zip(baseline, groups, strict=True)} if groups is not None else {}
    return contrast("new", "old", measure, arm, baseline, Design(num_resamples, seed, groups=named, num_arms=num_arms))


def verdict_of(differences: Sequence[float], margin: float = 0.01) -> Verdict | None:
    (found,) = with_verdicts([compared(differences)], margin)
    return found.verdict


def mean_of(values: Sequence[float], groups: Sequence[int] | None = None) -> Estimate:
    named = {f"q{place}": str(group) for place, group in enumerate(groups or ())}
    return estimate({f"q{place}": value for place, value in enumerate(values)}, named)


# ------------------------------------------------------------------------------------------------------- intervals


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=60)
def test_interval_is_within_the_possible_means(values: list[float]) -> None:
    found = mean_of(values)
    assert found.mean == pytest.approx(np.mean(values))
    if found.low is not None and found.high is not None:
        assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize("values", [[0.25], [0.25] * 9, [0.1 + 0.2, 0.3] * 4])
def test_equal_values_have_no_interval(values: list[float]) -> None:
    found = mean_of(values)
    assert (found.low, found.high) == (None, None)
    assert found.mean == pytest.approx(values[0])


def test_interval_is_that_of_the_t_distribution() -> None:
    values = np.random.default_rng(0).beta(2, 1, 20)
    found = mean_of(list(values))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 19, values.mean(), stats.sem(values)))


def test_interval_of_copies_is_that_of_the_originals() -> None:
    """Five copies of each query are no more evidence than one, if they are named a group."""
    values = [0.1, 0.9, 0.4, 0.7, 0.2, 0.3]
    once = mean_of(values)
    copies = mean_of([value for value in values for _ in range(5)], [place for place in range(6) for _ in range(5)])
    assert (copies.mean, copies.low, copies.high) == pytest.approx((once.mean, once.low, once.high))
    alone = mean_of([value for value in values for _ in range(5)])
    assert alone.low is not None
    assert once.low is not None
    assert alone.low > once.low + 0.1


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_likelihood_interval_ends_where_its_test_rejects(differences: list[float], random: Random) -> None:
    def interval_of(values: Sequence[float]) -> tuple[float, float]:
        return likelihood_interval(values, [1.0] * len(values), Bounds(), ALPHA)

    low, high = interval_of(differences)
    mean = float(np.mean(differences))
    assert -1 <= low <= mean + TIE
    assert mean - TIE <= high <= 1
    assert interval_of(random.sample(differences, len(differences))) == pytest.approx((low, high), abs=1e-5)
    assert interval_of([-value for value in differences]) == pytest.approx((-high, -low), abs=1e-5)
    for end, step in ((low, -0.01), (high, 0.01)):
        if np.std(differences) > 0.1 and abs(end) < 0.98:
            for other, is_rejected in ((end + step, True), (end - step * 1e-3, False)):
                p = likelihood_p(np.array(differences) - other, Bounds(-1 - other, 1 - other))
                assert p < ALPHA if is_rejected else p >= ALPHA - 1e-3


def test_the_likelihood_interval_of_groups_is_of_the_mean_of_queries() -> None:
    values, sizes = np.array([0.4, -0.2, 0.1, 0.3, 0.0, -0.1]), np.array([1.0, 3.0, 2.0, 1.0, 4.0, 2.0])
    low, high = likelihood_interval(values * sizes, sizes, Bounds(), ALPHA)
    assert low < float(np.average(values, weights=sizes)) < high
    assert likelihood_interval(values * sizes * 5, sizes * 5, Bounds(), ALPHA) == pytest.approx((low, high), abs=1e-5)


def test_an_interval_reaches_to_the_side_of_the_rare_losses() -> None:
    """Where a few large losses may be missing, the t interval alone would be too high in one of 16 comparisons."""
    found = compared([0.2] * 40 + [-0.8] * 6 + [0.0] * 154).difference
    middle, spread = found.mean, float(np.std([0.2] * 40 + [-0.8] * 6 + [0.0] * 154, ddof=1)) / math.sqrt(200)
    reach = float(stats.t.ppf(0.975, 199)) * spread
    assert found.low is not None
    assert found.high is not None
    assert found.low < middle - 1.1 * reach
    assert found.high == pytest.approx(middle + reach)


def test_no_value_has_no_mean() -> None:
    with pytest.raises(ValueError, match="there are no values"):
        estimate({}, {})


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
    assert randomization_p(differences, 999, 0) == (pytest.approx(p), 0)


@given(st.lists(st.sampled_from([-0.5, -0.25, 0.0, 0.25, 1.0]), min_size=1, max_size=30), st.randoms())
@settings(max_examples=50)
def test_p_does_not_depend_on_the_order_of_the_queries_or_of_the_arms(differences: list[float], rng: Random) -> None:
    p, error = randomization_p(differences, 199, 0)
    assert 0 < p <= 1
    assert (error == 0) == (p == 1 or 2 ** sum(map(bool, differences)) <= 199)
    shuffled = rng.sample(differences, len(differences))
    assert randomization_p(shuffled, 199, 0)[0] == randomization_p([-one for one in differences], 199, 0)[0] == p


def test_p_is_that_of_scipy() -> None:
    differences = np.random.default_rng(5).normal(0.03, 0.2, 90)
    p, error = randomization_p(differences, 100_000, 0)
    theirs = stats.permutation_test(
        (differences,), lambda sample, axis: np.abs(np.mean(sample, axis)), permutation_type="samples", n_resamples=9_999,
        vectorized=True, alternative="greater", rng=np.random.default_rng(1),
    )  # fmt: skip
    assert p == pytest.approx(theirs.pvalue, abs=5 * error * math.sqrt(10))


def test_the_error_of_p_is_that_of_other_seeds() -> None:
    differences = np.random.default_rng(5).normal(0.03, 0.2, 90)
    found = [randomization_p(differences, 2_000, seed) for seed in range(60)]
    assert np.std([p for p, _ in found]) == pytest.approx(found[0][1], rel=0.35)


@pytest.mark.parametrize(("wins", "losses"), [(30, 20), (9, 3), (1, 12)])
def test_without_a_pseudo_observation_the_likelihood_ratio_is_that_of_coins(wins: int, losses: int) -> None:
    number = wins + losses
    ratio = 2 * (wins * math.log(2 * wins / number) + losses * math.log(2 * losses / number))
    ties = [0.0] * 40
    impossible = Bounds(0.0, 0.0)
    assert likelihood_p([0.2] * wins + [-0.2] * losses + ties, impossible) == pytest.approx(stats.chi2.sf(ratio, 1))


@pytest.mark.parametrize("number", [60, 300])
@pytest.mark.parametrize("num_losses", [0, 1, 5])
def test_p_is_the_probability_of_so_few_losses(number: int, num_losses: int) -> None:
    """Small gains, and the total losses that offset them: where p is 5 %, the binomial distribution has 2.5 %."""

    def p_of(gain: float) -> float:
        return likelihood_p([gain] * (number - num_losses) + [-1.0] * num_losses, Bounds())

    gain = optimize.brentq(lambda gain: p_of(gain) - ALPHA, 1e-4, 0.5)
    share = gain / (1 + gain)  # of losses, so that the mean is 0
    assert stats.binom.cdf(num_losses, number, share) == pytest.approx(ALPHA / 2, rel=0.06)


def test_without_possible_losses_any_gain_shows() -> None:
    assert likelihood_p([0.0, 0.1, 0.2], Bounds(0.0, 1.0)) == 0
    assert likelihood_p([0.0, 0.1, 0.2], Bounds(-1.0, 0.0)) == 1
    assert likelihood_p([0.0, 0.0], Bounds()) == 1


@pytest.mark.parametrize("num_losses", [0, 2])
def test_rare_losses_that_are_missing_from_the_sample_make_no_arm_better(num_losses: int) -> None:
    """Many gains of 0.04; of the losses that would cancel them, few or none were seen."""
    differences = [0.04] * (30 + 30 * num_losses) + [-0.5] * num_losses + [0.0] * (30 + 120 * num_losses)
    found = compared(differences, num_resamples=20_000)
    assert randomization_p(differences, 20_000, 0)[0] < ALPHA
    assert found.p == pytest.approx(likelihood_p(differences, Bounds(-0.5, 0.5)))
    assert {one.verdict for one in with_verdicts([found] * 3, 0.0)} == {Verdict.INCONCLUSIVE}


def test_where_only_unseen_losses_prevent_a_verdict_their_share_is_given() -> None:
    gains = [0.04] * 30 + [0.0] * 30
    (found,) = with_verdicts([compared(gains, num_resamples=20_000)], 0.0)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.unseen is not None
    assert (1 - found.unseen) ** 60 == pytest.approx(ALPHA / 2)
    (alike,) = with_verdicts([compared([0.001, 0.002] * 25)], 0.01)
    assert (alike.verdict, alike.unseen is None) == (Verdict.INCONCLUSIVE, False), "they would be as good"
    (unclear,) = with_verdicts([compared([0.1, -0.11] * 200)], 0.01)
    assert (unclear.verdict, unclear.unseen) == (Verdict.INCONCLUSIVE, None)
    (clear,) = with_verdicts([compared(gains * 10)], 0.0)
    assert (clear.verdict, clear.unseen) == (Verdict.BETTER, None)


@pytest.mark.parametrize(("num_differ", "num_tied", "has_interval"), [(14, 15, False), (14, 14, True), (15, 90, True)])
def test_few_differences_among_many_ties_have_no_interval(num_differ: int, num_tied: int, has_interval: bool) -> None:
    found = compared([0.1 + place / 100 for place in range(num_differ)] + [0.0] * num_tied)
    assert (found.difference.low is not None) == has_interval


def test_p_is_even_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(2)
    ps = [randomization_p(rng.normal(size=40), 199, number)[0] for number in range(200)]
    assert 0.01 <= np.mean(np.array(ps) < 0.05) <= 0.1
    assert 0.4 <= np.mean(ps) <= 0.6


def test_p_of_a_clear_difference_is_as_small_as_the_resamples_allow() -> None:
    assert randomization_p(np.full(60, 0.1), 999, 0)[0] == pytest.approx(1 / 1000)


def test_the_same_seed_gives_the_same_figures() -> None:
    differences = np.random.default_rng(1).normal(0.02, 0.2, 80).tolist()
    assert compared(differences, seed=5) == compared(differences, seed=5)
    assert compared(differences, seed=5) != compared(differences, seed=6)


def test_memory_does_not_grow_with_the_queries() -> None:
    """All signs at once would take 500 MB."""
    values = np.random.default_rng(1).normal(0.02, 0.2, 5_000)
    tracemalloc.start()
    try:
        randomization_p(values, 99_999, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * 2**20


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
    assert (found.num_independent, found.num_untied) == (8, 5)
    assert found.difference.mean == pytest.approx(0)
    assert (found.p_holm, found.verdict) == (found.p, None)


def test_values_that_differ_by_the_least_that_counts_are_a_tie() -> None:
    values = {"above": TIE, "below": -TIE, "equal": 0.0}
    found = contrast("new", "old", "R@10", values, dict.fromkeys(values, 0.0), Design(99))
    assert (found.wins, found.ties, found.losses) == (0, 3, 0)
    assert mean_of([0.0, TIE]).low is None
    assert randomization_p([TIE] * 8, 999, 0) == (1, 0)


def test_queries_are_paired_by_their_ids() -> None:
    one = contrast("new", "old", "R@10", {"a": 0.75, "b": 0.25}, {"b": 0.0, "a": 0.5}, Design(99))
    assert one.difference == Estimate(0.25, None, None)
    with pytest.raises(ValueError, match="new and old have values of different queries"):
        contrast("new", "old", "R@10", {"a": 0.75}, {"b": 0.0}, Design(99))


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.2] * 30, Verdict.BETTER),
        ([-0.1, -0.2] * 30, Verdict.WORSE),
        ([-0.1, 0.1] * 30, Verdict.INCONCLUSIVE),
        ([0.1, 0.2] * 24 + [0.1], Verdict.TOO_FEW_QUERIES),
        ([0.1, 0.2] * 25, Verdict.BETTER),
        # Only queries that differ are evidence.
        ([0.1, 0.2] * 7 + [0.0] * 60, Verdict.TOO_FEW_DIFFER),
        ([0.1, 0.2] * 7 + [0.1] + [0.0] * 35, Verdict.BETTER),
        ([0.0] * 60, Verdict.TOO_FEW_DIFFER),
        # Queries of which none differs by more than 1 differ on average by less than the share that may differ.
        ([0.0] * 368, Verdict.AS_GOOD),
        ([0.0] * 367, Verdict.TOO_FEW_DIFFER),
        ([1.0] + [0.0] * 399, Verdict.TOO_FEW_DIFFER),
        ([1.0] + [0.0] * 599, Verdict.AS_GOOD),
        # A significant difference that is too small to matter.
        ([0.001, 0.002] * 200, Verdict.AS_GOOD),
        ([-0.001, -0.002] * 200, Verdict.AS_GOOD),
        # Fifty queries cannot rule out a loss of 0.01 on average.
        ([0.001, 0.002] * 25, Verdict.INCONCLUSIVE),
        ([0.06, -0.04] * 200, Verdict.BETTER),
        ([0.06, -0.055] * 300, Verdict.AS_GOOD),
        ([0.11, -0.1] * 200, Verdict.NOT_WORSE),
        ([0.1, -0.11] * 200, Verdict.INCONCLUSIVE),
    ],
)
def test_verdict(differences: list[float], verdict: Verdict) -> None:
    assert verdict_of(differences) == verdict


def test_without_a_margin_every_difference_matters() -> None:
    assert verdict_of([0.001, 0.002] * 800, margin=0) == Verdict.BETTER
    assert verdict_of([0.11, -0.1] * 200, margin=0) == Verdict.INCONCLUSIVE
    assert verdict_of([0.0] * 9_999, margin=0) == Verdict.TOO_FEW_DIFFER


def test_differences_that_are_all_the_same_are_compared_with_the_margin() -> None:
    """They have no interval, as they do not vary, so the test decides: a model that fails in every query is worse."""
    assert verdict_of([0.005] * 400) is Verdict.AS_GOOD
    assert verdict_of([-0.02] * 60) is Verdict.INCONCLUSIVE
    assert verdict_of([-0.02] * 400) is Verdict.WORSE
    assert verdict_of([-0.5] * 60) is Verdict.WORSE
    assert verdict_of([0.5] * 60) is Verdict.BETTER
    assert verdict_of([0.5] * 49) is Verdict.TOO_FEW_QUERIES


def test_queries_of_few_groups_are_too_few() -> None:
    """Sixty queries about five documents are five observations."""
    differences = [0.1 + place / 1000 for place in range(60)]
    (found,) = with_verdicts([compared(differences, groups=[place // 12 for place in range(60)])], 0.01)
    assert (found.num_independent, found.num_untied, found.verdict) == (5, 5, Verdict.TOO_FEW_DIFFER)
    (ungrouped,) = with_verdicts([compared(differences)], 0.01)
    assert ungrouped.verdict == Verdict.BETTER


def test_that_few_groups_differ_does_not_bound_the_difference() -> None:
    groups = [0] * 400 + list(range(1, 401))
    (found,) = with_verdicts([compared([0.5] * 400 + [0.0] * 400, groups=groups)], 0.02)
    assert found.verdict == Verdict.TOO_FEW_DIFFER


def test_verdict_needs_p_after_holm_and_the_interval() -> None:
    clear = compared([0.1, 0.2] * 30)
    near = replace(clear, p=0.03)
    assert [one.verdict for one in with_verdicts([near], 0.0)] == [Verdict.BETTER]
    assert [one.verdict for one in with_verdicts([near, near], 0.0)] == [Verdict.INCONCLUSIVE] * 2
    for difference in (Estimate(0.1, -0.01, 0.2), Estimate(0.1, 0.0, 0.2), Estimate(-0.1, -0.2, 0.0)):
        (found,) = with_verdicts([replace(clear, difference=difference)], 0.0)
        assert found.verdict == Verdict.INCONCLUSIVE
    for unclear in (replace(clear, p=ALPHA), replace(compared([-0.1, -0.2] * 30), p=ALPHA)):
        assert [one.verdict for one in with_verdicts([unclear], 0.0)] == [Verdict.INCONCLUSIVE]


def test_more_arms_need_more_to_be_as_good() -> None:
    differences = [0.085, -0.085] * 225
    assert [one.verdict for one in with_verdicts([compared(differences)], 0.01)] == [Verdict.AS_GOOD]
    six = [compared(differences, num_arms=6)] * 6
    assert {one.verdict for one in with_verdicts(six, 0.01)} == {Verdict.INCONCLUSIVE}
    high = six[0].simultaneous.high
    assert high is not None
    assert high == pytest.approx(stats.t.isf(ALPHA / 12, 449) * six[0].standard_error, rel=0.15)


def test_it_gives_the_difference_that_would_have_been_found() -> None:
    values = np.random.default_rng(0).normal(0, 0.24, 400)
    (found,) = with_verdicts([compared((values - values.mean()).tolist())], 0.0)
    assert found.detectable == pytest.approx(2.8 * 0.24 / 20, rel=0.1)
    assert found.queries_needed == pytest.approx((2.8 * 0.24 / 0.02) ** 2, rel=0.2)
    (wide,) = with_verdicts([compared((values - values.mean()).tolist())], 0.05)
    assert wide.queries_needed == pytest.approx((2.8 * 0.24 / 0.05) ** 2, rel=0.2)
    (tied,) = with_verdicts([compared([0.0] * 60)], 0.01)
    assert (tied.detectable, tied.queries_needed) == (None, None)


def test_of_several_arms_that_difference_is_found_as_often() -> None:
    """One of five arms differs: its p counts five times after Holm, as those of the equal arms are larger."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.24, 400)
    others = [compared((values - values.mean()).tolist())] * 4
    (alone,) = with_verdicts([others[0]], 0.0)
    detectable = with_verdicts([*others, others[0]], 0.0)[0].detectable
    assert alone.detectable is not None
    assert detectable is not None
    assert detectable > 1.2 * alone.detectable

    def is_found(difference: float) -> bool:
        new = rng.normal(difference, 0.24, 400).tolist()
        return with_verdicts([*others, compared(new)], 0.0)[-1].verdict is Verdict.BETTER

    assert sum(is_found(detectable) for _ in range(100)) / 100 == pytest.approx(0.8, abs=0.12)


def test_verdict_is_of_the_primary_measure_alone() -> None:
    assert [one.verdict for one in with_verdicts([compared([0.1, 0.2] * 30, "R@10")], 0.01)] == [None]
    with pytest.raises(ValueError, match="of one measure"):
        with_verdicts([compared([0.1], "R@10"), compared([0.1], "R@100")], 0.01)
    assert with_verdicts([], 0.01) == []
