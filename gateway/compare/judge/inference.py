"""Conclusions from the grades of a judge and of people: agreement, and a difference that the judge's bias does not affect.

A judge may favor one arm, and its agreement with people does not show that: in simulations, a judge with kappa 0.6 that
preferred one arm in a tenth of the queries called that arm better in more than half of the comparisons of equal arms. So
people grade some randomly drawn queries, and their grades correct the estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from gateway.compare.judge.values import Figure, Grades
from gateway.comparisons.scale import MAX_GRADE

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
_NUM_GRADES = MAX_GRADE + 1


@dataclass(frozen=True, slots=True)
class Tested:
    """A mean over the queries, tested against 0 by Student's t.

    Attributes:
        p: the two-sided p.
        weight: the weight, from 0 to 1, of the judge's grades in a combined estimate.
    """

    figure: Figure
    p: float
    weight: float = 0.0


def mean_of(values: Sequence[float]) -> Tested:
    """Return the mean of one value per query; each is from -1 to 1.

    Raises:
        ValueError: there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        raise ValueError("there are no values to estimate a mean of")
    degrees = sample.size - 1
    return _t_test(float(sample.mean()), _variance(sample, 1) / sample.size if degrees else 0.0, degrees)


def corrected_difference(people: Mapping[str, float], judged: Mapping[str, float]) -> Tested:
    """Estimate the mean difference between two arms: people's on few queries, the judge's on all (PPI++).

    With H the m checked queries, R the other n - m, and d the difference of a query by people or by the judge::

        estimate = mean_H(d_people) - w * (mean_H(d_judge) - mean_R(d_judge))
        variance = var_H(d_people - w * d_judge) / m + w**2 * var_R(d_judge) / (n - m)
                   + (mean_H(d_judge) - mean_R(d_judge))**2 * var(w)
        w        = s * cov_H(d_people, d_judge) / var_H(d_judge), clipped to 0 to 1;  s = 1 / (1 + m / (n - m))
        var(w)   = s**2 * var_H(d_people - w * d_judge) / ((m - 1) * var_H(d_judge))

    (Angelopoulos, Duchi & Zrnic 2023, "PPI++", https://arxiv.org/abs/2311.01453.) A bias of the judge does not bias the
    estimate, because the judge's error is measured on H and subtracted. ``w`` is estimated from the same queries, as the
    slope of a regression. This adds the last term of the variance, which the paper omits because it vanishes with m, and
    leaves m - 2 degrees of freedom for Student's t.

    Args:
        people: difference of (arm - baseline) by checked query; at least 3, drawn at random from ``judged``.
        judged: the difference of every query by the judge's grades.

    Raises:
        ValueError: fewer than 3 queries were checked, or a checked query is not in ``judged``.
    """
    if len(people) < 3:
        raise ValueError(f"at least 3 queries must be checked, and {len(people)} are")
    if unknown := people.keys() - judged.keys():
        raise ValueError(f"{min(unknown)!r} was checked, and has no difference by the judge")
    theirs = np.array(list(people.values()))
    ours = np.array([judged[query] for query in people])
    rest = np.array([value for query, value in judged.items() if query not in people])
    num_people, num_rest, spread = len(theirs), len(rest), _variance(ours, 1)
    share = num_rest / (num_people + num_rest)
    weight = 0.0
    if num_rest > 1 and spread > 0:
        weight = min(1.0, max(0.0, share * float(np.cov(theirs, ours)[0, 1]) / spread))
    mean = float(theirs.mean())
    error = _variance(theirs - weight * ours, 2 if weight else 1)
    variance = error / num_people
    if weight:
        gap = float(ours.mean() - rest.mean())
        mean -= weight * gap
        variance += weight**2 * _variance(rest, 1) / num_rest + gap**2 * share**2 * error / ((num_people - 1) * spread)
    return _t_test(mean, variance, num_people - 2, weight)


def _variance(values: Floats, num_estimated: int) -> float:
    """Return the variance around the mean; ``num_estimated`` numbers were estimated from the values, the mean included."""
    return float(np.sum((values - values.mean()) ** 2) / (len(values) - num_estimated))


def _t_test(mean: float, variance: float, degrees: int, weight: float = 0.0) -> Tested:
    error = float(np.sqrt(variance))
    if error <= 0:
        is_shown = degrees > 0 and mean != 0
        return Tested(Figure(mean, mean, mean), 0.0 if is_shown else 1.0, weight)
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))
    p = 2 * float(stats.t.sf(abs(mean) / error, degrees))
    # A mean of differences between values from 0 to 1.
    return Tested(Figure(mean, max(-1.0, mean - half), min(1.0, mean + half)), p, weight)


def kappa(people: Grades, judged: Grades, num_resamples: int, seed: int) -> Figure:
    """Return Cohen's kappa with quadratic weights, and its 95 % interval by bootstrap over the queries.

    0 means no more agreement than by chance, 1 equal grades. Whole queries are drawn, since the documents of a query are not
    independent. If all grades are equal, kappa is undefined and counts as 0, because the agreement may be chance.

    Args:
        people, judged: grades by query and document; only pairs in both count.

    Raises:
        ValueError: no pair has both grades.
    """
    counts = np.array([_confusion(scores, judged.get(query, {})) for query, scores in people.items()], dtype=np.float64)
    counts = counts[counts.sum(axis=(1, 2)) > 0] if len(counts) else counts
    if not len(counts):
        raise ValueError("no document has a grade of people and of the judge")
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), num_resamples)
    resampled = _kappas(np.tensordot(drawn.astype(np.float64), counts, axes=1))
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(float(_kappas(counts.sum(axis=0)[np.newaxis])[0]), float(low), float(high))


def _confusion(people: Mapping[str, int], judged: Mapping[str, int]) -> list[list[int]]:
    table = [[0] * _NUM_GRADES for _ in range(_NUM_GRADES)]
    for document, grade in people.items():
        if document in judged:
            table[grade][judged[document]] += 1
    return table


def _kappas(tables: Floats) -> Floats:
    """Return kappa of each table of counts ``(n, 4, 4)``, by people's grade and the judge's."""
    distance = np.subtract.outer(np.arange(_NUM_GRADES), np.arange(_NUM_GRADES)) ** 2
    totals = tables.sum(axis=(1, 2))
    expected = np.einsum("na,nb->nab", tables.sum(axis=2), tables.sum(axis=1)) / totals[:, np.newaxis, np.newaxis]
    observed_distance = (tables * distance).sum(axis=(1, 2))
    expected_distance = (expected * distance).sum(axis=(1, 2))
    is_defined = expected_distance > 0
    ratio = np.divide(observed_distance, expected_distance, out=np.ones_like(totals), where=is_defined)
    kappas: Floats = 1 - ratio
    return kappas


def self_agreement(gradings: Sequence[Sequence[int]]) -> float:
    """Return the share of equal grades among any two gradings of the same pair; each pair was graded several times."""
    equal = total = 0
    for grades in gradings:
        for place, grade in enumerate(grades):
            for other in grades[place + 1 :]:
                equal += grade == other
                total += 1
    return equal / total if total else 1.0
