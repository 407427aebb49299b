"""Simulations, and how they are counted.

To add one, write a module with a tuple ``SIMULATIONS``, and add its name to ``MODULES`` in ``__main__``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Outcome = Callable[[np.random.Generator], bool]
"""Draws one comparison or experiment, and returns whether the counted event happened in it. A function of a module, or a
``functools.partial`` of one, since other processes call it."""

_RARE = 0.003  # of a few hundred cells, chance moves one as far


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of a table.

    Attributes:
        runs: how often to draw it for the documentation.
        quick: how often with ``--quick``.
    """

    row: str
    column: str
    outcome: Outcome
    runs: int
    quick: int


@dataclass(frozen=True, slots=True)
class Simulation:
    """A promise, and the cases in which it is tried.

    Attributes:
        name: for ``--only``.
        counted: the counted event, as a noun phrase.
        sense: whether the rate must be at most or at least ``promised``.
        notes: explanations for the reader, as sentences.
    """

    name: str
    title: str
    counted: str
    sense: Literal["<=", ">="]
    promised: float
    cases: Sequence[Case]
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Rate:
    """How often something happened in the runs of a case."""

    case: Case
    count: int
    runs: int

    @property
    def value(self) -> float:
        """The share of the runs."""
        return self.count / self.runs

    def is_kept(self, simulation: Simulation) -> bool:
        """Return whether the rate is not beyond the promise by more than chance explains."""
        coin = stats.binom(self.runs, simulation.promised)
        chance = coin.sf(self.count - 1) if simulation.sense == "<=" else coin.cdf(self.count)
        return bool(chance > _RARE)


def measure(simulation: Simulation, seed: int, *, is_quick: bool, workers: int) -> list[Rate]:
    """Count every case of a simulation. The same seed gives the same counts for any number of workers."""
    jobs = [
        _Job(place, case.outcome, (seed, zlib.crc32(f"{simulation.name}/{case.row}/{case.column}".encode())), runs)
        for place, case in enumerate(simulation.cases)
        for runs in _blocks(case.quick if is_quick else case.runs)
    ]
    counts, totals = [0] * len(simulation.cases), [0] * len(simulation.cases)
    for job, count in zip(jobs, _map(jobs, workers), strict=True):
        counts[job.place] += count
        totals[job.place] += len(job.runs)
    return [Rate(*found) for found in zip(simulation.cases, counts, totals, strict=True)]


@dataclass(frozen=True, slots=True)
class _Job:
    """Some runs of the case at a place."""

    place: int
    outcome: Outcome
    seed: tuple[int, int]
    runs: range

    def count(self) -> int:
        """Return in how many of the runs the outcome is true."""
        return sum(self.outcome(np.random.default_rng((*self.seed, run))) for run in self.runs)


def _blocks(runs: int, size: int = 50) -> list[range]:
    return [range(start, min(start + size, runs)) for start in range(0, runs, size)]


def _map(jobs: Sequence[_Job], workers: int) -> list[int]:
    if workers == 1:
        return [job.count() for job in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_Job.count, jobs))
