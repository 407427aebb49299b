"""The limits of a run by target, whether they held, and whether they still can. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loadtest.histogram import percentile
from loadtest.recorder import Tally

MAX_FAIL_RATIO: Final = 0.01
"""Of a target for which nothing else was asked."""

# A run is given up when the last seconds were far beyond a limit: the rest cannot make up for that.
HOPELESS_S: Final = 10
_HOPELESS_P95 = 4.0
_HOPELESS_FAILURES = 0.5
_MIN_REQUESTS = 10


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of one target; ``None`` for no limit."""

    p95_ms: float | None = None
    max_fail_ratio: float = MAX_FAIL_RATIO
    min_rps: float | None = None


def parse_limits(text: str, labels: Sequence[str], name: str) -> dict[str, float]:
    """Read a limit: one number for all targets, or ``LABEL=NUMBER,LABEL=NUMBER``.

    Raises:
        ValueError: a limit is not valid; the message gives the reason.
    """
    if not text:
        return {}
    limits: dict[str, float] = {}
    for part in text.split(","):
        label, equals, number = part.rpartition("=")
        if equals and label not in labels:
            raise ValueError(f"--{name}: there is no target {label!r}, only {', '.join(labels)}")
        try:
            limits.update(dict.fromkeys([label] if equals else labels, float(number)))
        except ValueError:
            raise ValueError(f"--{name}: {number!r} is not a number") from None
    return limits


def make_thresholds(labels: Sequence[str], p95_ms: str, max_fail_ratio: str, min_rps: str) -> dict[str, Thresholds]:
    """Return the thresholds of each target, from the command line's texts."""
    p95 = parse_limits(p95_ms, labels, "p95-ms")
    failures = parse_limits(max_fail_ratio, labels, "max-fail-ratio")
    rates = parse_limits(min_rps, labels, "min-rps")
    return {
        label: Thresholds(p95.get(label), failures.get(label, MAX_FAIL_RATIO), rates.get(label)) for label in labels
    }


def broken(tally: Tally, seconds: float, limits: Thresholds) -> list[str]:
    """Return the limits that a target exceeded over ``seconds`` of load."""
    found = []
    p95 = percentile(tally.latencies, 0.95)
    rps = tally.answered / seconds if seconds else 0.0
    if tally.answered + tally.failed == 0:
        found.append("no request came to an end")
    if tally.fail_ratio > limits.max_fail_ratio:
        causes = ", ".join(f"{count} x {cause}" for cause, count in tally.failures.most_common(3))
        found.append(f"{100 * tally.fail_ratio:.2f} % failed; the limit is {100 * limits.max_fail_ratio:g} %: {causes}")
    if limits.p95_ms is not None and p95 > limits.p95_ms:
        found.append(f"p95 was {p95:.0f} ms; the limit is {limits.p95_ms:g} ms")
    if limits.min_rps is not None and rps < limits.min_rps:
        found.append(f"{rps:.1f} requests/s; the limit is {limits.min_rps:g}")
    return found


def is_hopeless(recent: Tally, limits: Thresholds) -> bool:
    """Return whether the last :data:`HOPELESS_S` seconds of a target were so bad that the run can be stopped."""
    if recent.answered + recent.failed < _MIN_REQUESTS:
        return False
    if recent.fail_ratio > max(_HOPELESS_FAILURES, limits.max_fail_ratio):
        return True
    return limits.p95_ms is not None and percentile(recent.latencies, 0.95) > _HOPELESS_P95 * limits.p95_ms
