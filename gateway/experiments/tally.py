"""The counts of the requests under one set of weights, as values that can be stored, and added to other counts.

Units are not part of them: exposures have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.experiments.arms import REQUESTS, TOTALS, ArmCounts, Generation
from gateway.experiments.units import UnitSums

_HISTOGRAMS = ("latency", "queue")


@dataclass(frozen=True, slots=True)
class Sums:
    """The sums of units.

    Attributes:
        units: their hashes, ``(n,)``, each once.
        columns: their sums, one row for each of the columns in :mod:`gateway.experiments.arms`.
    """

    units: NDArray[np.uint64]
    columns: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tally:
    """All counts, except those of units.

    Attributes:
        since: time when counting began, ISO 8601; ``None`` if nothing was counted.
        counts: by arm, kind and name: ``("b", "error", "overloaded")``. The arm of counts that belong to no arm is ``""``.
        sums: by arm.
    """

    since: str | None = None
    counts: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    sums: Mapping[str, Sums] = field(default_factory=dict)


def tally_of(generation: Generation) -> Tally:
    """Return the counts of a generation."""
    counts: dict[tuple[str, str, str], float] = {}
    for label, arm in generation.arms.items():
        counts |= {(label, "total", name): getattr(arm, name) for name in TOTALS}
        counts |= {(label, "error", code): num for code, num in arm.errors.items()}
        for name in _HISTOGRAMS:
            for bucket, num, num_cut in getattr(arm, name).buckets():
                counts[label, name, str(bucket)] = num
                counts[label, f"{name}_cut", str(bucket)] = num_cut
    counts |= {("", "uncounted", reason): num for reason, num in generation.uncounted.items()}
    counts |= {("", "source", name): source.requests for name, source in generation.sources.items()}
    sums = {
        label: Sums(arm.sums.units(), arm.sums.columns()) for label, arm in generation.arms.items() if len(arm.sums)
    }
    return Tally(generation.since, {key: num for key, num in counts.items() if num}, sums)


def add_tally(generation: Generation, tally: Tally) -> None:
    """Add counts to those of a generation."""
    for (label, kind, name), num in tally.counts.items():
        if kind == "uncounted":
            generation.uncounted[name] += int(num)
        elif kind == "source":
            generation.sources[name].requests += int(num)
        else:
            _add(generation.arms[label], kind, name, num)
    for label, sums in tally.sums.items():
        arm = generation.arms[label]
        if len(arm.sums):
            for unit, row in zip(sums.units.tolist(), sums.columns.T.tolist(), strict=True):
                arm.sums.add(unit, row)
        else:
            arm.sums = UnitSums.of(sums.units, sums.columns)
    for arm in generation.arms.values():
        has_units = len(arm.sums) and arm.requests > arm.random_requests
        arm.largest = int(arm.sums.columns()[REQUESTS].max()) if has_units else 0
    generation.since = min(tally.since or generation.since, generation.since)


def _add(arm: ArmCounts, kind: str, name: str, num: float) -> None:
    """Add one count to those of an arm. An unknown kind, of a later version, is left out."""
    if kind == "total" and name in TOTALS:
        setattr(arm, name, getattr(arm, name) + (num if name == "seconds" else int(num)))
    elif kind == "error":
        arm.errors[name] += int(num)
    elif kind in _HISTOGRAMS:
        getattr(arm, kind).add_bucket(int(name), num=int(num))
    elif kind.removesuffix("_cut") in _HISTOGRAMS:
        getattr(arm, kind.removesuffix("_cut")).add_bucket(int(name), num_cut=int(num))
