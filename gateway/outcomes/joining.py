"""Join outcomes with exposures: each outcome belongs to the arm that its unit was in at the time. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.experiments.sequence import Values

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Branch:
    """One arm under one set of weights.

    Attributes:
        task: ``None`` if the arm sets no task.
        share: the share of all units that the weights give to the arm.
    """

    generation: str
    arm: str
    model: str
    task: str | None
    share: float


@dataclass(frozen=True, slots=True)
class Changes:
    """When weights began to be served, in order.

    Attributes:
        time: ``(n,)``, in seconds since the epoch.
        generations: those that were served from these times on.
    """

    time: Values = field(default_factory=lambda: np.empty(0))
    generations: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Exposures:
    """Units in branches, in order of arrival, ``(n,)`` each.

    Attributes:
        unit: hash of the unit, as a signed 64-bit number.
        branch: index in ``branches``.
        time: time of the first request, in seconds since the epoch.
        changes: the known times at which the weights were changed.
    """

    branches: Sequence[Branch]
    unit: Numbers
    branch: Numbers
    time: Values
    changes: Changes = field(default_factory=Changes)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The outcomes of one name, ``(n,)`` each.

    Attributes:
        of: number of chances; 1 if not given.
        time: time of the outcome, in seconds since the epoch.
        is_before: whether the outcome is from before the unit entered the experiment.
    """

    unit: Numbers
    value: Values
    of: Values
    time: Values
    is_before: Flags


@dataclass(frozen=True, slots=True)
class Joined:
    """The outcomes of one name, summed up for each exposure, ``(n,)`` each.

    Attributes:
        value: 0 for a unit without outcomes.
        before: the unit's total from before it entered the experiment; NaN if unknown.
        before_of: the unit's chances in that time; NaN if unknown.
        num_unmatched: number of outcomes whose unit was in no arm at the time.
    """

    exposures: Exposures
    value: Values
    of: Values
    before: Values
    before_of: Values
    num_unmatched: int


def signed(unit: str) -> int:
    """Return a unit's hash of 16 hex digits as a signed number, as SQLite stores it."""
    return int.from_bytes(bytes.fromhex(unit), signed=True)


def join(exposures: Exposures, outcomes: Outcomes) -> Joined:
    """Sum up the outcomes of each exposure: those from its time on, while its unit is in its arm."""
    num = len(exposures.unit)
    after = ~outcomes.is_before
    owner = _owners(exposures, outcomes.unit[after], outcomes.time[after])
    is_matched = owner >= 0
    value, of = (
        np.bincount(owner[is_matched], numbers[after][is_matched], num).astype(np.float64)
        for numbers in (outcomes.value, outcomes.of)
    )
    before, before_of = (_sums_before(exposures, outcomes, numbers) for numbers in (outcomes.value, outcomes.of))
    return Joined(exposures, value, of, before, before_of, int((~is_matched).sum()))


def _owners(exposures: Exposures, unit: Numbers, time: Values) -> Numbers:
    """Return, for each outcome, the index of the exposure to the arm that its unit was in at that time; -1 without one.

    This is the unit's last exposure up to that time, unless earlier weights have come back: they bring the unit back into
    its earlier arm, and an exposure is recorded only once. Which weights were served at a time is taken from the last
    change of weights or first exposure of any unit. So if the changes are unknown, a return counts from the next new unit
    on. All replicas must serve the same weights.
    """
    owners = _last(exposures.unit, exposures.time, unit, time)
    changes = exposures.changes
    names = sorted({*changes.generations, *(branch.generation for branch in exposures.branches)})
    if len(names) < 2 or not len(exposures.unit):
        return owners
    generations = np.array([names.index(branch.generation) for branch in exposures.branches])[exposures.branch]
    seen_at = np.concatenate([changes.time, exposures.time])
    seen = np.concatenate([np.array([names.index(name) for name in changes.generations], np.int64), generations])
    order = np.argsort(seen_at, kind="stable")
    served = seen[order[np.searchsorted(seen_at[order], time, side="right") - 1]]
    _units, place = np.unique(np.concatenate([exposures.unit, unit]), return_inverse=True)
    pairs = place * len(names) + np.concatenate([generations, served])
    num = len(exposures.unit)
    again = _last(pairs[:num], exposures.time, pairs[num:], time)
    return np.where(again >= 0, again, owners)


def _last(exposed: Numbers, exposed_at: Values, unit: Numbers, time: Values) -> Numbers:
    """Return, for each outcome, the index of the last exposure of the same unit up to that time; -1 without one."""
    num = len(exposed)
    units, times = np.concatenate([exposed, unit]), np.concatenate([exposed_at, time])
    is_outcome = np.arange(len(units)) >= num
    order = np.lexsort((is_outcome, times, units))
    last = np.maximum.accumulate(np.where(is_outcome[order], -1, np.arange(len(order))))
    found = order[np.maximum(last, 0)]
    found = np.where((last >= 0) & (units[found] == units[order]), found, -1)
    owners = np.empty(len(order), np.int64)
    owners[order] = found
    return owners[num:]


def _sums_before(exposures: Exposures, outcomes: Outcomes, numbers: Values) -> Values:
    """Return the sum of each exposed unit's numbers from before the experiment; NaN for a unit without such numbers."""
    units, place = np.unique(outcomes.unit[outcomes.is_before], return_inverse=True)
    if not len(units):
        return np.full(len(exposures.unit), np.nan)
    sums = np.bincount(place, numbers[outcomes.is_before])
    at = np.minimum(np.searchsorted(units, exposures.unit), len(units) - 1)
    return np.where(units[at] == exposures.unit, sums[at], np.nan)
