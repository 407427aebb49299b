"""Counters: distinct units in little memory, and latencies with a small relative error."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left

# Units are hashes: their first bits distribute them evenly.
_SHARD_BITS = 10
# 80 MB per arm: a client that makes up a unit for each request must not fill the memory.
MAX_UNITS = 8_000_000


class UnitSet:
    """A set of up to ``MAX_UNITS`` 64-bit hashes that takes about 10 bytes for each.

    A Python set of 8 million takes 650 MB, and growing it blocks the event loop for up to 200 ms. Here, hashes with the same
    first 10 bits share a sorted array, and adding one moves at most that array: a few microseconds.
    """

    def __init__(self) -> None:
        self._shards: dict[int, array[int]] = {}
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, unit: int) -> bool:
        """Add a unit, from 0 to 2**64 - 1, and return whether it is new and the set was not full."""
        prefix = unit >> (64 - _SHARD_BITS)
        shard = self._shards.get(prefix)
        if shard is None:
            shard = self._shards[prefix] = array("Q")
        place = bisect_left(shard, unit)
        if place < len(shard) and shard[place] == unit:
            return False
        if self._num >= MAX_UNITS:
            return False
        shard.insert(place, unit)
        self._num += 1
        return True


class LatencyHistogram:
    """Counts latencies in buckets that grow by 4%, from 0.1 ms to 15 minutes: a quantile is off by 2% at most."""

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
        """Return the latency in seconds that a share of them (0 to 1) does not exceed; ``None`` without latencies."""
        rank = max(1, math.ceil(share * self._num))
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= rank:
                return self._LEAST_S * math.exp((bucket - 0.5) * self._GROWTH) if bucket else self._LEAST_S
        return None
