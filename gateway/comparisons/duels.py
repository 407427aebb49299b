"""Duels: the drawn pairs, the votes in order, and the result that follows from them. Pure."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, get_args

from pydantic import BaseModel

from gateway.comparisons.runs import Query
from gateway.errors import BadInput
from gateway.experiments.preference import THRESHOLD, Ballot, Preference, judge

TARGET: Final = 50
"""The requested number of votes: enough to find a preference of 70 %."""

MANY_VOTERS: Final = 15
"""With fewer voters, a result says for how many of them it holds."""

DEPTH: Final = 5
MAX_PAIRS: Final = 200
_REPEAT_EVERY: Final = 10
_MAX_TEXT: Final = 400
Choice = Literal["left", "right", "tie", "bad", "skip"]
CHOICES: Final[tuple[Choice, ...]] = get_args(Choice)


class Shown(BaseModel):
    """A document in one of the two lists."""

    document: str
    text: str


class Pair(BaseModel):
    """A query with the first documents of both arms."""

    query: str
    text: str
    baseline: Sequence[Shown]
    arm: Sequence[Shown]


class Turn(BaseModel):
    """One showing of a pair; every tenth turn repeats an earlier pair with the sides swapped."""

    pair: int
    is_swapped: bool
    is_repeat: bool


class Duel(BaseModel):
    """``duel.json``.

    Attributes:
        num_queries, num_different: number of queries in the comparison, and of queries whose first five documents
            differ.
        threshold: the evidence that decides: higher if several arms of the comparison can be set against one baseline, so
            that at most 5 % of comparisons of equal models find any preference.
    """

    baseline: str
    arm: str
    threshold: float = THRESHOLD
    created: str
    num_queries: int
    num_different: int
    pairs: Sequence[Pair]
    turns: Sequence[Turn]


class Vote(BaseModel):
    """A line of ``votes.jsonl``.

    Attributes:
        turn: index of the turn; ``None`` with ``undo`` or ``end``.
        preferred: name of the preferred arm; ``None`` for a tie, "both bad" and a skip.
        marked: documents that answer the query.
    """

    time: str
    voter: str
    turn: int | None = None
    query: str | None = None
    choice: Choice | None = None
    preferred: str | None = None
    marked: Sequence[str] = ()
    seconds: float | None = None
    undo: bool = False
    end: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """The result of the votes so far.

    Attributes:
        next_turn: the first turn that the voter has not seen; ``None`` at the end.
        consistent, repeated: number of repeated pairs with the same preference again, and of all repeated pairs.
        left: the preference for the left side among the decided votes.
        by_voter: the preference among voters, each with the arm that got more of their votes.
        voters: number of people with a vote that is not a skip.
    """

    preference: Preference
    num_ties: int
    num_bad: int
    num_skipped: int
    num_votes: int
    next_turn: int | None
    consistent: int
    repeated: int
    left: Preference
    by_voter: Preference
    voters: int
    is_ended: bool

    @property
    def is_general(self) -> bool:
        """Whether the votes show a preference beyond these voters.

        Votes of one person are not independent: five voters with different tastes find a preference between equals in
        one duel of seven. So many must vote, and the same test must show it with one vote for each of them.
        """
        preferred = self.preference.preferred
        return self.voters >= MANY_VOTERS and preferred is not None and self.by_voter.preferred is preferred


def draw(queries: Iterable[Query], baseline: str, arm: str, seed: int, num_arms: int = 2) -> Duel:
    """Return a duel over the queries whose first five documents differ, in random order, with random sides.

    Args:
        num_arms: number of arms of the comparison.

    Raises:
        BadInput: no query has such lists.
    """
    rng = random.Random(seed)  # noqa: S311  an order, not a secret
    pairs: list[Pair] = []
    num_queries = num_different = 0
    for query in queries:
        lists = [
            [Shown(document=hit.document, text=hit.text[:_MAX_TEXT]) for hit in query.rankings.get(name, ())[:DEPTH]]
            for name in (baseline, arm)
        ]
        num_queries += 1
        if [hit.document for hit in lists[0]] == [hit.document for hit in lists[1]]:
            continue
        num_different += 1
        pair = Pair(query=query.id, text=query.text[:_MAX_TEXT], baseline=lists[0], arm=lists[1])
        if len(pairs) < MAX_PAIRS:  # a sample of fixed size from a stream: Vitter's algorithm R
            pairs.append(pair)
        elif (place := rng.randrange(num_different)) < MAX_PAIRS:
            pairs[place] = pair
    if not pairs:
        raise BadInput(f"the first {DEPTH} documents of {baseline!r} and {arm!r} are the same for every query: no duel")
    rng.shuffle(pairs)
    return Duel(
        baseline=baseline,
        arm=arm,
        threshold=THRESHOLD * (num_arms - 1),
        created=now(),
        num_queries=num_queries,
        num_different=num_different,
        pairs=pairs,
        turns=list(_turns(len(pairs), rng)),
    )


def _turns(num_pairs: int, rng: random.Random) -> Iterator[Turn]:
    sides: list[bool] = []
    num_shown = 0
    while len(sides) < num_pairs:
        num_shown += 1
        if num_shown % _REPEAT_EVERY == 0:
            earlier = rng.randrange(len(sides))
            yield Turn(pair=earlier, is_swapped=not sides[earlier], is_repeat=True)
            continue
        sides.append(rng.random() < 0.5)
        yield Turn(pair=len(sides) - 1, is_swapped=sides[-1], is_repeat=False)


def stand(duel: Duel, votes: Sequence[Vote], voter: str) -> Standing:
    """Return the standing by the votes of all voters, with the next turn of one voter."""
    valid = _valid(votes)
    first = [vote for vote in valid if vote.turn is not None and not duel.turns[vote.turn].is_repeat]
    decided = [vote for vote in first if vote.preferred is not None]
    seen = {vote.turn for vote in valid if vote.voter == voter}
    is_ended = any(vote.end for vote in votes)
    by_pair = {(vote.voter, duel.turns[vote.turn].pair): vote for vote in first if vote.turn is not None}
    repeated = [
        (vote, by_pair.get((vote.voter, duel.turns[vote.turn].pair)))
        for vote in valid
        if vote.turn is not None and duel.turns[vote.turn].is_repeat
    ]
    both = [(again, before) for again, before in repeated if before is not None]
    return Standing(
        preference=judge(
            (Ballot.FIRST if vote.preferred == duel.baseline else Ballot.SECOND for vote in decided), duel.threshold
        ),
        num_ties=sum(vote.choice == "tie" for vote in first),
        num_bad=sum(vote.choice == "bad" for vote in first),
        num_skipped=sum(vote.choice == "skip" for vote in first),
        num_votes=sum(vote.choice != "skip" for vote in first),
        next_turn=None if is_ended else next((turn for turn in range(len(duel.turns)) if turn not in seen), None),
        consistent=sum(again.preferred == before.preferred for again, before in both),
        repeated=len(both),
        left=judge(Ballot.FIRST if vote.choice == "left" else Ballot.SECOND for vote in decided),
        by_voter=judge(_by_voter(duel, decided), duel.threshold),
        voters=len({vote.voter for vote in first if vote.choice != "skip"}),
        is_ended=is_ended,
    )


def _by_voter(duel: Duel, decided: Iterable[Vote]) -> Iterator[Ballot]:
    """Yield one ballot for each voter who prefers an arm more often than the other."""
    margins: defaultdict[str, int] = defaultdict(int)
    for vote in decided:
        margins[vote.voter] += 1 if vote.preferred == duel.baseline else -1
    yield from (Ballot.FIRST if margin > 0 else Ballot.SECOND for margin in margins.values() if margin)


def _valid(votes: Sequence[Vote]) -> list[Vote]:
    """Return the votes that count: the first vote of a voter for each turn, unless it was taken back."""
    # Index the votes: with many voters, a search through all votes for each voter would delay all requests.
    kept: dict[tuple[str, int], Vote] = {}
    turns: defaultdict[str, list[int]] = defaultdict(list)
    for vote in votes:
        mine = turns[vote.voter]
        if vote.undo:
            if mine:
                del kept[vote.voter, mine.pop()]
        elif vote.turn is not None and (vote.voter, vote.turn) not in kept:
            kept[vote.voter, vote.turn] = vote
            mine.append(vote.turn)
    return list(kept.values())


def sides(duel: Duel, turn: int) -> tuple[Sequence[Shown], Sequence[Shown]]:
    """Return the left and the right list of a turn."""
    pair = duel.pairs[duel.turns[turn].pair]
    return (pair.arm, pair.baseline) if duel.turns[turn].is_swapped else (pair.baseline, pair.arm)


def make_vote(
    duel: Duel, turn: int, choice: Choice, marked: Iterable[str], voter: str, seconds: float | None = None
) -> Vote:
    """Return a vote, with the arm that the choice prefers. Marks of texts that were not shown are left out."""
    left, right = (duel.arm, duel.baseline) if duel.turns[turn].is_swapped else (duel.baseline, duel.arm)
    shown = {text.document for side in sides(duel, turn) for text in side}
    return Vote(
        time=now(),
        voter=voter,
        turn=turn,
        query=duel.pairs[duel.turns[turn].pair].query,
        choice=choice,
        preferred={"left": left, "right": right}.get(choice),
        marked=sorted(shown & set(marked)),
        seconds=seconds,
    )


def verdict(duel: Duel, standing: Standing) -> str:
    """Return the result of a duel in a sentence."""
    preference = standing.preference
    if preference.preferred is None:
        voters = f" for {standing.voters} voters" if 1 < standing.voters < MANY_VOTERS else ""
        return f"Not decided: these votes do not distinguish {duel.arm} from {duel.baseline}{voters}"
    voters = f" for {standing.voters} voters" if standing.voters > 1 and not standing.is_general else ""
    if preference.preferred is Ballot.FIRST:
        return f"{duel.baseline} is preferred to {duel.arm}{voters}"
    return f"{duel.arm} is preferred to {duel.baseline}{voters}"


def now() -> str:
    """Return the current time as the files have it."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def qrels(duel: Duel, votes: Sequence[Vote]) -> str:
    """Return judgments as BEIR's ``qrels``: 1 for a text that was marked as an answer, 0 for the other shown texts.

    Only queries with a marked text or the vote "both bad" count, because a preference alone says nothing about a text. A
    text that any voter marked is an answer.
    """
    judged: dict[tuple[str, str], int] = {}
    for vote in _valid(votes):
        if vote.turn is None or not (vote.marked or vote.choice == "bad"):
            continue
        pair = duel.pairs[duel.turns[vote.turn].pair]
        for shown in (*pair.baseline, *pair.arm):
            key = (pair.query, shown.document)
            judged[key] = max(judged.get(key, 0), int(shown.document in vote.marked))
    rows = [f"{query}\t{document}\t{grade}\n" for (query, document), grade in judged.items()]
    return "query-id\tcorpus-id\tscore\n" + "".join(rows)
