"""Simulations of blind duels: votes that are looked at one by one, on pairs and sides that the console draws."""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from bench.evidence.registry import Case, Simulation
from bench.voting import Voter, play, verdicts
from gateway.comparisons.duels import DEPTH, draw
from gateway.comparisons.runs import Hit, Query
from gateway.experiments.preference import Ballot, interval, judge

_BASELINE, _ARM = "baseline", "arm"
_VOTERS = (
    ("errs in 10 % of the votes", Voter(0.1)),
    ("errs in 30 %", Voter(0.3)),
    ("favors the left list in 30 %", Voter(0.1, 0.3)),
)


@cache
def _queries(num: int) -> tuple[Query, ...]:
    return tuple(
        Query(
            id=str(query),
            text="a query",
            rankings={
                name: [Hit(document=f"{name}-{query}-{rank}", score=1 - rank / 10, text="") for rank in range(DEPTH)]
                for name in (_BASELINE, _ARM)
            },
        )
        for query in range(num)
    )


def finds_a_preference_between_equals(voter: Voter, num_pairs: int, dice: np.random.Generator) -> bool:
    """Return whether any look at a duel finds a preference, though both find an answer in half of the queries."""
    queries = _queries(num_pairs)
    relevant = {
        (query.id, f"{name}-{query.id}-0") for query in queries for name in (_BASELINE, _ARM) if dice.random() < 0.5
    }
    seed = int(dice.integers(2**32))
    duel = draw(queries, _BASELINE, _ARM, seed)
    return verdicts(duel, play(duel, relevant, voter, seed))[-1] is not None


def better_is_found(share: float, num_votes: int, dice: np.random.Generator) -> bool:
    """Return whether the second, which gets this share of the votes for either, is preferred by the last vote."""
    votes = dice.random(num_votes) < share
    return judge(Ballot.SECOND if vote else Ballot.FIRST for vote in votes).preferred is Ballot.SECOND


def interval_misses(share: float, num_votes: int, dice: np.random.Generator) -> bool:
    """Return whether the interval leaves the true share out after any vote."""
    firsts = np.cumsum(dice.random(num_votes) < share)
    return any(
        not low <= share <= high
        for low, high in (interval(int(first), num - int(first)) for num, first in enumerate(firsts, 1))
    )


SIMULATIONS = (
    Simulation(
        "duel",
        "Blind duel of equals",
        "a preference at any look",
        "<=",
        0.05,
        [
            Case(name, f"{num} pairs", partial(finds_a_preference_between_equals, voter, num), 1_000, 40)
            for name, voter in _VOTERS
            for num in (50, 200)
        ],
        "Looked at after every vote. A sign test at 5 %, looked at from the tenth vote on, finds a preference in more than "
        "a quarter of such duels within 500 votes.",
    ),
    Simulation(
        "preferred",
        "Blind duel with a better one",
        "preferred by the last vote",
        ">=",
        0.8,
        [
            Case(f"{share:.0%} of {num} votes", "found", partial(better_is_found, share, num), 1_000, 100)
            for share, num in ((0.8, 50), (0.7, 100), (0.65, 200))
        ],
        "Votes for either: ties come on top.",
    ),
    Simulation(
        "share",
        "Interval of a duel",
        "the true share left out at any look",
        "<=",
        0.05,
        [
            Case(f"{share:.0%} of the votes", "100 votes", partial(interval_misses, share, 100), 1_000, 100)
            for share in (0.5, 0.7, 0.95)
        ],
    ),
)
