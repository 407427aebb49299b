"""The test of the split: against the formula by hand, and on splits that are wrong on purpose."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.experiments.sample_ratio import check_sample_ratio
from gateway.experiments.units import MAX_UNITS


def test_two_arms_are_tested_as_by_hand() -> None:
    ratio = check_sample_ratio([4_900, 5_100], [0.5, 0.5])

    assert ratio.chi2 == pytest.approx(100**2 / 5_000 * 2)
    assert ratio.degrees == 1
    # With one degree of freedom the statistic is the square of a normal variable.
    assert ratio.p == pytest.approx(math.erfc(math.sqrt(4.0 / 2)))
    assert not ratio.mismatch
    assert ratio.verdict == "no mismatch found, p = 0.046"


def test_three_arms_are_tested_as_by_hand() -> None:
    ratio = check_sample_ratio([820, 95, 85], [0.8, 0.1, 0.1])

    assert ratio.chi2 == pytest.approx(20**2 / 800 + 5**2 / 100 + 15**2 / 100)
    assert ratio.degrees == 2
    assert ratio.p == pytest.approx(math.exp(-3.0 / 2))  # what the distribution is with two degrees of freedom


def test_an_arm_that_loses_a_twentieth_of_its_units_is_found() -> None:
    rng = random.Random(3)
    units = [0, 0]
    for _ in range(50_000):
        arm = rng.random() < 0.5
        units[arm] += not (arm and rng.random() < 0.05)

    ratio = check_sample_ratio(units, [0.5, 0.5])

    assert ratio.mismatch
    assert ratio.p is not None
    assert ratio.p < 1e-6
    assert ratio.chi2 is not None
    assert (ratio.degrees, ratio.chi2 > 20) == (1, True)
    assert ratio.verdict.startswith("sample ratio mismatch (p = ")
    assert "do not trust a comparison of the arms" in ratio.verdict


def test_correct_splits_are_hardly_ever_called_a_mismatch() -> None:
    rng = random.Random(4)
    splits = [sum(rng.random() < 0.3 for _ in range(1_000)) for _ in range(200)]

    assert not any(check_sample_ratio([num, 1_000 - num], [0.3, 0.7]).mismatch for num in splits)


@pytest.mark.parametrize(
    ("units", "shares"),
    [([0, 0], [0.5, 0.5]), ([9, 0], [0.5, 0.5]), ([5, 4], [0.5, 0.5]), ([96, 3], [0.96, 0.04])],
)
def test_with_fewer_than_five_expected_units_in_an_arm_there_is_no_verdict(
    units: list[int], shares: list[float]
) -> None:
    ratio = check_sample_ratio(units, shares)

    assert (ratio.p, ratio.chi2, ratio.degrees, ratio.mismatch) == (None, None, 1, False)
    assert ratio.verdict == f"too few units to tell: {sum(units)}"


def test_five_expected_units_are_enough() -> None:
    assert check_sample_ratio([10, 0], [0.5, 0.5]).p == pytest.approx(math.erfc(math.sqrt(10 / 2)))


def test_an_arm_without_weight_and_units_is_left_out() -> None:
    assert check_sample_ratio([40, 60, 0], [0.5, 0.5, 0.0]) == check_sample_ratio([40, 60], [0.5, 0.5])


def test_a_unit_in_an_arm_without_weight_is_a_mismatch() -> None:
    ratio = check_sample_ratio([50, 50, 1], [0.5, 0.5, 0.0])

    assert (ratio.mismatch, ratio.p, ratio.chi2, ratio.degrees) == (True, 0.0, None, 0)
    assert "an arm of weight 0 has units" in ratio.verdict


def test_a_single_arm_with_weight_needs_no_test() -> None:
    ratio = check_sample_ratio([100, 0], [1.0, 0.0])

    assert (ratio.p, ratio.chi2, ratio.degrees, ratio.mismatch) == (None, None, 0, False)
    assert "nothing to test" in ratio.verdict


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(1e-3, 1e3)), min_size=2, max_size=6))
def test_counts_as_the_weights_ask_are_no_mismatch(arms: list[tuple[int, float]]) -> None:
    total = sum(weight for _, weight in arms)
    shares = [weight / total for _, weight in arms]
    num_units = sum(num for num, _ in arms)
    assume(min(shares) * num_units >= 100)

    ratio = check_sample_ratio([round(num_units * share) for share in shares], shares)

    assert not ratio.mismatch
    assert ratio.p is None or 0 <= ratio.p <= 1


def test_an_arm_whose_count_has_ended_is_not_a_mismatch() -> None:
    ratio = check_sample_ratio([MAX_UNITS, MAX_UNITS // 2], [0.9, 0.1])

    assert (ratio.p, ratio.chi2, ratio.degrees, ratio.mismatch) == (None, None, 1, False)
    assert "counted up to 8,000,000" in ratio.verdict
