"""The simulated voter of duels votes as it is programmed to, on the pairs that the console draws."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from bench.scifact_duel import Played, first_row, hold, many_rows
from bench.voting import Voter, play, verdicts
from gateway.comparisons.duels import DEPTH, MAX_PAIRS, Choice, draw, stand
from gateway.comparisons.runs import Hit, Query
from gateway.experiments.preference import Ballot

NUM = 40


def query_of(number: int, *, is_same: bool = False) -> Query:
    """Return a query for which both find five other documents, or the same five."""
    lists = {
        name: [
            Hit(document=f"{'same' if is_same else name}{rank}", score=1.0, text="a text") for rank in range(DEPTH + 1)
        ]
        for name in ("old", "new")
    }
    return Query(id=f"q{number}", text=f"query {number}", rankings=lists)


QUERIES = [query_of(number) for number in range(NUM)]
NEW_IS_RIGHT = {(query.id, "new0") for query in QUERIES}


def votes_of(voter: Voter, left: int, right: int, num: int = 2_000) -> dict[Choice, float]:
    rng = random.Random(1)
    counts = Counter(voter.choose(left, right, rng) for _ in range(num))
    return {choice: count / num for choice, count in counts.items()}


@pytest.mark.parametrize(("left", "right", "vote"), [(2, 1, "left"), (0, 1, "right"), (1, 1, "tie"), (0, 0, "bad")])
def test_a_voter_who_never_errs_prefers_the_list_with_more(left: int, right: int, vote: str) -> None:
    assert votes_of(Voter(error=0.0), left, right) == {vote: 1.0}


def test_a_voter_errs_as_often_as_stated() -> None:
    voter = Voter(error=0.2)
    assert votes_of(voter, 2, 1) == pytest.approx({"left": 0.8, "right": 0.2}, abs=0.03)
    assert votes_of(voter, 1, 1) == pytest.approx({"tie": 0.8, "left": 0.1, "right": 0.1}, abs=0.03)
    assert votes_of(Voter(error=0.2, favors_left=0.5), 0, 1) == pytest.approx({"left": 0.6, "right": 0.4}, abs=0.03)


def test_it_prefers_the_right_one_on_either_side() -> None:
    duel = draw(QUERIES, "old", "new", 3)
    votes = play(duel, NEW_IS_RIGHT, Voter(error=0.0), 3)
    assert {vote.choice for vote in votes} == {"left", "right"}
    assert {vote.preferred for vote in votes} == {"new"}
    assert len(votes) == len(duel.turns) > NUM  # with the repeated ones


def test_the_verdict_after_each_vote_is_that_of_the_console() -> None:
    duel = draw(QUERIES, "old", "new", 3)
    votes = play(duel, NEW_IS_RIGHT, Voter(error=0.2), 3)
    after = verdicts(duel, votes)
    assert after == [stand(duel, votes[:end], "simulated").preference.preferred for end in range(1, len(votes) + 1)]
    assert after[0] is None
    assert after[-1] is Ballot.SECOND


def test_pairs_are_drawn_from_all_queries_whose_first_five_differ() -> None:
    many = [query_of(number, is_same=number % 3 == 0) for number in range(450)]
    duel = draw(many, "old", "new", 0)
    assert (duel.num_queries, duel.num_different, len(duel.pairs)) == (450, 300, MAX_PAIRS)
    assert all(pair.baseline[0].document == "old0" and len(pair.arm) == DEPTH for pair in duel.pairs)
    numbers = [int(pair.query[1:]) for pair in duel.pairs]
    assert len(set(numbers)) == MAX_PAIRS
    assert not [number for number in numbers if number % 3 == 0]
    assert sum(numbers) / len(numbers) == pytest.approx(225, abs=30)
    assert sum(turn.is_swapped for turn in duel.turns) / len(duel.turns) == pytest.approx(0.5, abs=0.1)
    assert [pair.query for pair in draw(many, "old", "new", 0).pairs] == [pair.query for pair in duel.pairs]
    assert [pair.query for pair in draw(many, "old", "new", 1).pairs] != [pair.query for pair in duel.pairs]


def test_many_duels_are_counted() -> None:
    duels = [hold(QUERIES, "old", "new", NEW_IS_RIGHT, seed) for seed in range(20)]
    assert all(10 <= one.num_decided <= one.num_shown for one in duels if one.preferred is not None)
    arm, for_arm, for_baseline, open_, typical, agreeing = many_rows(duels, 0.1)
    assert (arm, for_arm, for_baseline, open_, agreeing) == ("new", "100.0 %", "0.0 %", "0.0 %", "100.0 %")
    assert "votes" in typical
    assert many_rows(duels, -0.1)[-1] == "0.0 %"


def test_a_duel_is_a_row_with_the_share_of_the_arm() -> None:
    decided: Played = hold(QUERIES, "old", "new", NEW_IS_RIGHT, 0)
    _arm, _by, figures, verdict = first_row(decided)
    share = int(figures.split(" %")[0])
    assert share > 70
    assert f"of {NUM} votes" in figures
    assert verdict.startswith("new preferred, after")
    neither = hold(QUERIES, "old", "new", set(), 0)
    assert first_row(neither)[3] == f"no preference ({neither.num_shown} pairs shown)"
    assert many_rows([neither], 0.1)[4] == "none was decided"
