"""The pairs that a judge grades: the first documents of every arm, without a hint of the arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from gateway.compare.judge.values import DEPTH, Grades, Pair
from gateway.compare.search import Ranking
from gateway.comparisons.scale import NUM_CHECKED

Item = TypeVar("Item")

_REPEATED_SHARE = 0.1
_MIN_REPEATED = 30


def make_pool(rankings: Mapping[str, Ranking], seed: int) -> list[Pair]:
    """Return the first ten documents of every arm for every query, each pair once, in random order.

    Args:
        rankings: the rankings of every arm.
    """
    queries = next(iter(rankings.values()))
    pairs = {
        Pair(query, document)
        for query in queries
        for ranking in rankings.values()
        for document, _score in ranking[query][:DEPTH]
    }
    # Sorted, so that the order depends on the pairs and not on the arms.
    return _shuffled(sorted(pairs, key=lambda pair: (pair.query, pair.document)), seed)


def draw_repeated(pool: Sequence[Pair], seed: int) -> list[Pair]:
    """Return the pairs to grade again: a tenth of the pool, but at least 30 if it has that many."""
    number = max(_MIN_REPEATED, round(_REPEATED_SHARE * len(pool)))
    return _shuffled(pool, seed + 1)[:number]


def draw_checked(queries: Sequence[str], groups: Mapping[str, str], seed: int) -> list[str]:
    """Return the queries for people to check, in random order; they depend only on the queries and the seed.

    Of each group of dependent queries, one is drawn, and more only if there are not enough others.

    Args:
        groups: the group of each query that depends on others.
    """
    turns: dict[str, int] = {}
    rounds: dict[str, int] = {}
    for query in _shuffled(sorted(queries), seed + 2):
        group = unit_of(query, groups)
        rounds[query] = turns.get(group, 0)
        turns[group] = rounds[query] + 1
    return sorted(rounds, key=lambda query: rounds[query])[:NUM_CHECKED]


def unit_of(query: str, groups: Mapping[str, str]) -> str:
    """Return a unique name for the group of a query, or for the query itself."""
    return f"group {groups[query]}" if query in groups else f"query {query}"


def first_documents(rankings: Ranking, grades: Grades) -> dict[str, list[tuple[str, float]]]:
    """Return the first ten documents of each graded query, without the ungraded documents.

    An unjudged document counts neither for nor against an arm: the next one moves up (Sakai 2007, condensed lists).
    """
    return {
        query: [hit for hit in rankings[query][:DEPTH] if hit[0] in scores]
        for query, scores in grades.items()
        if query in rankings
    }


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    return [items[place] for place in np.random.default_rng(seed).permutation(len(items))]
