"""Conclusions from the values of all queries: intervals, tests, and the verdict.

The queries are a sample of the queries that users will send. Differences between systems are tested by a paired
randomization test, as recommended by Smucker, Allan & Carterette 2007 (https://doi.org/10.1145/1321440.1321528), and by a
test that allows for large losses that the sample lacks (``gateway.compare.likelihood``). ``bench.evidence`` measures the
error rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from gateway.compare.likelihood import (
    TIE,
    Bounds,
    Floats,
    detectable,
    likelihood_interval,
    likelihood_p,
    scaled,
    times_needed,
)
from gateway.compare.results import PRIMARY_MEASURE, Contrast, Estimate, Verdict

MIN_QUERIES = 50
"""With fewer queries, the spread is so large that the verdict would depend on the choice of queries."""

MIN_UNTIED = 15
"""Only queries that differ are informative. With fewer of them, a rare and large loss is easily missed."""

ALPHA = 0.05

SMALL_DIFFERENCE = 0.02
"""The report states the number of queries that would show this difference, or the margin if that is larger."""

_POWER = 0.8
_BITS = 8  # eight signs are drawn at once
_ROUNDING = 1e-12  # relative: sums of equal numbers in another order count as equal


@dataclass(frozen=True, slots=True)
class Design:
    """The rules for conclusions, fixed before anything is computed.

    Attributes:
        num_resamples: number of resamples of the randomization test.
        seed: seed of its draws.
        margin: a smaller difference does not matter; with 0, every difference matters.
        groups: the group of each query that depends on others, by query.
        num_arms: number of arms that are compared with the baseline.
    """

    num_resamples: int = 100_000
    seed: int = 0
    margin: float = 0.01
    groups: Mapping[str, str] = field(default_factory=dict)
    num_arms: int = 1


@dataclass(frozen=True, slots=True)
class _Sample:
    """Values of queries, summed by group.

    Attributes:
        sums: sum of the values of each group.
        sizes: number of queries of each group.
    """

    mean: float
    sums: Floats
    sizes: Floats

    @property
    def error(self) -> float:
        """The standard error of the mean for independent groups rather than queries (linearized ratio estimator)."""
        number = self.sums.size
        if number < 2:
            return 0.0
        spread = float(np.sum((self.sums - self.mean * self.sizes) ** 2)) * number / (number - 1)
        return math.sqrt(spread) / float(self.sizes.sum())

    def interval(self, alpha: float, lowest: float, highest: float) -> Estimate:
        """Return the mean with its t interval, limited to the possible means."""
        if self.error <= TIE:
            return Estimate(self.mean, None, None)
        margin = float(stats.t.ppf(1 - alpha / 2, self.sums.size - 1)) * self.error
        return Estimate(self.mean, max(lowest, self.mean - margin), min(highest, self.mean + margin))

    def both(self, alpha: float, bounds: Bounds) -> Estimate:
        """Return the smallest interval that contains all means that one of the tests does not reject."""
        alone = self.interval(alpha, -1.0, 1.0)
        low, high = likelihood_interval(self.sums, self.sizes, bounds, alpha)
        if alone.low is None or alone.high is None:
            return Estimate(self.mean, low, high)
        return Estimate(self.mean, min(alone.low, low), max(alone.high, high))


def estimate(values: Mapping[str, float], groups: Mapping[str, str]) -> Estimate:
    """Return the mean of values between 0 and 1, by query, with its 95 % t interval.

    Args:
        groups: the group of each query that depends on others, by query.

    Raises:
        ValueError: there are no values.
    """
    return _sample(values, groups).interval(ALPHA, 0.0, 1.0)


def _sample(values: Mapping[str, float], groups: Mapping[str, str]) -> _Sample:
    if not values:
        raise ValueError("there are no values to estimate a mean of")
    numbers = np.fromiter(values.values(), dtype=np.float64, count=len(values))
    # A group name is a string and a query's key a tuple, so they never collide.
    names: dict[object, int] = {}
    places = [names.setdefault(groups.get(query, (query,)), len(names)) for query in values]
    # Use fsum, so that the mean does not depend on the order of the queries.
    mean = math.fsum(numbers) / numbers.size
    sums: Floats = np.bincount(places, numbers).astype(np.float64)
    return _Sample(mean, sums, np.bincount(places).astype(np.float64))


def randomization_p(sums: Sequence[float] | Floats, num_resamples: int, seed: int) -> tuple[float, float]:
    """Return the two-sided p of the paired randomization test, and its standard error from the random draws.

    p is the frequency of random signs with at least as large a total. With few differences (``2 ** number <=
    num_resamples``), every choice of signs is tried, and p is exact. p depends neither on the order of the differences nor
    on which arm is first.

    Args:
        sums: differences of independent queries, or their sums by group.
    """
    differences = np.asarray(sums, dtype=np.float64)
    # The original signs do not matter, so only the sizes count. They are sorted, so that the order does not matter either.
    sizes = np.sort(np.abs(differences[np.abs(differences) > TIE]))
    if not sizes.size:
        return 1.0, 0.0
    total = float(sizes.sum())
    least = abs(math.fsum(differences)) - _ROUNDING * total
    if 2**sizes.size <= num_resamples:
        totals = np.zeros(1)
        for size in sizes[1:]:  # the first sign is fixed: the other sign gives the same totals, negated
            totals = np.concatenate((totals - size, totals + size))
        return float(np.mean(np.abs(totals + sizes[0]) >= least)), 0.0
    rng = np.random.default_rng(seed)
    totals = np.zeros(num_resamples)
    for start in range(0, sizes.size, _BITS):
        drawn = rng.integers(0, 2**_BITS, num_resamples, dtype=np.uint8)
        totals += _signed_sums(sizes[start : start + _BITS])[drawn]
    p = (int(np.count_nonzero(np.abs(totals) >= least)) + 1) / (num_resamples + 1)
    return p, math.sqrt(p * (1 - p) / num_resamples)


def _signed_sums(sizes: Floats) -> Floats:
    """Return the sum of up to eight numbers for each of the 256 choices of their signs."""
    bits = np.unpackbits(np.arange(2**_BITS, dtype=np.uint8)[:, None], axis=1, count=sizes.size)
    totals: Floats = (2.0 * bits - 1.0) @ sizes
    return totals


def holm(ps: Sequence[float]) -> list[float]:
    """Correct the p values of several tests (Holm 1979): multiply the smallest by their number, and so on.

    The result is in the order of ``ps``. No value is above 1, or below the corrected value of a smaller p.
    """
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


def contrast(
    arm: str,
    baseline: str,
    measure: str,
    arm_values: Mapping[str, float],
    baseline_values: Mapping[str, float],
    design: Design,
) -> Contrast:
    """Compare an arm with the baseline in one measure.

    ``p_holm`` equals ``p``, and the verdict is ``None``, until ``with_verdicts`` has seen all arms.

    Args:
        arm_values: value of the measure by query, from 0 to 1.
        baseline_values: the baseline's values for the same queries.

    Raises:
        ValueError: the two have different queries.
    """
    if arm_values.keys() != baseline_values.keys():
        raise ValueError(f"{arm} and {baseline} have values of different queries, and cannot be compared in pairs")
    differences = {query: arm_values[query] - value for query, value in baseline_values.items()}
    sample = _sample(differences, design.groups)
    wins = sum(value > TIE for value in differences.values())
    losses = sum(value < -TIE for value in differences.values())
    bounds = Bounds(-max(baseline_values.values()), 1 - min(baseline_values.values()))
    p_random, p_error = randomization_p(sample.sums, design.num_resamples, design.seed)
    p, p_error = max((p_random, p_error), (likelihood_p(sample.sums, scaled(bounds, sample.sizes)), 0.0))
    num_untied = int(np.count_nonzero(np.abs(sample.sums) > TIE))
    interval = sample.both(ALPHA, bounds)
    simultaneous = interval if design.num_arms == 1 else sample.both(ALPHA / design.num_arms, bounds)
    if sample.error <= TIE or (num_untied < MIN_UNTIED and 2 * num_untied < sample.sums.size):
        interval = Estimate(sample.mean, None, None)  # differences are too rare for this sample, or do not vary
    return Contrast(
        arm=arm,
        baseline=baseline,
        measure=measure,
        difference=interval,
        simultaneous=simultaneous,
        standard_error=sample.error,
        p=p,
        p_error=p_error,
        p_holm=p,
        p_random=p_random,
        wins=wins,
        ties=len(differences) - wins - losses,
        losses=losses,
        largest=bounds.largest,
        num_independent=sample.sums.size,
        num_untied=num_untied,
    )


def with_verdicts(contrasts: Sequence[Contrast], margin: float) -> list[Contrast]:
    """Correct p for the number of arms, and add the verdict if the measure is the primary one.

    Args:
        contrasts: the contrasts of one measure, for every arm except the baseline.

    Raises:
        ValueError: the contrasts are of several measures.
    """
    if len({contrast.measure for contrast in contrasts}) > 1:
        raise ValueError("contrasts must be of one measure to be corrected together")
    corrected = [
        replace(contrast, p_holm=p)
        for contrast, p in zip(contrasts, holm([contrast.p for contrast in contrasts]), strict=True)
    ]
    if not corrected or corrected[0].measure != PRIMARY_MEASURE:
        return corrected
    ps_random = holm([contrast.p_random for contrast in contrasts])
    return [
        _with_power(_with_verdict(contrast, p_random, margin, len(contrasts)), margin, len(contrasts))
        for contrast, p_random in zip(corrected, ps_random, strict=True)
    ]


def _with_verdict(one: Contrast, p_random: float, margin: float, num_arms: int) -> Contrast:
    """Add the verdict. If only the losses that the sample may lack prevent a clearer one, add their largest share.

    Args:
        p_random: the p of the randomization test after Holm's correction.
    """
    verdict = _verdict(one, margin, num_arms)
    if verdict not in {Verdict.INCONCLUSIVE, Verdict.NOT_WORSE}:
        return replace(one, verdict=verdict)
    by_sample = replace(
        one,
        p_holm=p_random,
        difference=_t_interval(one, ALPHA),
        simultaneous=_t_interval(one, ALPHA / num_arms),
    )
    if _verdict(by_sample, margin, num_arms) in {verdict, Verdict.INCONCLUSIVE}:
        return replace(one, verdict=verdict)
    return replace(one, verdict=verdict, unseen=_most_unseen(0, one.num_independent, num_arms))


def _t_interval(one: Contrast, alpha: float) -> Estimate:
    mean, margin = one.difference.mean, float(stats.t.ppf(1 - alpha / 2, one.num_independent - 1)) * one.standard_error
    return Estimate(mean, mean - margin, mean + margin)


def _verdict(one: Contrast, margin: float, num_arms: int) -> Verdict:
    if num_queries(one) < MIN_QUERIES:
        return Verdict.TOO_FEW_QUERIES
    if one.num_untied < MIN_UNTIED:
        return Verdict.AS_GOOD if _most_untied(one, num_arms) <= margin else Verdict.TOO_FEW_DIFFER
    low, high = one.simultaneous.low, one.simultaneous.high
    if low is not None and high is not None and -margin <= low and high <= margin:
        return Verdict.AS_GOOD
    if _is_shown(one):
        return Verdict.BETTER if one.difference.mean > 0 else Verdict.WORSE
    return Verdict.NOT_WORSE if margin and low is not None and low > -margin else Verdict.INCONCLUSIVE


def _is_shown(one: Contrast) -> bool:
    """Return whether a difference is shown by both the test and the interval, which may disagree in borderline cases.

    If all queries differ by the same, there is no interval, and the test decides.
    """
    low, high = one.difference.low, one.difference.high
    return one.p_holm < ALPHA and (low is None or high is None or not low <= 0 <= high)


def num_queries(one: Contrast) -> int:
    """Return the number of queries of a contrast."""
    return one.wins + one.ties + one.losses


def _most_untied(one: Contrast, num_arms: int) -> float:
    """Return an upper bound of the share of queries that differ (Clopper & Pearson 1934).

    No query differs by more than 1, so this is also a bound of the mean difference.
    """
    num_tied = one.num_independent - one.num_untied
    if not num_tied or one.num_independent < num_queries(one):  # a large group may differ
        return 1.0
    return _most_unseen(one.num_untied, one.num_independent, num_arms)


def _most_unseen(number: int, total: int, num_arms: int) -> float:
    """Return the upper end of the interval of a share of which ``number`` in ``total`` were seen."""
    return float(stats.beta.ppf(1 - ALPHA / 2 / num_arms, number + 1, total - number))


def _with_power(one: Contrast, margin: float, num_arms: int) -> Contrast:
    """Add the detectable difference, and the number of queries that a small difference needs.

    Both are for a test at the strictest level of Holm's correction: the other arms may be equal to the baseline.
    """
    if one.num_untied < MIN_UNTIED or one.standard_error <= 0:
        return one
    sample = (one.standard_error, one.num_independent, one.largest, ALPHA / num_arms, _POWER)
    times = times_needed(*sample, max(SMALL_DIFFERENCE, margin))
    return replace(one, detectable=detectable(*sample), queries_needed=math.ceil(num_queries(one) * times))
