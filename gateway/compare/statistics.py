"""Conclusions from the values of all queries: intervals, tests, and the verdict.

The queries are a sample of those that users will send. Differences between systems are tested by a paired randomization
test, as recommended by Smucker, Allan & Carterette 2007 (https://doi.org/10.1145/1321440.1321528).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from gateway.compare.results import PRIMARY_MEASURE, Contrast, Estimate, Verdict

MIN_QUERIES = 50
"""With fewer queries, their spread is so large that the verdict would depend on which of them were picked."""

ALPHA = 0.05
TIE = 1e-9
"""Values of a query that differ by no more than this are equal."""

# A batch of resamples is drawn as 8-byte indices and gathered as 8-byte values.
_MAX_BATCH_BYTES = 64 * 2**20


def estimate(values: Sequence[float] | npt.NDArray[np.float64], num_resamples: int, seed: int) -> Estimate:
    """Return the mean with the bounds of its 95 % bootstrap interval (BCa; Efron 1987).

    Equal values, or a single one, have an interval without width: resampling them changes nothing.

    Raises:
        ValueError: there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        raise ValueError("there are no values to estimate a mean of")
    mean = float(np.mean(sample))
    if np.ptp(sample) <= TIE:
        return Estimate(mean, mean, mean)
    bounds = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=num_resamples,
        batch=_batch(sample.size),
        vectorized=True,
        axis=-1,
        confidence_level=1 - ALPHA,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(bounds.low), float(bounds.high))


def randomization_p(differences: Sequence[float] | npt.NDArray[np.float64], num_resamples: int, seed: int) -> float:
    """Return the two-sided p of the paired randomization test: how often random signs make as large a mean.

    With few queries (``2 ** queries <= num_resamples``), every choice of signs is tried, and p is exact.
    """
    sample = np.asarray(differences, dtype=np.float64)
    if not np.any(np.abs(sample) > TIE):
        return 1.0
    if sample.size == 1:
        return 1.0  # both signs make as large a mean
    found = stats.permutation_test(
        (sample,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        axis=-1,
        n_resamples=num_resamples,
        batch=_batch(2 * sample.size),
        alternative="two-sided",
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _batch(size: int) -> int:
    return max(1, _MAX_BATCH_BYTES // (16 * size))


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p values of several tests (Holm 1979): the smallest times their number, and so on up to the largest.

    The result is in the order of ``ps``. No value is above 1, or below that of a smaller p.
    """
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


def contrast(
    arm: str,
    baseline: str,
    measure: str,
    arm_values: Mapping[str, float],
    baseline_values: Mapping[str, float],
    num_resamples: int,
    seed: int,
) -> Contrast:
    """Compare an arm with the baseline in one measure.

    ``p_holm`` equals ``p``, and the verdict is ``None``, until ``with_holm`` has seen all arms.

    Args:
        arm_values: value of the measure by query.
        baseline_values: the same of the same queries.

    Raises:
        ValueError: the queries are not the same.
    """
    if arm_values.keys() != baseline_values.keys():
        raise ValueError(f"{arm} and {baseline} have values of different queries, and cannot be compared in pairs")
    differences = np.array([arm_values[query] - value for query, value in baseline_values.items()], dtype=np.float64)
    wins, losses = int(np.sum(differences > TIE)), int(np.sum(differences < -TIE))
    p = randomization_p(differences, num_resamples, seed)
    return Contrast(
        arm=arm,
        baseline=baseline,
        measure=measure,
        difference=estimate(differences, num_resamples, seed),
        p=p,
        p_holm=p,
        wins=wins,
        ties=differences.size - wins - losses,
        losses=losses,
        verdict=None,
    )


def with_holm(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Correct p for the number of arms, and add the verdict if the measure is the primary one.

    Args:
        contrasts: of one measure, for every arm but the baseline.

    Raises:
        ValueError: the contrasts are of several measures.
    """
    if len({one.measure for one in contrasts}) > 1:
        raise ValueError("contrasts must be of one measure to be corrected together")
    corrected = [replace(one, p_holm=p) for one, p in zip(contrasts, holm([one.p for one in contrasts]), strict=True)]
    return [replace(one, verdict=_verdict(one)) if one.measure == PRIMARY_MEASURE else one for one in corrected]


def _verdict(one: Contrast) -> Verdict:
    if one.wins + one.ties + one.losses < MIN_QUERIES:
        return Verdict.TOO_FEW_QUERIES
    # The test and the interval can disagree in borderline cases; a verdict needs both.
    if one.p_holm < ALPHA and one.difference.low > 0:
        return Verdict.BETTER
    if one.p_holm < ALPHA and one.difference.high < 0:
        return Verdict.WORSE
    return Verdict.INCONCLUSIVE
