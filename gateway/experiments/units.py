"""Counters: distinct units in little memory, sums for each unit, and latencies with a small relative error."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

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

    def __contains__(self, unit: int) -> bool:
        shard = self._shards.get(unit >> (64 - _SHARD_BITS), array("Q"))
        place = bisect_left(shard, unit)
        return place < len(shard) and shard[place] == unit

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

    def discard(self, unit: int) -> bool:
        """Remove a unit, and return whether the set had it."""
        shard = self._shards.get(unit >> (64 - _SHARD_BITS), array("Q"))
        place = bisect_left(shard, unit)
        if place == len(shard) or shard[place] != unit:
            return False
        del shard[place]
        self._num -= 1
        return True


class UnitSums:
    """Sums of a few numbers for each unit, kept in sorted shards like those of a :class:`UnitSet`.

    Args:
        num_columns: the number of sums of each unit, of 8 bytes each.
    """

    def __init__(self, num_columns: int) -> None:
        self._num_columns = num_columns
        self._shards: dict[int, tuple[array[int], list[array[float]]]] = {}
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, unit: int, numbers: Sequence[float], *, may_grow: bool = True) -> float:
        """Add numbers to the sums of a unit, and return its first sum; 0 if it has no sums and may not get any."""
        prefix = unit >> (64 - _SHARD_BITS)
        shard = self._shards.get(prefix)
        if shard is None:
            shard = self._shards[prefix] = (array("Q"), [array("d") for _ in range(self._num_columns)])
        units, columns = shard
        place = bisect_left(units, unit)
        if place == len(units) or units[place] != unit:
            if not may_grow:
                return 0.0
            units.insert(place, unit)
            for column in columns:
                column.insert(place, 0.0)
            self._num += 1
        for column, number in zip(columns, numbers, strict=True):
            column[place] += number
        return columns[0][place]

    @classmethod
    def of(cls, units: NDArray[np.uint64], columns: NDArray[np.float64]) -> UnitSums:
        """Return the sums of units, ``(n,)``, each once; ``columns`` are ``(num_columns, n)``."""
        found, order = cls(len(columns)), np.argsort(units)
        units, columns = units[order], columns[:, order]
        prefixes, starts = np.unique(units >> np.uint64(64 - _SHARD_BITS), return_index=True)
        for prefix, start, end in zip(prefixes.tolist(), starts, [*starts[1:], len(units)], strict=True):
            shard = array("Q", units[start:end].tobytes())
            found._shards[prefix] = shard, [array("d", column[start:end].tobytes()) for column in columns]
        found._num = len(units)
        return found

    def units(self) -> NDArray[np.uint64]:
        """Return a copy of the units, ``(n,)``, in the order of the sums."""
        return np.concatenate([np.empty(0, np.uint64), *(np.array(units) for units, _ in self._shards.values())])

    def columns(self) -> NDArray[np.float64]:
        """Return a copy of the sums, ``(num_columns, n)``."""
        if not self._num:
            return np.empty((self._num_columns, 0))
        shards = [columns for _units, columns in self._shards.values()]
        return np.array([np.concatenate([shard[i] for shard in shards]) for i in range(self._num_columns)])


class LatencyHistogram:
    """Counts latencies in buckets that grow by 4%, from 0.1 ms to 15 minutes: a quantile is off by 2% at most."""

    _GROWTH = math.log(1.04)
    _LEAST_S = 1e-4
    _NUM_BUCKETS = 410

    def __init__(self) -> None:
        self._counts = [0] * self._NUM_BUCKETS
        # The latencies that are only lower bounds, because the work was ended early.
        self._cut = [0] * self._NUM_BUCKETS
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def observe(self, seconds: float, *, is_cut: bool = False) -> None:
        """Count a latency.

        Args:
            is_cut: the work was ended after ``seconds``, and would have taken longer.
        """
        bucket = math.ceil(math.log(max(seconds, self._LEAST_S) / self._LEAST_S) / self._GROWTH)
        bucket = min(bucket, self._NUM_BUCKETS - 1)
        self._counts[bucket] += 1
        self._cut[bucket] += is_cut
        self._num += 1

    def add(self, other: LatencyHistogram) -> None:
        """Add the latencies of another histogram."""
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        self._num += other._num

    def buckets(self) -> Iterator[tuple[int, int, int]]:
        """Yield the number of each bucket that is not empty, its count, and how many of these were ended early."""
        for bucket, (count, num_cut) in enumerate(zip(self._counts, self._cut, strict=True)):
            if count:
                yield bucket, count, num_cut

    def add_bucket(self, bucket: int, *, num: int = 0, num_cut: int = 0) -> None:
        """Add to the count of a bucket, and to how many of these were ended early."""
        self._counts[bucket] += num
        self._cut[bucket] += num_cut
        self._num += num

    def quantile(self, share: float) -> float | None:
        """Return the latency in seconds that a share (0 to 1) of all does not exceed; ``None`` without latencies."""
        bucket = self._bucket(share, self._counts)
        if bucket is None:
            return None
        return self._LEAST_S * math.exp((bucket - 0.5) * self._GROWTH) if bucket else self._LEAST_S

    def median_finished(self) -> float | None:
        """Return the median of the latencies that were not ended early; ``None`` without any."""
        finished = LatencyHistogram()
        finished._counts = [count - cut for count, cut in zip(self._counts, self._cut, strict=True)]
        finished._num = sum(finished._counts)
        return finished.quantile(0.5)

    def is_least(self, share: float) -> bool:
        """Return whether a quantile could be longer if no work had been ended early."""
        finished = [count - cut for count, cut in zip(self._counts, self._cut, strict=True)]
        return self._bucket(share, self._counts) != self._bucket(share, finished)

    def _bucket(self, share: float, counts: Sequence[int]) -> int | None:
        """Return the bucket of a quantile of all latencies; those not in ``counts`` count as longer than any other."""
        rank = max(1, math.ceil(share * self._num))
        seen = 0
        for bucket, count in enumerate(counts):
            seen += count
            if seen >= rank:
                return bucket
        return None
