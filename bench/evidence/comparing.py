"""Simulations of ``gateway compare``: verdicts and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench.evidence.registry import Case, Simulation
from bench.evidence.values import DRAWS, Values, latent
from gateway.compare.conclusions import conclude
from gateway.compare.dataset import Dataset
from gateway.compare.results import PRIMARY_MEASURE, Contrast, Verdict
from gateway.compare.search import Ranking
from gateway.compare.statistics import Design, contrast, with_verdicts

_NUM_RESAMPLES = 2_000  # a p of 0.05 is then off by 0.005, in both directions
_SIZES = (50, 100, 300, 1_000)
_WRONG = {Verdict.BETTER, Verdict.WORSE}


def conclusions(values: Values, groups: Sequence[int] | None = None, margin: float = 0.01) -> list[Contrast]:
    """Compare every arm with the first one, as the command does."""
    ids = [str(query) for query in range(values.shape[1])]
    named = {query: f"g{group}" for query, group in zip(ids, groups, strict=True)} if groups is not None else {}
    baseline, *others = (dict(zip(ids, arm, strict=True)) for arm in values.tolist())
    design = Design(_NUM_RESAMPLES, groups=named, num_arms=len(others))
    found = [
        contrast(str(place), "baseline", PRIMARY_MEASURE, arm, baseline, design) for place, arm in enumerate(others)
    ]
    return with_verdicts(found, margin)


def says_a_difference(kind: str, arms: int, queries: int, rng: np.random.Generator) -> bool:
    """Return whether any of several equal arms is called better or worse."""
    found = conclusions(DRAWS[kind](rng, arms, queries))
    return any(one.verdict in _WRONG for one in found)


def says_a_difference_at_any_size(kind: str, arms: int, rng: np.random.Generator) -> bool:
    """Return the same for a number of queries from 50 to 1,000, small ones as often as large ones."""
    return says_a_difference(kind, arms, round(float(np.exp(rng.uniform(np.log(50), np.log(1_000))))), rng)


def misses(kind: str, queries: int, rng: np.random.Generator) -> bool:
    """Return whether the interval, if one is given, misses the true difference, which is 0."""
    (found,) = conclusions(DRAWS[kind](rng, 2, queries))
    low, high = found.difference.low, found.difference.high
    return low is not None and high is not None and not low <= 0 <= high


def says_as_good(queries: int, worse_by: float, rng: np.random.Generator) -> bool:
    """Return whether an arm that is worse by exactly the margin is called as good, or not worse."""
    before, after = latent(rng, 2, queries, 0.8)
    (found,) = conclusions(np.array([before, after - worse_by]), margin=worse_by)
    return found.verdict in {Verdict.AS_GOOD, Verdict.NOT_WORSE}


def praises(queries: int, worse_by: float, gaining: float, gain: float, rng: np.random.Generator) -> bool:
    """Return whether an arm that is worse by the margin is called better, as good, or not worse.

    Args:
        gaining: the share of the queries in which it gains a little. In a few, it loses all.
    """
    kinds = rng.random(queries)
    losing = (gaining * gain + worse_by) / 0.8
    after = np.where(kinds < gaining, 0.8 + gain, np.where(kinds > 1 - losing, 0.0, 0.8))
    (found,) = conclusions(np.array([np.full(queries, 0.8), after]), margin=worse_by)
    return found.verdict in {Verdict.BETTER, Verdict.AS_GOOD, Verdict.NOT_WORSE}


def says_a_difference_of_groups(queries: int, topics: int, likeness: float, rng: np.random.Generator) -> bool:
    """Return whether equal arms are called different when their differences go with the topic of a query.

    Args:
        likeness: intraclass correlation of the differences.
    """
    # Topics of unequal size, as real ones.
    groups = rng.choice(topics, queries, p=(weights := rng.gamma(2, size=topics)) / weights.sum())
    of_topic, own = rng.normal(size=topics)[groups], rng.normal(size=queries)
    difference = 0.15 * (np.sqrt(likeness) * of_topic + np.sqrt(1 - likeness) * own)
    values = np.array([np.full(queries, 0.5), 0.5 + difference])
    return conclusions(values, groups.tolist())[0].verdict in _WRONG


def says_a_difference_of_failing_groups(queries: int, topics: int, rng: np.random.Generator) -> bool:
    """Return the same of an arm that gains a little in most topics, and fails in all queries of a few."""
    groups = rng.choice(topics, queries, p=(weights := rng.gamma(2, size=topics)) / weights.sum())
    fails = rng.random(topics) < 0.03
    after = np.where(fails[groups], 0.0, 0.8 + 0.03 * 0.8 / 0.97)
    return conclusions(np.array([np.full(queries, 0.8), after]), groups.tolist())[0].verdict in _WRONG


# ------------------------------------------------------------------------------------------------- unjudged documents

_NUM_RELEVANT, _POOL, _QUERIES = 8, 150, 200


def _rankings(rng: np.random.Generator, skills: Sequence[float]) -> list[Ranking]:
    """Rank 150 documents, of which the first eight are relevant, for 200 queries."""
    shared = rng.normal(size=(_QUERIES, _POOL))
    rankings: list[Ranking] = []
    for skill in skills:
        scores = 0.7 * shared + rng.normal(size=(_QUERIES, _POOL))
        scores[:, :_NUM_RELEVANT] += skill
        order = np.argsort(-scores, axis=1)[:, :100]
        rankings.append(
            {
                str(query): [(str(document), float(scores[query, document])) for document in order[query]]
                for query in range(_QUERIES)
            }
        )
    return rankings


def _judged(rankings: Sequence[Ranking], depth: int) -> Mapping[str, Mapping[str, int]]:
    """Judge the first documents of these rankings. A query with an empty pool gets no judgments."""
    return {
        query: {
            document: int(int(document) < _NUM_RELEVANT)
            for ranking in rankings
            for document, _ in ranking[query][:depth]
        }
        for query in rankings[0]
    }


def _verdict(rankings: Sequence[Ranking], judgments: Mapping[str, Mapping[str, int]]) -> Verdict | None:
    documents = {str(number): "" for number in range(_POOL)}
    dataset = Dataset(Path(), None, documents, dict.fromkeys(judgments, ""), judgments, 0, (), {}, frozenset())
    found = conclude({"a": rankings[0], "b": rankings[1]}, dataset, Design(_NUM_RESAMPLES))
    return next(one.verdict for one in found.contrasts if one.measure == PRIMARY_MEASURE)


def misjudges(advantage: float, pooled: int, rng: np.random.Generator) -> bool:
    """Return whether a verdict contradicts the truth when only the baseline's first documents were judged.

    Args:
        advantage: of the new arm: 0 is equal, so that better and worse are wrong; above 0, worse is wrong.
    """
    rankings = _rankings(rng, (1.5, 1.5 + advantage))
    verdict = _verdict(rankings, _judged(rankings[:1], pooled))
    return verdict is Verdict.WORSE or (advantage == 0 and verdict is Verdict.BETTER)


def finds(advantage: float, rng: np.random.Generator) -> bool:
    """Return whether a better arm is found when the first ten documents of both arms were judged."""
    rankings = _rankings(rng, (1.5, 1.5 + advantage))
    return _verdict(rankings, _judged(rankings, 10)) is Verdict.BETTER


SIMULATIONS = (
    Simulation(
        "verdict",
        "Two equal arms",
        "called better or worse",
        "<=",
        0.05,
        [
            Case(f"{queries:,} queries", kind, partial(says_a_difference, kind, 2, queries), 1_000, 150)
            for queries in _SIZES
            for kind in DRAWS
        ]
        + [
            Case("50 to 1,000 queries", kind, partial(says_a_difference_at_any_size, kind, 2), 2_000, 150)
            for kind in DRAWS
        ],
        "Fewer errors than promised come from ties (a verdict needs 15 queries that differ), and from the allowance for "
        "rare total losses that the queries do not contain.",
    ),
    Simulation(
        "arms",
        "Several equal arms",
        "any called better or worse",
        "<=",
        0.05,
        [
            Case(f"{arms} arms, {queries} queries", kind, partial(says_a_difference, kind, arms, queries), 300, 60)
            for arms in (3, 6)
            for queries in (50, 100, 300)
            for kind in DRAWS
        ]
        + [
            Case(f"{arms} arms, 50 to 1,000 queries", kind, partial(says_a_difference_at_any_size, kind, arms), 300, 60)
            for arms in (3, 6)
            for kind in DRAWS
        ],
    ),
    Simulation(
        "interval",
        "95 % intervals of the difference",
        "those that miss it",
        "<=",
        0.05,
        [
            Case(f"{queries:,} queries", kind, partial(misses, kind, queries), 1_000, 150)
            for queries in (20, *_SIZES)
            for kind in DRAWS
        ],
        "No interval is given if under 15 queries differ and most are tied.",
    ),
    Simulation(
        "margin",
        "An arm that is worse by exactly the margin",
        "called better, as good, or not worse",
        "<=",
        0.025,
        [
            Case(f"{queries:,} queries", f"worse by {worse_by:g}", partial(says_as_good, queries, worse_by), 1_000, 150)
            for queries in _SIZES
            for worse_by in (0.02, 0.05)
        ]
        + [
            Case(
                f"{queries:,} queries",
                f"worse by {worse_by:g}, gains in {gaining:.0%}, total losses in {losing}",
                partial(praises, queries, worse_by, gaining, gain),
                2_000,
                150,
            )
            for queries in _SIZES
            for worse_by, gaining, gain, losing in ((0.02, 0.1, 0.2, "5 %"), (0.01, 0.4, 0.02, "2.25 %"))
        ],
    ),
    Simulation(
        "groups",
        "Two equal arms on queries that depend on each other",
        "called better or worse",
        "<=",
        0.05,
        [
            Case(
                f"{queries} queries of {topics} topics",
                f"correlation {likeness:g}",
                partial(says_a_difference_of_groups, queries, topics, likeness),
                1_000,
                150,
            )
            for queries, topics in ((300, 30), (100, 20), (100, 50), (1_000, 100))
            for likeness in (0.1, 0.3)
        ]
        + [
            Case(
                f"{queries} queries of {topics} topics",
                "all lost in 3 % of the topics",
                partial(says_a_difference_of_failing_groups, queries, topics),
                1_000,
                150,
            )
            for queries, topics in ((300, 30), (100, 20), (100, 50), (1_000, 100))
        ],
    ),
    Simulation(
        "unjudged",
        "Only the baseline's documents are judged",
        "a verdict of the wrong sign",
        "<=",
        0.05,
        [
            Case(f"its first {pooled}", truth, partial(misjudges, advantage, pooled), 150, 12)
            for pooled in (10, 30)
            for truth, advantage in (("equal arms", 0.0), ("better arm", 0.3), ("much better arm", 0.8))
        ],
    ),
    Simulation(
        "judged",
        "Judged are the first ten documents of both arms",
        "the better arm found",
        ">=",
        0.8,
        [Case("200 queries", "better arm", partial(finds, 0.3), 150, 12)],
    ),
)
