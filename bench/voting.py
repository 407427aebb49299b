"""Simulated voters of blind duels: they know which documents are relevant, err with a stated chance, and may favor a side.

The pairs, the sides and the standing are those of the console (``gateway.comparisons.duels``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from gateway.comparisons.duels import Choice, Duel, Vote
from gateway.experiments.preference import Ballot, judge


@dataclass(frozen=True, slots=True)
class Voter:
    """Prefers the list with more relevant documents.

    Attributes:
        error: the chance to prefer the other list or, where both have as many, to prefer one by chance.
        favors_left: the chance to vote for the left list regardless of its documents.
    """

    error: float
    favors_left: float = 0.0

    def choose(self, left: int, right: int, rng: random.Random) -> Choice:
        """Return the vote on two lists with so many relevant documents: as many are a tie, and none "both bad"."""
        if rng.random() < self.favors_left:
            return "left"
        errs = rng.random() < self.error
        if left == right:
            if errs:
                return "left" if rng.random() < 0.5 else "right"
            return "tie" if left else "bad"
        return "left" if (left > right) is not errs else "right"


def play(duel: Duel, relevant: AbstractSet[tuple[str, str]], voter: Voter, seed: int) -> list[Vote]:
    """Return the votes on all showings of a duel.

    Args:
        relevant: pairs of the ids of a query and a document.
    """
    rng = random.Random(seed)  # noqa: S311  a simulation, not a secret
    votes = []
    for number, turn in enumerate(duel.turns):
        pair = duel.pairs[turn.pair]
        sides = [(duel.baseline, pair.baseline), (duel.arm, pair.arm)]
        (left, on_left), (right, on_right) = sides[::-1] if turn.is_swapped else sides
        counts = [sum((pair.query, one.document) in relevant for one in shown) for shown in (on_left, on_right)]
        choice = voter.choose(counts[0], counts[1], rng)
        preferred = {"left": left, "right": right}.get(choice)
        votes.append(
            Vote(time="", voter="simulated", turn=number, query=pair.query, choice=choice, preferred=preferred)
        )
    return votes


def verdicts(duel: Duel, votes: Sequence[Vote]) -> list[Ballot | None]:
    """Return the verdict after each vote of one voter: which one is preferred, ``None`` while nothing is decided."""
    ballots: list[Ballot] = []
    found: list[Ballot | None] = []
    for vote in votes:
        is_counted = vote.turn is not None and not duel.turns[vote.turn].is_repeat and vote.preferred is not None
        if is_counted:
            ballots.append(Ballot.FIRST if vote.preferred == duel.baseline else Ballot.SECOND)
        found.append(judge(ballots).preferred if is_counted else found[-1] if found else None)
    return found
