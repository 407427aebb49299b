"""The recent past of this process: its last errors, and each model's rate and latency. Bounded; holds no texts."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from gateway.experiments.units import LatencyHistogram

MAX_ERRORS = 200
"""The number of different errors that are remembered."""

NUM_MINUTES = 15
"""The length of the window for rates and latencies."""

_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """The facts of a failed request; failures with equal facts count as one.

    Attributes:
        path: the route; ``other`` for a path that does not exist.
        asked: the model as the client named it, shortened; ``None`` where none was named.
        client: the name of the client's key, or its network address.
        param: the field at fault.
    """

    status: int
    code: str
    path: str
    asked: str | None
    client: str
    param: str | None


@dataclass(slots=True)
class RecentError:
    """A group of equal failures, with the details of the last one.

    Attributes:
        reason: the message of the last failure, without quotations of the client's texts.
        first, last: the times of the first and the last failure, in UTC.
    """

    facts: ErrorFacts
    reason: str | None
    request_id: str
    first: datetime
    last: datetime
    number: int = 1


class RecentErrors:
    """The last ``MAX_ERRORS`` different errors. A client in a loop does not push out the errors of other clients."""

    def __init__(self) -> None:
        self._errors: OrderedDict[ErrorFacts, RecentError] = OrderedDict()

    def add(self, facts: ErrorFacts, reason: str | None, request_id: str) -> None:
        """Remember a failure, or count it if an equal one is known."""
        now = datetime.now(UTC)
        known = self._errors.get(facts)
        if known is None:
            self._errors[facts] = RecentError(facts, reason, request_id, now, now)
            if len(self._errors) > MAX_ERRORS:
                self._forget_one()
            return
        known.reason, known.request_id, known.last = reason, request_id, now
        known.number += 1
        self._errors.move_to_end(facts)

    def _forget_one(self) -> None:
        """Forget the oldest error of the client that has the most, which may send a different wrong name each time."""
        numbers = Counter(facts.client for facts in self._errors)
        most = max(numbers.values())
        del self._errors[next(facts for facts in self._errors if numbers[facts.client] == most)]

    def __iter__(self) -> Iterator[RecentError]:
        """Yield the errors, the latest first."""
        return reversed(self._errors.values())


@dataclass(slots=True)
class _Minute:
    number: int
    requests: int = 0
    errors: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)


@dataclass(frozen=True, slots=True)
class Traffic:
    """The requests of a model in the window.

    Attributes:
        requests_per_s: requests per second in the last minute.
        requests: requests in the window, errors included.
        by_minute: requests in each minute of the window, the present one last.
        p50_s, p99_s: latency of requests without an error; ``None`` without any.
    """

    requests_per_s: float
    requests: int
    errors: int
    by_minute: Sequence[int]
    p50_s: float | None
    p99_s: float | None


class RecentTraffic:
    """Counts the requests of each model by minute, and keeps the last ``NUM_MINUTES`` minutes: 60 KB per model.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._minutes: dict[str, deque[_Minute]] = {}

    def record(self, model: str, seconds: float, *, is_error: bool) -> None:
        """Count one request. ``model`` is an id of the registry, so the number of models is bounded."""
        number = int(self._now() // _MINUTE_S)
        minutes = self._minutes.get(model)
        if minutes is None:
            minutes = self._minutes[model] = deque(maxlen=NUM_MINUTES)
        if not minutes or minutes[-1].number != number:
            minutes.append(_Minute(number))
        minute = minutes[-1]
        minute.requests += 1
        if is_error:
            minute.errors += 1
        else:
            minute.latency.observe(seconds)

    def of(self, model: str) -> Traffic:
        """Return the traffic of a model."""
        now = self._now()
        present = int(now // _MINUTE_S)
        minutes = {
            minute.number: minute
            for minute in self._minutes.get(model, ())
            if present - NUM_MINUTES < minute.number <= present
        }
        counts = [
            minutes[number].requests if number in minutes else 0
            for number in range(present - NUM_MINUTES + 1, present + 1)
        ]
        share = now / _MINUTE_S - present  # of the present minute that is over; the rest is taken from the one before
        latency = LatencyHistogram()
        for minute in minutes.values():
            latency.add(minute.latency)
        return Traffic(
            requests_per_s=(counts[-1] + (1 - share) * counts[-2]) / _MINUTE_S,
            requests=sum(counts),
            errors=sum(minute.errors for minute in minutes.values()),
            by_minute=counts,
            p50_s=latency.quantile(0.5),
            p99_s=latency.quantile(0.99),
        )

    def keep(self, models: set[str]) -> None:
        """Forget all other models."""
        for model in self._minutes.keys() - models:
            del self._minutes[model]
