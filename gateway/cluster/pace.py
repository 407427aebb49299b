"""The rate of a replica, by which the fronts compare replicas of different speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# The weight of a new measurement.
_WEIGHT: Final = 0.3
# An idle replica forgets its rate after this time in seconds: otherwise a replica that was slow once, such as at its
# first job, would get no job that shows its present rate.
_FORGET_S: Final = 30.0


class Pace:
    """The rate at which a replica finishes work while it is busy.

    A job may take many times as long as the time between two measurements, so busy time counts until a job is done. Failed
    work does not count: otherwise a replica that fails at once would seem fast, and get the most jobs. Nor does the time
    that was spent on canceled work alone, unless it shows that the replica is slower than its rate: clients leave for
    their own reasons too.

    Attributes:
        rate: the work per second; 0 if unknown.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = 0.0
        self._clock = clock
        self._done = self._canceled = 0
        self._busy_s = self._unproven_s = 0.0
        self._busy_since: float | None = None
        self._done_at = clock()

    def set_busy(self, is_busy: bool) -> None:
        """Note whether any job is in progress."""
        if is_busy and self._busy_since is None:
            self._busy_since = self._clock()
        elif not is_busy:
            self._settle()
            if self._canceled > self.rate * self._unproven_s:
                self._busy_s -= self._unproven_s
            self._busy_since, self._canceled, self._unproven_s = None, 0, 0.0

    def add(self, work: int) -> None:
        """Count finished work."""
        self._settle()
        self._done += work
        self._canceled, self._unproven_s = 0, 0.0

    def cancel(self, work: int) -> None:
        """Count work that was canceled, of which an unknown part is done."""
        self._canceled += work

    def measure(self) -> None:
        """Update the rate by the work that was finished since the last measurement."""
        self._settle()
        if self._done and self._busy_s:
            rate = self._done / self._busy_s
            self.rate += _WEIGHT * (rate - self.rate) if self.rate else rate
            self._done, self._busy_s, self._unproven_s, self._done_at = 0, 0.0, 0.0, self._clock()
        elif self._busy_since is None and self._clock() - self._done_at > _FORGET_S:
            self.rate, self._busy_s = 0.0, 0.0

    def _settle(self) -> None:
        if self._busy_since is not None:
            now = self._clock()
            self._busy_s += now - self._busy_since
            self._unproven_s += now - self._busy_since
            self._busy_since = now
