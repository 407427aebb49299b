"""Simulations of ``gateway compare --judge``: a judge that is biased toward an arm, corrected by people."""

from __future__ import annotations

from functools import partial

import numpy as np

from bench.evidence.registry import Case, Simulation
from bench.judging import Judge, differences
from gateway.compare.judge.inference import corrected_difference
from gateway.compare.statistics import ALPHA

_JUDGES = (
    ("noisy in 50 % of the queries", Judge(0.5)),
    ("favors an arm in 10 %", Judge(0.2, 0.1)),
    ("favors an arm in 30 %", Judge(0.2, 0.3)),
)
_SIZES = ((100, 60), (300, 60), (600, 120))


def calls_equal_arms_different(judge: Judge, num_queries: int, num_checked: int, rng: np.random.Generator) -> bool:
    """Return whether a comparison of equally good arms shows a difference, corrected by people."""
    truth = differences(num_queries, 0.0, rng)
    judged = {str(query): float(value) for query, value in enumerate(judge.grade(truth, rng))}
    checked = rng.permutation(num_queries)[:num_checked]
    return corrected_difference({str(query): float(truth[query]) for query in checked}, judged).p < ALPHA


SIMULATIONS = (
    Simulation(
        "judge",
        "Judge, corrected by people",
        "equal arms called different",
        "<=",
        0.05,
        [
            Case(
                name,
                f"{num_queries} queries, {num_checked} checked",
                partial(calls_equal_arms_different, judge, num_queries, num_checked),
                2000,
                100,
            )
            for name, judge in _JUDGES
            for num_queries, num_checked in _SIZES
        ],
        "Without this correction, a judge that favors an arm in 10 % of 300 queries calls equal arms different in nine of "
        "ten comparisons (docs/judge.md).",
    ),
)
