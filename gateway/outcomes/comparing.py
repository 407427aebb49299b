"""Compare the arms of an experiment by an outcome within each generation, and combine the differences. Pure.

Generations have different weights at different times. Adding up their units would compare weeks rather than arms
(Simpson's paradox), so the arms are compared within each generation, and the differences are weighted by their
precision. A unit in several generations is one unit: its contributions are added up before the variance is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gateway.experiments.sample_ratio import ArmCount, SampleRatio, check_sample_ratio, largest_log_e, num_tests_of
from gateway.experiments.sequence import LEAST_UNITS, Difference, Values, around, contributions, deviation, is_carried
from gateway.outcomes.joining import Branch, Exposures, Joined, Numbers
from gateway.outcomes.values import LEAST_FOR_RATIO, ArmValues, Per, adjust, most_chances, values_of

# The weight of a part is the inverse square of its spread, which overflows a float for much smaller spreads.
_LEAST_SPREAD = 1e-100


@dataclass(frozen=True, slots=True)
class ArmOutcome:
    """One arm by itself; see :class:`gateway.experiments.outcome_report.OutcomeArm`."""

    units: int
    units_with_outcome: int
    mean: float | None
    interval: Difference | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm against the control; see :class:`gateway.experiments.outcome_report.OutcomeComparison`.

    Attributes:
        difference: ``None`` with too few units.
        mismatch: the test of the first generation that has a sample ratio mismatch.
    """

    difference: Difference | None
    units: int
    num_generations: int
    uses_before: bool
    mismatch: SampleRatio | None


@dataclass(frozen=True, slots=True)
class _Part:
    """The contribution of one generation.

    Attributes:
        zeta: one number for each unit; their mean is the estimate.
        spread: their standard deviation.
    """

    unit: Numbers
    zeta: Values
    spread: float


def compare(joined: Joined, control: Branch, arm: Branch, per: Per, alpha: float) -> Comparison:
    """Compare an arm with the control.

    Args:
        control: the control as the registry has it now; generations in which it had another model or task are left out.
        alpha: the probability with which the interval may miss at any look.
    """
    parts: list[_Part] = []
    num_units, uses_before = 0, False
    most = most_chances(joined)
    mismatch = None
    generations = _generations(joined.exposures)
    for old, new in _pairs(joined.exposures.branches, control, arm):
        ratio = _ratio(joined.exposures, joined.exposures.branches[old].generation, generations)
        mismatch = mismatch or (ratio if ratio.mismatch else None)
        shares = [joined.exposures.branches[index].share for index in (old, new)]
        arms = [values_of(joined, joined.exposures.branch == index, per, most) for index in (old, new)]
        first, second, is_adjusted = adjust(*arms)
        num_units += len(first.unit) + len(second.unit)
        if min(map(len, (first.unit, second.unit))) < (LEAST_FOR_RATIO if per == "ratio" else 1):
            continue
        part = _difference(first, second, shares[1] / sum(shares))
        if part is not None:
            parts.append(part)
            uses_before |= is_adjusted
    precisions = [len(part.unit) / part.spread**2 for part in parts]
    combined, is_enough = _combine(parts, precisions, alpha) if parts else (None, False)
    difference = combined if is_enough else None
    return Comparison(difference, num_units, len(parts), uses_before, mismatch)


def describe(joined: Joined, arm: Branch, per: Per, alpha: float) -> ArmOutcome:
    """Describe one arm, with each generation weighted by the number of units in all of its arms."""
    branches, branch = joined.exposures.branches, joined.exposures.branch
    most = most_chances(joined)
    num_units, num_with, parts, weights = 0, 0, [], []
    for index in (index for index, other in enumerate(branches) if _is_same(other, arm)):
        is_in = branch == index
        values = values_of(joined, is_in, per, most)
        num_units += int(is_in.sum())
        num_with += int(((joined.of > 0) & is_in).sum())
        if len(values.unit):
            parts.append(_Part(values.unit, values.value, float(values.value.std())))
            same = [other for other, b in enumerate(branches) if b.generation == branches[index].generation]
            weights.append(float(np.isin(branch, same).sum()))
    if not parts:
        return ArmOutcome(num_units, num_with, None, None)
    mean, is_enough = _combine(parts, weights, alpha)
    is_enough &= mean.num >= LEAST_UNITS
    return ArmOutcome(num_units, num_with, mean.estimate, mean if is_enough else None)


