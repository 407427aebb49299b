"""The example that mixes two rankings: fair to both, robust to odd rankings, and its conclusion from a file."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from examples.interleave import conclude, evidence, mix, read_votes, vote
from gateway.experiments.preference import evidence as evidence_of_duels

EXAMPLE = Path(__file__).parents[1] / "examples" / "interleave.py"


def test_each_result_is_shown_once_in_the_order_of_its_ranking() -> None:
    for seed in range(200):
        shown = mix("abcdef", "bfagh", 6, random.Random(seed))
        names = [name for name, _ in shown]
        assert len(names) == len(set(names)) == 6
        assert abs(Counter(source for _, source in shown)["first"] - 3) <= 1
        mine = [name for name, source in shown if source == "first"]
        assert mine == sorted(mine)


def test_a_longer_ranking_gets_no_more_clicks() -> None:
    """The rest of it is shown, but counts for neither; however the lists overlap, both have as many results that count."""
    for seed in range(200):
        rng = random.Random(seed)
        first, second = (rng.sample("abcdefghijkl", rng.randrange(12)) for _ in range(2))
        shown = mix(first, second, 12, rng)
        counts = Counter(source for _, source in shown)
        assert counts["first"] == counts["second"]
        assert {name for name, _ in shown} == {*first, *second}
        assert vote(shown, {*first, *second}) is None


def test_every_position_belongs_to_each_ranking_equally_often() -> None:
    shown = [mix("abcd", "efgh", 5, random.Random(seed)) for seed in range(4_000)]
    for place in range(5):
        assert 0.46 < Counter(one[place][1] for one in shown)["first"] / len(shown) < 0.54


@pytest.mark.parametrize(
    ("first", "second", "length", "expected"),
    [("", "", 3, set()), ("ab", "", 3, {"a", "b"}), ("ab", "ab", 9, {"a", "b"}), ("abc", "def", 0, set())],
)
def test_short_and_equal_rankings(first: str, second: str, length: int, expected: set[str]) -> None:
    assert {name for name, _ in mix(first, second, length, random.Random(0))} == expected


def test_votes_are_the_clicks_and_the_evidence_is_that_of_duels() -> None:
    shown = [("a", "first"), ("b", "second"), ("c", "first")]
    assert [vote(shown, clicked) for clicked in ("", "a", "b", "ab", "abc", "x", "bb")] == [
        None, "first", "second", None, "first", None, "second"
    ]  # fmt: skip
    for votes in ((0, 0), (3, 9), (40, 11), (900, 3_000)):
        assert evidence(*votes) == pytest.approx(evidence_of_duels(*votes))


def test_a_preference_remains_and_users_vote_once() -> None:
    assert conclude(["second"] * 12 + ["first"] * 12)[2] == "second"
    session = {"user": "ada", "shown": [["a", "first"], ["b", "second"]], "clicked": ["a"]}
    lines = [json.dumps(session | change) for change in ({"clicked": []}, {}, {}, {"user": "bob"}, {"user": None})]
    assert list(read_votes([*lines, " "])) == [None, "first", "first", "first"]


def test_the_command_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    session = {"shown": [["a", "first"], ["b", "second"]], "clicked": ["b"]}
    path.write_text("\n".join(json.dumps(session) for _ in range(30)))
    good = subprocess.run([sys.executable, EXAMPLE, path], capture_output=True, text=True, check=True)
    assert good.stdout.startswith("votes: 0 for the first, 30 for the second, 0 ties\n")
    assert good.stdout.endswith("people prefer the second\n")
    path.write_text("[]")
    for name in (path, tmp_path / "nothing"):
        bad = subprocess.run([sys.executable, EXAMPLE, name], capture_output=True, text=True, check=False)
        assert (bad.returncode, bad.stderr.count("\n")) == (1, 1)
