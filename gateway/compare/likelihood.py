"""The empirical likelihood ratio test of a mean difference, which allows for large losses that the sample lacks.

Random signs assume that gains and losses are symmetric, and so does Student's t if there are few queries. But many small
gains may offset a few total losses: with a loss in 2 % of the queries, a third of all samples of 50 queries have no loss at
all, and look clearly better. So the differences alone do not bound the mean. The possible values do: no query can lose more
than the baseline's value, or gain more than the rest up to 1.

This is Owen's test (1988, https://doi.org/10.1093/biomet/75.2.237) with a pseudo-observation, as in the adjusted empirical
likelihood of Chen, Variyath & Abraham (2008, J. Comput. Graph. Stat. 17:426): two thirds of a query with the largest
possible difference against the observed direction. Two thirds is the continuity correction of Peizer & Pratt (1968, JASA
63:1416): with it, p is close to the exact probability of k or fewer rare losses, also for k = 0. With more queries, it
matters less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Floats = npt.NDArray[np.float64]

TIE = 1e-9
"""Values of a query that differ by no more than this count as equal."""

_UNSEEN = 2 / 3  # the size of the pseudo-observation, in queries
_PRECISE = 1e-5  # the precision of the ends of intervals
_ROUNDING = 1e-12  # relative
_MOST_TIMES = 1e6  # the largest factor by which a sample is extended


@dataclass(frozen=True, slots=True)
class Bounds:
    """The possible differences of a query, given the baseline's values.

    Attributes:
        lowest: that of a query in which everything is lost, at most 0.
        highest: that of a query in which everything is gained, at least 0.
    """

    lowest: float = -1.0
    highest: float = 1.0

    @property
    def largest(self) -> float:
        """The largest possible difference in any direction."""
        return max(-self.lowest, self.highest)


def likelihood_p(sums: Sequence[float] | Floats, bounds: Bounds) -> float:
    """Return the two-sided p of the test that the mean is 0.

    Args:
        sums: differences of independent queries, or their sums by group.
        bounds: the bounds of these.
    """
    differences = np.asarray(sums, dtype=np.float64)
    differences = np.sort(differences[np.abs(differences) > TIE])  # so that p does not depend on the order
    unseen = -bounds.lowest
    if math.fsum(differences) < 0:
        differences, unseen = -differences[::-1], bounds.highest
    if math.fsum(differences) <= _UNSEEN * unseen:
        return 1.0
    least = max(unseen, -float(differences[0]))
    if least <= TIE:
        return 0.0  # no query can lose, so any gain shows
    tilt = optimize.brentq(
        lambda tilt: float(np.sum(differences / (1 + tilt * differences))) - _UNSEEN * unseen / (1 - tilt * unseen),
        0.0,
        (1 - _ROUNDING) / least,
    )
    ratio = float(np.sum(np.log1p(tilt * differences))) + _UNSEEN * math.log1p(-tilt * unseen)
    return float(stats.chi2.sf(2 * ratio, 1))


def likelihood_interval(
    sums: Sequence[float] | Floats, sizes: Sequence[float] | Floats, bounds: Bounds, alpha: float
) -> tuple[float, float]:
    """Return the means that the test does not reject at the level ``alpha``.

    It reaches further toward the rare, large differences than the t interval, which is symmetric.

    Args:
        sums: differences of independent queries, or their sums by group.
        sizes: number of queries in each group.
        bounds: the bounds of one query.
    """
    totals, counts = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    mean = float(totals.sum() / counts.sum())

    def excess(other: float) -> float:
        return likelihood_p(totals - other * counts, scaled(bounds, counts, other)) - alpha

    # Beyond the bounds, no weights give the mean, and p is 0.
    ends = (
        min(bounds.lowest, float(np.min(totals / counts))),
        max(bounds.highest, float(np.max(totals / counts))),
    )
    low, high = (mean if abs(end - mean) <= TIE else optimize.brentq(excess, mean, end, xtol=_PRECISE) for end in ends)
    return float(low), float(high)


def scaled(bounds: Bounds, sizes: Floats, mean: float = 0.0) -> Bounds:
    """Return the bounds of a group of average size, less this mean for each of its queries."""
    size = float(np.mean(sizes))
    return Bounds(min(0.0, bounds.lowest - mean) * size, max(0.0, bounds.highest - mean) * size)


def detectable(error: float, number: float, largest: float, alpha: float, power: float) -> float:
    """Return the true difference that the test finds with this probability, by the normal approximation.

    Args:
        error: standard error of the mean.
        number: number of independent queries.
        largest: the largest possible difference.
    """
    least = float(stats.norm.isf(alpha / 2)) ** 2 / 2
    largest = max(largest, TIE)
    variance = number * error**2

    def log_unseen(tilt: float) -> float:
        return _UNSEEN * math.log1p(-tilt * largest)

    # With the sums to the second order, the tilt at which the mean that reaches the threshold is smallest.
    tilt = optimize.brentq(
        lambda tilt: (
            _UNSEEN * tilt * largest / (1 - tilt * largest) + log_unseen(tilt) + number * variance * tilt**2 / 2 - least
        ),
        0.0,
        (1 - _ROUNDING) / largest,
    )
    found = (least - log_unseen(tilt)) / (number * tilt) + variance * tilt / 2
    return float(found) + float(stats.norm.ppf(power)) * error


def times_needed(error: float, number: int, largest: float, alpha: float, power: float, target: float) -> float:
    """Return by which factor a sample must grow so that ``detectable`` is ``target``."""

    def excess(log_times: float) -> float:
        times = math.exp(log_times)
        return detectable(error / math.sqrt(times), number * times, largest, alpha, power) - target

    widest = math.log(_MOST_TIMES)
    if excess(widest) > 0:
        return _MOST_TIMES
    if excess(-widest) <= 0:
        return 1 / _MOST_TIMES
    return math.exp(optimize.brentq(excess, -widest, widest, xtol=1e-3))
