"""Find the highest rate that a target sustains: up in steps until it breaks, then in between. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from loadtest.histogram import percentile
from loadtest.recorder import Tally

GROWTH: Final = 2.0
"""Each rate is so many times the one before, until one is not sustained."""

PRECISION: Final = 1.1
"""The search ends when the lowest rate that broke is at most so many times the highest that did not."""

_MIN_ACHIEVED: Final = 0.95
_MIN_REQUESTS: Final = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """The highest sustained rate.

    Attributes:
        p95_ms: the 95th percentile of latencies, from when a request was to be sent.
        fail_ratio: the share of failures.
    """

    p95_ms: float = 250.0
    fail_ratio: float = 0.01


@dataclass(frozen=True, slots=True)
class Step:
    """A tested rate, in turns per second, and its result.

    Attributes:
        broken_by: empty when the rate was sustained.
    """

    rate: int
    seconds: float
    tally: Tally
    broken_by: str


def judge(tally: Tally, limits: Limits) -> str:
    """Return the limit that a load broke; empty if it was sustained."""
    p95 = percentile(tally.latencies, 0.95)
    ended = tally.answered + tally.failed
    if tally.fail_ratio > limits.fail_ratio:
        cause, _ = tally.failures.most_common(1)[0]
        return f"{100 * tally.fail_ratio:.1f} % failed, most of them by {cause}"
    if ended < _MIN_ACHIEVED * tally.offered and tally.offered >= _MIN_REQUESTS:
        return f"{ended} of {tally.offered} requests came to an end"
    if p95 > limits.p95_ms:
        return f"p95 of {p95:.0f} ms"
    return "" if tally.answered else "no answer"


@dataclass(slots=True)
class Search:
    """The rates to try on one target.

    Attributes:
        rate: the one to try now; ``None`` when the knee is found.
        steps: those that were tried.
    """

    first: int
    limits: Limits
    rate: int | None = None
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rate = self.first

    def note(self, seconds: float, tally: Tally) -> None:
        """Record the result of the current rate, and choose the next."""
        assert self.rate is not None  # noqa: S101  not called after the end
        self.steps.append(Step(self.rate, seconds, tally, judge(tally, self.limits)))
        low, high = self.sustained, self.broken
        if high is None:
            self.rate = max(self.rate + 1, round(self.rate * GROWTH))
        elif low is None:
            self.rate = high.rate // 2 or None
        elif high.rate <= max(low.rate * PRECISION, low.rate + 1):
            self.rate = None
        else:
            self.rate = max(low.rate + 1, min(high.rate - 1, round((low.rate * high.rate) ** 0.5)))

    @property
    def sustained(self) -> Step | None:
        """The highest rate below each that broke."""
        broken = self.broken
        fine = [step for step in self.steps if not step.broken_by and (broken is None or step.rate < broken.rate)]
        return max(fine, key=lambda step: step.rate, default=None)

    @property
    def broken(self) -> Step | None:
        """The lowest rate that broke."""
        return min((step for step in self.steps if step.broken_by), key=lambda step: step.rate, default=None)
