"""The few statistics that the tables show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not below ``share`` of all values (the nearest-rank definition).

    NaN when there are no values.
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(values: Sequence[float]) -> float:
    """Return the median; NaN when there are no values."""
    return statistics.median(values) if values else math.nan


def median_ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """Return the median of the ratios of measurements that were made next to each other, pair by pair.

    Pairs cancel slow changes of a shared machine, because both of a pair see the same. NaN when there are no pairs.
    """
    return median([safe_ratio(value, reference) for value, reference in zip(values, references, strict=True)])


def safe_ratio(value: float, reference: float) -> float:
    """Return ``value / reference``: infinite over zero, and NaN when both are zero."""
    if reference:
        return value / reference
    return math.inf if value else math.nan
