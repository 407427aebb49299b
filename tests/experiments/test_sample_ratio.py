"""The test of the split: compared with formulas by hand, at any look, and on splits that are wrong on purpose."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gammaln
from scipy.stats import chisquare

from gateway.experiments.sample_ratio import (
    ArmCount,
    RatioProcess,
    SampleRatio,
    check_sample_ratio,
    largest_log_e,
    num_tests_of,
)


def check(nums: Sequence[int], shares: Sequence[float], **fields: object) -> SampleRatio:
    counts = [ArmCount(name, num, share) for name, num, share in zip("abcdef", nums, shares, strict=False)]
    return check_sample_ratio(counts, **fields)


def e_value(nums: Sequence[int], shares: Sequence[float]) -> float:
    """Return the formula of Lindon & Malek as they write it."""
    n, alpha = np.array(nums), 1_000 * np.array(shares)
    beta = gammaln(alpha + n).sum() - gammaln((alpha + n).sum()) - gammaln(alpha).sum() + gammaln(alpha.sum())
    return float(np.exp(beta - (n * np.log(shares)).sum()))


@pytest.mark.parametrize(
    ("nums", "shares"),
    [([4_900, 5_100], [0.5, 0.5]), ([820, 95, 85], [0.8, 0.1, 0.1]), ([600, 400], [0.5, 0.5]), ([9, 0], [0.9, 0.1])],
)
def test_p_is_one_over_the_e_value(nums: list[int], shares: list[float]) -> None:
    assert check(nums, shares).p == pytest.approx(min(1.0, 1 / e_value(nums, shares)))


@given(st.lists(st.integers(0, 2), max_size=300))
def test_the_process_ends_at_the_value_of_its_counts(arms: list[int]) -> None:
    shares = [0.5, 0.3, 0.2]
    process = RatioProcess()
    for arm in arms:
        process.add("abc"[arm], shares[arm])

    assert math.exp(process.log_e) == pytest.approx(e_value([arms.count(i) for i in range(3)], shares))
    assert process.largest_log_e >= max(0.0, process.log_e)


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.1], [0.4, 0.4, 0.2]])
def test_hardly_any_correct_split_is_ever_flagged_however_often_one_looks(shares: list[float]) -> None:
    """Of 400 experiments, looked at after every 100 units up to 20,000: at most 1 % may be, which is 4 on average."""
    rng = np.random.default_rng(5)
    num_flagged = 0
    for _ in range(400):
        arms = rng.multinomial(100, shares, size=200).cumsum(axis=0).tolist()
        num_flagged += any(check(nums, shares).mismatch for nums in arms)

    assert num_flagged <= 5


def test_a_mismatch_stays_one_when_later_units_hide_it() -> None:
    """The largest E counts; otherwise the verdict would depend on the time of the look."""
    process = RatioProcess()
    for arm in "a" * 700 + "b" * 300 + "b" * 400:
        process.add(arm, 0.5)

    now = check([700, 700], [0.5, 0.5])
    ratio = check([700, 700], [0.5, 0.5], largest_log_e=process.largest_log_e)

    assert not now.mismatch
    assert ratio.mismatch
    assert ratio.p == pytest.approx(math.exp(-process.largest_log_e))


def test_an_arm_that_loses_a_tenth_of_its_units_is_found() -> None:
    rng = random.Random(3)
    found = []
    for _ in range(11):
        process, num = RatioProcess(), 0
        while process.largest_log_e < math.log(100):
            arm = rng.choice("ab")
            if arm == "a" or rng.random() >= 0.1:
                process.add(arm, 0.5)
                num += 1
        found.append(num)

    assert 2_000 < np.median(found) < 8_000  # 4,500 in the simulation of the design


def test_the_verdict_names_the_arm_with_too_few_and_its_errors() -> None:
    counts = [ArmCount("a", 2_600, 0.5, 5_000, 0), ArmCount("b", 2_000, 0.5, 4_111, 111)]

    ratio = check_sample_ratio(counts)

    assert (ratio.mismatch, ratio.arm, ratio.expected) == (True, "b", 2_300)
    assert ratio.verdict.startswith("sample ratio mismatch (p = ")
    assert ratio.verdict.endswith(
        " at any look): arm 'b' has 2,000 units, and 2,300 are expected; 111 of its 4,111 requests failed; something loses "
        "units of an arm: do not trust a comparison of the arms"
    )


def test_the_arm_that_lacks_most_is_measured_by_its_own_spread() -> None:
    assert check([8_600, 700, 700], [0.9, 0.05, 0.05]).arm == "a"
    assert check([9_050, 380, 570], [0.9, 0.05, 0.05]).arm == "b"


def test_without_a_mismatch_it_says_so() -> None:
    ratio = check([4_900, 5_100], [0.5, 0.5])

    assert not ratio.mismatch
    assert ratio.verdict == "no mismatch found, p = 0.54 at any look"


def test_two_tests_together_err_as_often_as_one() -> None:
    nums = [1_000, 1_190]  # between the thresholds
    one, two = check(nums, [0.5, 0.5]), check(nums, [0.5, 0.5], num_tests=2)

    assert one.p is not None
    assert two.p == pytest.approx(2 * one.p)
    assert (one.mismatch, two.mismatch) == (one.p <= 0.01, 2 * one.p <= 0.01)


def test_all_generations_together_err_as_often_as_one() -> None:
    assert sum(1 / num_tests_of(number) for number in range(1, 10_001)) == pytest.approx(1, abs=1e-3)
    assert [num_tests_of(number) for number in (1, 2, 3)] == [2, 6, 12]


# --------------------------------------------------------------------------------------------------------- for reading


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.05, 1)), min_size=2, max_size=6))
def test_the_chi_square_is_that_of_scipy(arms: list[tuple[int, float]]) -> None:
    total = sum(weight for _, weight in arms)
    nums, shares = [num for num, _ in arms], [weight / total for _, weight in arms]

    ratio = check(nums, shares)

    expected = [sum(nums) * share for share in shares]
    if min(expected) < 5:
        assert (ratio.chi2, ratio.chi2_p) == (None, None)
    else:
        result = chisquare(nums, expected)
        assert ratio.degrees == len(nums) - 1
        assert ratio.chi2 == pytest.approx(result.statistic)
        assert ratio.chi2_p == pytest.approx(result.pvalue, abs=1e-12)


@pytest.mark.parametrize("num", [10**7, 8_000_000])
def test_large_and_very_wrong_counts_have_a_p_value(num: int) -> None:
    ratio = check([num, 0], [0.5, 0.5])

    assert ratio.mismatch
    assert ratio.p is not None
    assert 0 <= ratio.p < 1e-300


# --------------------------------------------------------------------------------------------------------------- edges


def test_without_units_there_is_nothing_to_say() -> None:
    ratio = check([0, 0], [0.5, 0.5])

    assert (ratio.p, ratio.chi2, ratio.degrees, ratio.mismatch, ratio.arm) == (None, None, 1, False, None)
    assert ratio.verdict == "no units yet"
    assert check([0, 0], [0.5, 0.5], of="requests").verdict == "no requests yet"


def test_an_arm_without_weight_and_units_is_left_out() -> None:
    assert check([40, 60, 0], [0.5, 0.5, 0.0]) == check([40, 60], [0.5, 0.5])


def test_a_unit_in_an_arm_without_weight_is_a_mismatch() -> None:
    ratio = check([50, 50, 1], [0.5, 0.5, 0.0])

    assert (ratio.mismatch, ratio.p, ratio.arm) == (True, 0.0, "c")
    assert ratio.verdict == "sample ratio mismatch: arm 'c' has weight 0, and 1 units; do not trust a comparison"


def test_a_single_arm_with_weight_needs_no_test() -> None:
    ratio = check([100, 0], [1.0, 0.0])

    assert (ratio.p, ratio.chi2, ratio.degrees, ratio.mismatch) == (None, None, 0, False)
    assert "nothing to test" in ratio.verdict


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(1e-3, 1e3)), min_size=2, max_size=6))
def test_counts_that_match_the_weights_are_not_a_mismatch(arms: list[tuple[int, float]]) -> None:
    total = sum(weight for _, weight in arms)
    shares = [weight / total for _, weight in arms]
    num_units = sum(num for num, _ in arms)

    ratio = check([round(num_units * share) for share in shares], shares)

    assert not ratio.mismatch
    assert ratio.p is None or 0 <= ratio.p <= 1


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("number", [0, 1, 50, 3000])
def test_the_evidence_of_all_units_at_once_is_that_of_one_after_the_other(
    shares: tuple[float, ...], number: int
) -> None:
    """And not that of the last unit: it was larger before."""
    arms = np.random.default_rng(7).choice(len(shares), size=number, p=[shares[-1], *shares[:-1]][::-1])
    process = RatioProcess()
    assert process.largest_log_e == 0.0
    for arm in arms:
        process.add(str(arm), shares[arm])

    found = largest_log_e([arms == arm for arm in range(len(shares))], np.array(shares))

    assert found == pytest.approx(process.largest_log_e)
    assert found >= process.log_e


@pytest.mark.parametrize(
    "nums", [(60, 40), (60, 60, 30), (70, 50, 50, 30), (60, 40, 50, 60, 40), (50, 60, 40, 50, 50, 50), (30,) * 7]
)
def test_pearson_s_statistic_has_scipy_s_p_value_for_any_number_of_arms(nums: tuple[int, ...]) -> None:
    checked = check_sample_ratio([ArmCount(str(i), num, 1 / len(nums)) for i, num in enumerate(nums)])

    assert (checked.chi2, checked.chi2_p) == pytest.approx(tuple(chisquare(nums)))
    assert checked.degrees == len(nums) - 1
