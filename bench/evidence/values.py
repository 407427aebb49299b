"""Values of queries for arms that are equally good, distributed as with real judgments.

Every draw is ``(arms, queries)`` values from 0 to 1. Arms resemble each other: a hard query is hard for all.

========  ==================================================================================================
single    one relevant document a query: 15 % zeros, 46 % ones, about half of the queries tied
binary    Success@1: four fifths tied
easy      nearly every query solved: seven eighths tied
multi     many relevant documents: nearly continuous, no ties
skew      gains in a tenth of the queries and total losses in a fortieth, which cancel out: seven eighths tied
slips     small gains in two fifths of the queries and total losses in a fiftieth, which cancel out, or the opposite
========  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int], Values]

_DISCOUNTED = 1 / np.log2(np.arange(2, 12))  # of ranks 1 to 10


def latent(rng: np.random.Generator, arms: int, queries: int, likeness: float) -> Values:
    """Return numbers that are uniform between 0 and 1, and correlated between the arms."""
    shared, own = rng.normal(size=(1, queries)), rng.normal(size=(arms, queries))
    found: Values = stats.norm.cdf(np.sqrt(likeness) * shared + np.sqrt(1 - likeness) * own)
    return found


def _ranked(uniform: Values, ones: float, zeros: float) -> Values:
    """Return nDCG@10 of one relevant document: rank 1 for the share ``ones``, beyond 10 for ``zeros``."""
    edges = np.concatenate(([ones], ones + (1 - ones - zeros) * np.cumsum(_shares())))
    places = np.searchsorted(edges, uniform)
    return np.append(_DISCOUNTED, 0.0)[np.minimum(places, 10)]


def _shares() -> Values:
    weights = 0.75 ** np.arange(9)
    found: Values = weights / weights.sum()
    return found


def single(rng: np.random.Generator, arms: int, queries: int) -> Values:
    """Draw nDCG@10 of queries with one relevant document."""
    return _ranked(latent(rng, arms, queries, 0.86), ones=0.46, zeros=0.15)


def binary(rng: np.random.Generator, arms: int, queries: int) -> Values:
    """Draw Success@1."""
    return (latent(rng, arms, queries, 0.87) < 0.55).astype(np.float64)


def easy(rng: np.random.Generator, arms: int, queries: int) -> Values:
    """Draw nDCG@10 of queries that nearly all models solve."""
    return _ranked(latent(rng, arms, queries, 0.86), ones=0.88, zeros=0.01)


def multi(rng: np.random.Generator, arms: int, queries: int) -> Values:
    """Draw nDCG@10 of queries with many relevant documents."""
    found: Values = stats.beta.ppf(latent(rng, arms, queries, 0.8), 2, 1.5)
    return found


def skew(rng: np.random.Generator, arms: int, queries: int) -> Values:
    """Draw a baseline, and arms that gain a little in a tenth of the queries and lose all in a fortieth."""
    kinds = rng.random((arms, queries))
    values = np.where(kinds < 0.1, 1.0, np.where(kinds > 0.975, 0.0, 0.8))
    values[0] = 0.8
    return values


def slips(rng: np.random.Generator, arms: int, queries: int) -> Values:
    """Draw a baseline, and arms that gain a little often and lose all in a fiftieth, or lose a little and gain all."""
    kinds = rng.random((arms, queries))
    values = np.where(kinds < 0.4, 0.84, np.where(kinds > 0.98, 0.0, 0.8))
    values[0] = 0.8
    return values if rng.random() < 0.5 else 1 - values


DRAWS: Mapping[str, Draw] = {
    "single": single,
    "binary": binary,
    "easy": easy,
    "multi": multi,
    "skew": skew,
    "slips": slips,
}
