"""Simulated blind duels on SciFact, for ``bench.scifact_judge``: a voter who knows the judgments, and errs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from bench.report import table
from bench.voting import Voter, play, verdicts
from gateway.comparisons.duels import Standing, draw, stand
from gateway.comparisons.runs import Query
from gateway.experiments.preference import Ballot

VOTER: Final = Voter(error=0.1)
NUM_DUELS: Final = 500


@dataclass(frozen=True, slots=True)
class Played:
    """A duel to its last pair.

    Attributes:
        num_shown, num_decided: showings and votes for either until the verdict; in all without one.
    """

    baseline: str
    arm: str
    standing: Standing
    num_shown: int
    num_decided: int

    @property
    def preferred(self) -> str | None:
        """The name of the preferred arm; ``None`` if nothing was decided."""
        names = {Ballot.FIRST: self.baseline, Ballot.SECOND: self.arm}
        return None if (preferred := self.standing.preference.preferred) is None else names[preferred]

    @property
    def lead(self) -> int:
        """By how many votes the arm leads."""
        return self.standing.preference.second - self.standing.preference.first


def hold(
    queries: Sequence[Query], baseline: str, arm: str, relevant: AbstractSet[tuple[str, str]], seed: int
) -> Played:
    """Draw a duel from a comparison as the console does, and have the voter vote on every pair."""
    duel = draw(queries, baseline, arm, seed)
    votes = play(duel, relevant, VOTER, seed)
    after = verdicts(duel, votes)
    num_shown = next((place for place, one in enumerate(after, 1) if one is not None), len(votes))
    decided = [vote for vote in votes[:num_shown] if vote.preferred is not None]
    num_decided = sum(vote.turn is not None and not duel.turns[vote.turn].is_repeat for vote in decided)
    return Played(baseline, arm, stand(duel, votes, "simulated"), num_shown, num_decided)


def first_row(played: Played) -> tuple[str, str, str, str]:
    """Return one duel as a row of the table of verdicts."""
    preference = played.standing.preference
    # The interval is that of the baseline's share.
    share = f"{1 - preference.share:.0%} ({1 - preference.high:.0%} to {1 - preference.low:.0%})"
    votes = f"{preference.first + preference.second} votes"
    verdict = (
        f"{played.preferred} preferred, after {played.num_decided} votes ({played.num_shown} pairs shown)"
        if played.preferred is not None
        else f"no preference ({played.num_shown} pairs shown)"
    )
    return "", "a blind duel", f"{share} of {votes}".replace("%", " %"), verdict


def many_rows(duels: Sequence[Played], difference: float) -> list[str]:
    """Return the counts of many duels as a row.

    Args:
        difference: of nDCG@10 by the judgments, arm less baseline; a duel should find its sign.
    """
    arm, baseline = duels[0].arm, duels[0].baseline
    over = [one for one in duels if one.preferred is not None]
    counts = [sum(one.preferred == name for one in duels) / len(duels) for name in (arm, baseline)]
    typical = (
        f"{statistics.median(one.num_decided for one in over):.0f} votes, "
        f"{statistics.median(one.num_shown for one in over):.0f} pairs"
        if over
        else "none was decided"
    )
    agreeing = sum(one.lead * difference > 0 for one in duels) / len(duels)
    return [arm, *map(_percent, (*counts, 1 - sum(counts))), typical, _percent(agreeing)]


def many_table(rows: Sequence[Sequence[str]]) -> str:
    """Return the table of ``many_rows``, with a sentence before it."""
    header = ("arm", "arm preferred", "baseline preferred", "not decided", "decided after (median)", "better one leads")
    return (
        f"{NUM_DUELS} such duels, each with other pairs, sides and errors ("
        f"{100 * VOTER.error:.0f} % of the votes are wrong); the better one has the higher nDCG@10 by SciFact's "
        f"judgments:\n\n{table(header, rows)}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
