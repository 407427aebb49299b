"""Counting: distinct units in little memory, and latencies with small relative errors."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_MERGE_AT = 8192


class UnitSet:
    """A set of 64-bit numbers, at 8 bytes each; a Python set takes ten times that.

    New ones gather in a small set, which is merged into a sorted array when it has grown.
    """

    def __init__(self) -> None:
        self._sorted: npt.NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, unit: int) -> bool:
        if unit in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(unit)))
        return place < len(self._sorted) and int(self._sorted[place]) == unit

    def add(self, unit: int) -> bool:
        """Add a unit; return whether it is new."""
        if unit in self:
            return False
        self._recent.add(unit)
        if len(self._recent) >= max(_MERGE_AT, len(self._sorted) // 8):
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.union1d(self._sorted, recent)
            self._recent.clear()
        return True


class LatencyHistogram:
    """Counts of latencies in buckets that grow by 4 %, from 0.1 ms to 15 minutes: a quantile is 2 % off at most."""

    _GROWTH = math.log(1.04)
    _LEAST_S = 1e-4
    _NUM_BUCKETS = 410

    def __init__(self) -> None:
        self._counts = [0] * self._NUM_BUCKETS
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def observe(self, seconds: float) -> None:
        bucket = math.ceil(math.log(max(seconds, self._LEAST_S) / self._LEAST_S) / self._GROWTH)
        self._counts[min(bucket, self._NUM_BUCKETS - 1)] += 1
        self._num += 1

    def quantile(self, share: float) -> float | None:
        """Return the latency in seconds that a share of them, from 0 to 1, does not exceed; ``None`` if there are none."""
        wanted = max(1, math.ceil(share * self._num))
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return self._LEAST_S * math.exp((bucket - 0.5) * self._GROWTH) if bucket else self._LEAST_S
        return None
