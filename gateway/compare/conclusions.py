"""From rankings to conclusions: the measures of every query, and the contrast of every arm with the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gateway.compare.dataset import Dataset
from gateway.compare.quality import measure
from gateway.compare.results import JUDGED, PRIMARY_MEASURE, Contrast
from gateway.compare.search import Ranking
from gateway.compare.statistics import Design, contrast, with_verdicts
from gateway.compare.unjudged import are_judged_alike, condense, lists_only_relevant, with_condensed

Quality = Mapping[str, Mapping[str, float]]
"""Values by measure and query."""


@dataclass(frozen=True, slots=True)
class Conclusions:
    """The quality of all arms.

    Attributes:
        qualities: the quality of each arm; empty mappings without judgments.
        contrasts: for each arm except the baseline, all measures in order; empty without judgments.
        unlike: the arms whose first ten documents have more or fewer judgments than the baseline's.
    """

    qualities: Mapping[str, Quality]
    contrasts: list[Contrast]
    unlike: frozenset[str] = frozenset()


def conclude(rankings: Mapping[str, Ranking], dataset: Dataset, design: Design) -> Conclusions:
    """Measure the rankings, and compare each arm with the first."""
    qualities = {name: _measure(ranking, dataset) for name, ranking in rankings.items()}
    baseline, *others = qualities
    if not dataset.judgments:
        return Conclusions(qualities, [])
    contrasts = {name: _contrasts(qualities, name, design) for name in qualities[baseline]}
    unlike: frozenset[str] = frozenset()
    if JUDGED in qualities[baseline]:
        judged = {name: quality[JUDGED] for name, quality in qualities.items()}
        unlike = frozenset(arm for arm in others if not are_judged_alike(judged, arm, baseline))
    if unlike:
        condensed = {
            name: measure(condense(ranking, dataset.judgments), dataset.judgments, (PRIMARY_MEASURE,))
            for name, ranking in rankings.items()
        }
        of_condensed = _contrasts(condensed, PRIMARY_MEASURE, design)
        contrasts[PRIMARY_MEASURE] = with_condensed(contrasts[PRIMARY_MEASURE], of_condensed, unlike)
    ordered = [contrast for arm in others for found in contrasts.values() for contrast in found if contrast.arm == arm]
    return Conclusions(qualities, ordered, unlike)


def _measure(ranking: Ranking, dataset: Dataset) -> Quality:
    """Compute the measures that are informative on this data set: R@100 of 20 documents is always 1, for example."""
    found = measure(ranking, dataset.judgments)
    num_documents = len(dataset.documents)
    left_out = {name for name, depth in (("R@10", 10), ("R@100", 100)) if num_documents <= depth}
    if lists_only_relevant(dataset.judgments):
        left_out.add(JUDGED)
    return {name: values for name, values in found.items() if name not in left_out}


def _contrasts(qualities: Mapping[str, Quality], name: str, design: Design) -> list[Contrast]:
    baseline, *others = qualities
    design = replace(design, num_arms=len(others))
    found = [contrast(arm, baseline, name, qualities[arm][name], qualities[baseline][name], design) for arm in others]
    return with_verdicts(found, design.margin)
