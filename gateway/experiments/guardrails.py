"""Guardrails: whether an arm is slower or fails more often than the control, by unit, valid at any look."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gateway.experiments.arms import LOG_CHARACTERS, LOG_SECONDS, REQUESTS, SERVER_ERRORS, TIMED, ArmCounts
from gateway.experiments.report import Guardrail
from gateway.experiments.sequence import LEAST_UNITS, Difference, Values, difference

_NUM_METRICS = 2  # latency and errors


def guardrails(arm: str, control: ArmCounts, new: ArmCounts, share: float, alpha: float) -> Iterator[Guardrail]:
    """Yield the difference of an arm from the control in latency and in errors.

    A unit counts once, however many requests it sends. Requests of one unit resemble each other, and if each request
    counted, a few heavy users would decide.

    Args:
        share: the planned share of the arm in the units of both arms.
        alpha: the probability with which any of the intervals may miss at any look.
    """
    alpha /= _NUM_METRICS
    old_sums, new_sums = control.sums.columns(), new.sums.columns()
    by_work = _at_equal_work(old_sums, new_sums)
    latency = difference(*by_work, share, alpha)
    errors = difference(_error_rates(old_sums), _error_rates(new_sums), share, alpha)
    ratios = None if latency is None else [math.exp(log) for log in (latency.estimate, latency.low, latency.high)]
    yield _guardrail("latency", arm, latency, ratios, sum(map(len, by_work)))
    points = None if errors is None else [errors.estimate, errors.low, errors.high]
    yield _guardrail("errors", arm, errors, points, old_sums.shape[1] + new_sums.shape[1])


def _guardrail(
    metric: str, arm: str, found: Difference | None, figures: list[float] | None, num_units: int
) -> Guardrail:
    verdict = "not yet"
    if found is not None:
        verdict = "worse" if found.low > 0 else "better" if found.high < 0 else "no difference found"
    estimate, low, high = figures or (None, None, None)
    return Guardrail.model_validate(
        {
            "metric": metric,
            "arm": arm,
            "estimate": estimate,
            "low": low,
            "high": high,
            "units": num_units,
            "least_units": LEAST_UNITS,
            "verdict": verdict,
        }
    )


def _error_rates(sums: Values) -> Values:
    return np.asarray(sums[SERVER_ERRORS] / sums[REQUESTS])


def _at_equal_work(old_sums: Values, new_sums: Values) -> tuple[Values, Values]:
    """Return the mean logarithm of each unit's seconds, corrected for the mean logarithm of its characters.

    A unit with longer texts waits longer in either arm. The slope is estimated within the arms, so the correction
    removes no difference between them.
    """
    seconds, characters = [], []
    for sums in (old_sums, new_sums):
        timed = sums[:, sums[TIMED] > 0]
        seconds.append(timed[LOG_SECONDS] / timed[TIMED])
        characters.append(timed[LOG_CHARACTERS] / timed[TIMED])
    if not all(map(len, seconds)):
        return seconds[0], seconds[1]
    centered = np.concatenate([values - values.mean() for values in characters])
    variance = float(centered @ centered)
    slope = float(centered @ np.concatenate([v - v.mean() for v in seconds])) / variance if variance else 0.0
    center = np.concatenate(characters).mean()
    old, new = (y - slope * (x - center) for y, x in zip(seconds, characters, strict=True))
    return old, new
