"""Counters that end by themselves, in this process: a storage for ``limits``."""

from __future__ import annotations

import time
from typing import Final

from limits.aio.storage import Storage

# How often counters that have ended are thrown away.
_SWEEP_EVERY_S: Final = 30.0


class ProcessStorage(Storage):
    """Counts in a dictionary of this process.

    ``limits``' own storage in memory goes through all counters at every request, 12 ms with those of 100,000 addresses,
    which is as many as whoever owns an IPv6 network likes.
    """

    STORAGE_SCHEME = None  # it is not made from an address

    def __init__(self) -> None:
        super().__init__()
        # Count, and end by `time.monotonic`: when the clock is set, no window becomes longer or shorter.
        self._counts: dict[str, tuple[int, float]] = {}
        self._next_sweep = 0.0

    @property
    def base_exceptions(self) -> type[Exception]:
        return OSError

    def __len__(self) -> int:
        return len(self._counts)

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add to a counter, which begins and ends ``expiry`` seconds later if there is none."""
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_EVERY_S
            self._counts = {key: entry for key, entry in self._counts.items() if entry[1] > now}
        count, end = self._counts.get(key, (0, 0.0))
        if end <= now:
            count, end = 0, now + expiry
        self._counts[key] = (count + amount, end)
        return count + amount

    async def get(self, key: str) -> int:
        """Return what a counter has, 0 if there is none."""
        count, end = self._counts.get(key, (0, 0.0))
        return count if end > time.monotonic() else 0

    async def get_expiry(self, key: str) -> float:
        """Return when a counter ends, in seconds since the epoch; now if there is none."""
        return time.time() + max(0.0, self._counts.get(key, (0, 0.0))[1] - time.monotonic())

    async def check(self) -> bool:
        """Return whether it works."""
        return True

    async def reset(self) -> int:
        """End all counters, and return how many there were."""
        count = len(self._counts)
        self._counts = {}
        return count

    async def clear(self, key: str) -> None:
        """End a counter."""
        self._counts.pop(key, None)
