"""The difference between two arms, with an interval that holds at any look. Pure.

The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, "Time-uniform central limit theory and
asymptotic confidence sequences" (arXiv 2103.06476): the values of the units are weighted by the
inverse of the probability of their arm, and the margin is that of a normal mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

ALPHA = 0.05
"""The probability with which an interval may miss the difference at any look."""

LEAST_UNITS = 100
"""The fewest units in each arm; with fewer, there is no interval."""

PLANNED_UNITS = 1_000
"""The number of units at which the interval is the narrowest."""

# The fewest units that carry the variance, counted as the size of a sample of equal units. An interval from three
# conversions, or from one unit with half of all clicks, would be far too narrow.
_LEAST_CARRIERS = 15.0


@dataclass(frozen=True, slots=True)
class Difference:
    """The new arm minus the control.

    Attributes:
        low: the lower end of the interval.
        deviation: the standard deviation of a unit's contribution.
        num: number of units in both arms.
    """

    estimate: float
    low: float
    high: float
    deviation: float
    num: int


def contributions(control: Values, new: Values, share: float) -> Values:
    """Return the contribution of each unit, the control's first; the mean of all estimates the difference.

    Args:
        share: the planned share of the new arm in the units of both arms.
    """
    mean = (control.sum() + new.sum()) / max(1, len(control) + len(new))
    return np.concatenate([(mean - control) / (1 - share), (new - mean) / share])


def deviation(control: Values, new: Values, zeta: Values, share: float) -> float:
    """Return the standard deviation of a contribution: the larger of the observed value and that of equal arms.

    The observed value alone is far too small while a rare outcome has not occurred in a small arm. Of 300 experiments
    with a 90/10 split and an outcome in 1 % of the units, a quarter showed a difference at some look; with the larger
    value, none did.
    """
    pooled = float(np.concatenate([control, new]).std())
    return max(float(zeta.std()), pooled / math.sqrt(share * (1 - share)))


def is_carried(zeta: Values) -> bool:
    """Return whether enough contributions differ for an interval from their variance to hold."""
    squares = np.square(zeta - zeta.mean()) if len(zeta) else zeta
    fourth = float(np.square(squares).sum())
    return fourth > 0 and float(squares.sum()) ** 2 / fourth >= _LEAST_CARRIERS


def difference(
    control: Values, new: Values, share: float, alpha: float = ALPHA, planned: int = PLANNED_UNITS
) -> Difference | None:
    """Return the difference of the means of two arms; ``None`` with too few units.

    Args:
        control: ``(n,)``, one value for each unit.
        share: see :func:`contributions`.
        alpha: the probability with which the interval may miss at any look.
        planned: the number of units at which the interval is the narrowest.
    """
    zeta = contributions(control, new, share)
    if min(len(control), len(new)) < LEAST_UNITS or not is_carried(zeta):
        return None
    return around(float(zeta.mean()), deviation(control, new, zeta, share), len(zeta), alpha, planned)


def around(estimate: float, spread: float, num: int, alpha: float, planned: int = PLANNED_UNITS) -> Difference:
    """Return an estimate with its interval, from contributions with a standard deviation of ``spread``."""
    half = spread * margin(num, alpha, planned)
    return Difference(estimate, estimate - half, estimate + half, spread, num)


def margin(num: int, alpha: float, planned: int = PLANNED_UNITS) -> float:
    """Return half the width of the interval for values with a standard deviation of 1.

    It is ``sqrt(2 (n r + 1) / (n^2 r) log(sqrt(n r + 1) / alpha))``, where ``r`` makes it narrowest at ``planned`` units.
    """
    rho = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / planned
    scaled = num * rho + 1
    return math.sqrt(2 * scaled / (num * num * rho) * math.log(math.sqrt(scaled) / alpha))


def units_needed(spread: float, width: float, alpha: float = ALPHA, planned: int = PLANNED_UNITS) -> int:
    """Return the number of units of both arms that narrow half of the interval to ``width``, to two digits."""
    low, high = 1, 1
    while spread * margin(high, alpha, planned) > width and high < 10**12:
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if spread * margin(middle, alpha, planned) > width else (low, middle)
    return high
