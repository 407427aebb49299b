"""A circuit breaker for the requests to one server. Pure: the time is passed in."""

from __future__ import annotations

import math
import random

_FAILURES_TO_SUSPECT = 3
_LEAST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


class Breaker:
    """A breaker that is closed while the server works and opens when a trial fails; pauses between trials then grow.

    A trial requests the vectors of the gateway's own texts, which are known. Failures of clients' requests never open
    the breaker: they make the server suspect, so that a trial is due at once. A text on which a server fails therefore
    costs only its own request. No client's request is used to find out whether a server works again, and a server that
    comes back with another model gets no requests.

    Args:
        pause_s: seconds from the opening to the first trial.

    Attributes:
        reason: the reason why the breaker is open; empty while it is closed.
        is_suspect: whether requests have failed in a way that requires a trial.
    """

    def __init__(self, pause_s: float) -> None:
        self._first_pause_s = self._pause_s = pause_s
        self._num_failures = 0
        self._trial_at = -math.inf
        self.reason = ""
        self.is_suspect = False

    @property
    def is_closed(self) -> bool:
        """Whether the server may be sent requests."""
        return not self.reason

    def note_success(self) -> None:
        """Record a correct answer to a client's request."""
        self._num_failures = 0

    def note_failure(self, *, is_grave: bool) -> None:
        """Record a failed request. A grave failure, or several failures in a row, make the server suspect."""
        if not self.is_closed:
            return  # it was on its way when the breaker opened
        self._num_failures += 1
        self.is_suspect = self.is_suspect or is_grave or self._num_failures >= _FAILURES_TO_SUSPECT

    def close(self, now: float) -> None:
        """Close: a trial has shown that the server works."""
        self._num_failures, self._pause_s, self.reason, self.is_suspect = 0, self._first_pause_s, "", False
        self._trial_at = now + _LEAST_PAUSE_S

    def postpone(self, now: float) -> None:
        """Keep the state, because a trial was inconclusive. The next trial is due after a pause."""
        self._trial_at = now + _LEAST_PAUSE_S

    def open(self, reason: str, now: float) -> None:
        """Open, because a trial has failed. If the breaker is already open, double the pause."""
        if not self.is_closed:
            self._pause_s = min(2 * self._pause_s, max(_LONGEST_PAUSE_S, self._first_pause_s))
        self.reason, self.is_suspect = reason, False
        # The random factor keeps gateways that lost the same server from all retrying at once.
        self._trial_at = now + self._pause_s * random.uniform(0.8, 1.2)  # noqa: S311  not for secrets

    def hold(self, reason: str) -> None:
        """Open without a failure, until a first trial, which is due at once."""
        self.reason, self.is_suspect = reason, False
        self._pause_s = self._first_pause_s / 2  # which a failure of that trial doubles
        self._trial_at = -math.inf

    def is_trial_due(self, now: float) -> bool:
        """Return whether a trial is due: the breaker is open or suspect, and the last trial was long enough ago."""
        return (self.is_suspect or not self.is_closed) and now >= self._trial_at
