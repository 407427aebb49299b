"""Whether a server is sent requests: a circuit breaker. Pure: the time is passed in."""

from __future__ import annotations

import random

_FAILURES_TO_OPEN = 3
_LONGEST_PAUSE_S = 60.0


class Breaker:
    """Closed while the server works; open after failures in a row, with growing pauses between the trials.

    What is open is tried with a text of the gateway's own, whose vector is known: no client's request is spent on finding
    out whether a server is well, and a server that came back with another model is not let in.

    Args:
        pause_s: how long after it opened the first trial is due.

    Attributes:
        reason: why it is open; empty while it is closed.
    """

    def __init__(self, pause_s: float) -> None:
        self._first_pause_s = self._pause_s = pause_s
        self._num_failures = 0
        self._trial_at = 0.0
        self.reason = ""

    @property
    def is_closed(self) -> bool:
        """Whether the server may be sent requests."""
        return not self.reason

    def note_success(self) -> None:
        """Take note of a right answer; closes."""
        self._num_failures, self._pause_s, self.reason = 0, self._first_pause_s, ""

    def note_failure(self, reason: str, now: float) -> None:
        """Take note of a failure; opens after some in a row."""
        self._num_failures += 1
        if self._num_failures >= _FAILURES_TO_OPEN or not self.is_closed:
            self.open(reason, now)

    def open(self, reason: str, now: float) -> None:
        """Open, whatever there was before; open already, wait twice as long as the last time."""
        if not self.is_closed:
            self._pause_s = min(2 * self._pause_s, max(_LONGEST_PAUSE_S, self._first_pause_s))
        self.reason = reason
        # Gateways that lost the same server at the same time do not all come back at once.
        self._trial_at = now + self._pause_s * random.uniform(0.8, 1.2)  # noqa: S311  not for secrets

    def is_trial_due(self, now: float) -> bool:
        """Tell whether an open breaker's server is to be tried."""
        return not self.is_closed and now >= self._trial_at
