"""The quality of rankings by judgments: all measures of all queries, from ``ir-measures``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ir_measures

from gateway.compare.results import MEASURES
from gateway.compare.search import Ranking, without_ties


def measure(
    rankings: Ranking, judgments: Mapping[str, Mapping[str, int]], measures: Sequence[str] = MEASURES
) -> Mapping[str, Mapping[str, float]]:
    """Return the value of each measure for every query that has a judgment, in the order of the judgments.

    A query without a ranking or without relevant documents counts as 0. Documents without a judgment count as irrelevant;
    Judged@10 is the share of judged documents among the first ten.
    """
    judged = {query: dict(scores) for query, scores in judgments.items() if scores}
    if not judged:
        return {}
    names = {ir_measures.parse_measure(name): name for name in measures}
    # Judged@10 divides by the length of the ranking.
    run = {query: dict(without_ties(rankings[query])) for query in judged if rankings.get(query)}
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(judged, 0.0) for name in measures}
    for found in ir_measures.iter_calc(names, judged, run):
        values[names[found.measure]][found.query_id] = float(found.value)
    return values
