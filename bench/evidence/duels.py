"""Simulations of blind duels: votes that are evaluated one by one, on pairs and sides that the console draws."""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from bench.evidence.registry import Case, Simulation
from bench.voting import Voter, play, verdicts
from gateway.comparisons.duels import DEPTH, Vote, draw, stand
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


def finds_a_preference_between_equals(voter: Voter, num_pairs: int, rng: np.random.Generator) -> bool:
    """Return whether any look at a duel finds a preference, though both find an answer in half of the queries."""
    queries = _queries(num_pairs)
    relevant = {
        (query.id, f"{name}-{query.id}-0") for query in queries for name in (_BASELINE, _ARM) if rng.random() < 0.5
    }
    seed = int(rng.integers(2**32))
    duel = draw(queries, _BASELINE, _ARM, seed)
    return verdicts(duel, play(duel, relevant, voter, seed))[-1] is not None


def better_is_found(share: float, num_votes: int, rng: np.random.Generator) -> bool:
    """Return whether the second, which gets this share of the votes for either, is preferred by the last vote."""
    votes = rng.random(num_votes) < share
    return judge(Ballot.SECOND if vote else Ballot.FIRST for vote in votes).preferred is Ballot.SECOND


def interval_misses(share: float, num_votes: int, rng: np.random.Generator) -> bool:
    """Return whether the interval leaves the true share out after any vote."""
    firsts = np.cumsum(rng.random(num_votes) < share)
    return any(
        not low <= share <= high
        for low, high in (interval(int(first), num - int(first)) for num, first in enumerate(firsts, 1))
    )


def tastes_look_general(num_voters: int, num_votes: int, rng: np.random.Generator) -> bool:
    """Return whether any look reports a general preference of voters who have different tastes, but none in common.

    Evaluated after each fifth of the voters. The log-odds of their tastes have a standard deviation of one half.
    """
    duel = draw(_queries(num_votes + num_votes // 5), _BASELINE, _ARM, int(rng.integers(2**32)))
    turns = [number for number, turn in enumerate(duel.turns) if not turn.is_repeat][:num_votes]
    votes: list[Vote] = []
    for voter in range(num_voters):
        share = 1 / (1 + np.exp(-0.5 * rng.normal()))
        chosen = [_BASELINE if rng.random() < share else _ARM for _ in turns]
        votes += [
            Vote(time="", voter=f"voter {voter}", turn=turn, choice="left", preferred=name)
            for turn, name in zip(turns, chosen, strict=True)
        ]
        if (voter + 1) % max(1, num_voters // 5) == 0 and stand(duel, votes, "voter 0").is_general:
            return True
    return False


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
        "Evaluated after every vote. A sign test at 5 %, evaluated from the tenth vote on, finds a preference in more than "
        "a quarter of such duels within 500 votes.",
    ),
    Simulation(
        "tastes",
        "Blind duel of equals by several voters",
        "a preference reported as general",
        "<=",
        0.05,
        [
            Case(
                f"{num_voters} voters",
                f"{num_votes} votes each",
                partial(tastes_look_general, num_voters, num_votes),
                1_000,
                40,
            )
            for num_voters in (5, 15, 30, 60)
            for num_votes in (7, 40)
        ],
        "Each voter prefers one of the arms a little (standard deviation of the log-odds 0.5). All votes together find a "
        "preference in one of seven duels of five such voters with 40 votes each: then the result names their number.",
    ),
    Simulation(
        "preferred",
        "Blind duel with a better arm",
        "preferred by the last vote",
        ">=",
        0.8,
        [
            Case(f"{share:.0%} of {num} votes", "found", partial(better_is_found, share, num), 1_000, 100)
            for share, num in ((0.8, 50), (0.7, 100), (0.65, 200))
        ],
        "Votes for either arm; ties are additional.",
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
