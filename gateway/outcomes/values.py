"""The value of each unit, by the kind of an outcome. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from gateway.experiments.sequence import Values
from gateway.outcomes.joining import Flags, Joined, Numbers

Per: TypeAlias = Literal["unit", "mean", "ratio"]

LEAST_FOR_RATIO = 200
"""The fewest units of each arm for a ratio of sums, whose linear form needs more units than a mean."""

_LEAST_FOR_SLOPE = 100

# Chances beyond this quantile are scaled down to it, or one heavy user would decide a ratio of sums.
_MOST_CHANCES = 0.99


@dataclass(frozen=True, slots=True)
class ArmValues:
    """The units of one arm in one generation, ``(n,)`` each.

    Attributes:
        value: its mean is the arm's outcome.
        before: the value from before the experiment, of the same kind; NaN if unknown.
    """

    unit: Numbers
    value: Values
    before: Values


def values_of(joined: Joined, is_in: Flags, per: Per, most_chances: float) -> ArmValues:
    """Return the values of some exposures.

    Args:
        is_in: flags of the exposures to use.
        most_chances: see :func:`most_chances`; for ``ratio``.
    """
    unit, value, of = joined.exposures.unit[is_in], joined.value[is_in], joined.of[is_in]
    before, before_of = joined.before[is_in], joined.before_of[is_in]
    if per == "unit":
        return ArmValues(unit, value, before)
    known = np.where(before_of > 0, before / np.where(before_of > 0, before_of, 1), np.nan)
    if per == "mean":
        has = of > 0  # the quality that a user without outcomes would have found is not known
        return ArmValues(unit[has], value[has] / of[has], known[has])
    kept = most_chances / np.maximum(of, most_chances)
    value, of = value * kept, of * kept
    if not of.sum():
        return ArmValues(unit, np.zeros(len(unit)), known)
    # Linear in the sums (the delta method): the mean is the ratio, and each unit has its share of the error.
    ratio = value.sum() / of.sum()
    return ArmValues(unit, ratio + (value - ratio * of) / of.mean(), known)


def most_chances(joined: Joined) -> float:
    """Return the number of chances beyond which a unit's values and chances are scaled down, in all arms alike."""
    of = joined.of[joined.of > 0]
    return float(np.quantile(of, _MOST_CHANCES)) if len(of) else 1.0


def adjust(control: ArmValues, new: ArmValues) -> tuple[ArmValues, ArmValues, bool]:
    """Return the values corrected by those from before the experiment, and whether enough of those were known.

    This is CUPED (Deng, Xu, Kohavi & Walker 2013), with the slope within the arms. A unit without a value from before
    gets the mean of these values.
    """
    before = np.concatenate([control.before, new.before])
    is_known = ~np.isnan(before)
    if is_known.sum() < _LEAST_FOR_SLOPE or not np.ptp(before[is_known]):
        return control, new, False
    center = before[is_known].mean()
    slopes = [_deviations(arm) for arm in (control, new)]
    covariance, variance = (sum(parts) for parts in zip(*slopes, strict=True))
    slope = covariance / variance if variance else 0.0
    old, fresh = (
        ArmValues(
            arm.unit, arm.value - slope * (np.where(np.isnan(arm.before), center, arm.before) - center), arm.before
        )
        for arm in (control, new)
    )
    return old, fresh, True


def _deviations(arm: ArmValues) -> tuple[float, float]:
    """Return an arm's sums of products and of squares around the means, over the units with both values."""
    is_known = ~np.isnan(arm.before)
    if not is_known.any():
        return 0.0, 0.0
    before, value = arm.before[is_known], arm.value[is_known]
    before = before - before.mean()
    return float(before @ (value - value.mean())), float(before @ before)