def _pairs(branches: Sequence[Branch], control: Branch, arm: Branch) -> Iterator[tuple[int, int]]:
    """Yield the indices of the control and the arm in each generation that has both, with weights."""
    for old, branch in enumerate(branches):
        for new, other in enumerate(branches):
            is_pair = _is_same(branch, control) and _is_same(other, arm) and branch.generation == other.generation
            if is_pair and branch.share and other.share:
                yield old, new


def _is_same(branch: Branch, arm: Branch) -> bool:
    """Return whether a branch belongs to an arm: they have the same name, model and task."""
    return (branch.arm, branch.model, branch.task) == (arm.arm, arm.model, arm.task)


def _difference(control: ArmValues, new: ArmValues, share: float) -> _Part | None:
    zeta = contributions(control.value, new.value, share)
    if min(len(control.value), len(new.value)) < LEAST_UNITS or not np.ptp(zeta):
        return None
    spread = deviation(control.value, new.value, zeta, share)
    if spread < _LEAST_SPREAD:
        return None
    return _Part(np.concatenate([control.unit, new.unit]), zeta, spread)


def _combine(parts: Sequence[_Part], weights: Sequence[float], alpha: float) -> tuple[Difference, bool]:
    """Return the weighted mean of the parts' estimates with an interval, and whether enough units carry it."""
    total = sum(weights)
    estimate, unit, shifts = 0.0, [], []
    for part, weight in zip(parts, weights, strict=True):
        share = weight / total
        estimate += share * float(part.zeta.mean())
        spread = float(part.zeta.std())
        scale = share * (part.spread / spread if spread else 1.0) / len(part.zeta)
        unit.append(part.unit)
        shifts.append((part.zeta - part.zeta.mean()) * scale)
    units, place = np.unique(np.concatenate(unit), return_inverse=True)
    by_unit = np.bincount(place, np.concatenate(shifts)).astype(np.float64)
    spread = math.sqrt(float(by_unit @ by_unit) * len(units))
    return around(estimate, spread, len(units), alpha), is_carried(by_unit)


def _generations(exposures: Exposures) -> list[str]:
    """Return the generations that have units, in the order in which their first units arrived."""
    first = np.full(len(exposures.branches), np.inf)
    np.minimum.at(first, exposures.branch, exposures.time)
    began: dict[str, float] = {}
    for branch, time in zip(exposures.branches, first.tolist(), strict=True):
        began[branch.generation] = min(time, began.get(branch.generation, math.inf))
    return sorted((one for one, time in began.items() if time < math.inf), key=lambda one: (began[one], one))


def _ratio(exposures: Exposures, generation: str, generations: Sequence[str]) -> SampleRatio:
    """Test whether the units of a generation were split as its weights say, at any time during it."""
    number = generations.index(generation) + 1 if generation in generations else 1
    indices = [index for index, branch in enumerate(exposures.branches) if branch.generation == generation]
    arms = exposures.branch[np.isin(exposures.branch, indices)]
    counts = [
        ArmCount(exposures.branches[index].arm, int((arms == index).sum()), exposures.branches[index].share)
        for index in indices
    ]
    racing = [index for index in indices if exposures.branches[index].share]
    shares = np.array([exposures.branches[index].share for index in racing])
    weights = ", ".join(f"{exposures.branches[index].arm} {exposures.branches[index].share:.3g}" for index in racing)
    return check_sample_ratio(
        counts,
        largest_log_e([arms == index for index in racing], shares),
        num_tests=num_tests_of(number),
        note=f"under the shares {weights} (generation {generation})" if len(generations) > 1 else "",
    )
