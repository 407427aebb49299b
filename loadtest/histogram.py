"""Counts of durations in buckets that are 2 % wide: percentiles over any time, and over any number of workers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

_GROWTH: Final = 1.02
_LOG_GROWTH: Final = math.log(_GROWTH)


def bucket_of(milliseconds: float) -> int:
    """Return the bucket of a duration."""
    return math.floor(math.log(max(milliseconds, 1e-3)) / _LOG_GROWTH)


def milliseconds_of(bucket: int) -> float:
    """Return the middle of a bucket in milliseconds, at most 1 % from any duration in it."""
    return math.exp((bucket + 0.5) * _LOG_GROWTH)


def percentile(counts: Counter[int], share: float) -> float:
    """Return the duration, in milliseconds, that ``share`` of all do not exceed; NaN without any."""
    total = counts.total()
    if total == 0:
        return math.nan
    rank = max(1, math.ceil(share * total))
    seen = 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= rank:
            return milliseconds_of(bucket)
    raise AssertionError("the counts add up to their total")
