"""Mix the results of two models into one list, and find out from the clicks which model people prefer.

    python examples/interleave.py sessions.jsonl

In your search, show `mix(first, second, 10, random.Random())`, where `first` and `second` are the ids that each model
finds, best first. Write a line of JSON for each session, in the order of time:

    {"user": "ada", "shown": [["doc-7", "first"], ["doc-2", "second"]], "clicked": ["doc-2"]}

Clicks on results of the first model are a vote for it. Only the first vote of each user counts, because a user's
sessions are not independent; without a user, each session counts.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

ENOUGH = 20.0
"""If two models are equal, at most one of 20 experiments ever reaches this evidence, however often you look."""


def mix(first: Sequence[str], second: Sequence[str], length: int, rng: random.Random) -> list[tuple[str, str]]:
    """Return up to ``length`` results of two rankings, each with the ranking that it comes from.

    The rankings take turns, in random order, and each adds its best result that is not shown yet (team draft: Radlinski,
    Kurup & Joachims 2008). Equal rankings therefore get equally many clicks, wherever people click. When one ranking has
    nothing left, the rest comes from the other and counts as `neither`; otherwise the longer ranking would get more clicks.
    """
    rankings = {"first": first, "second": second}
    shown: dict[str, str] = {}
    while len(shown) < length:
        turn: dict[str, str] = {}
        for name in rng.sample(list(rankings), 2):
            best = next((one for one in rankings[name] if one not in shown and one not in turn), None)
            if best is not None:
                turn[best] = name
        if len(turn) < 2:
            turn = {one: "neither" for one in (*first, *second) if one not in shown}
            shown |= islice(turn.items(), length - len(shown))
            break
        shown |= islice(turn.items(), length - len(shown))
    return list(shown.items())


def vote(shown: Iterable[tuple[str, str]], clicked: Iterable[str]) -> str | None:
    """Return the ranking with more clicked results; ``None`` for a tie. Results of ``neither`` do not count."""
    sources = dict(shown)
    clicks = [sources[one] for one in set(clicked) if one in sources]
    lead = clicks.count("first") - clicks.count("second")
    return None if lead == 0 else "first" if lead > 0 else "second"


def evidence(first: int, second: int) -> float:
    """Return the evidence of votes against a tie, as in a blind duel of the gateway."""
    log = math.lgamma(5 + first) + math.lgamma(5 + second) - math.lgamma(10 + first + second)
    log += math.lgamma(10) - 2 * math.lgamma(5)
    return math.exp(min(700.0, log + (first + second) * math.log(2)))


def conclude(votes: Iterable[str | None]) -> tuple[dict[str | None, int], float, str | None]:
    """Return the number of votes for each ranking, the most evidence so far, and the ranking that people prefer, if any."""
    counts: dict[str | None, int] = {"first": 0, "second": 0, None: 0}
    most, preferred = 1.0, None
    for one in votes:
        counts[one] += 1
        most = max(most, evidence(counts["first"], counts["second"]))
        if preferred is None and most >= ENOUGH:
            preferred = max(("first", "second"), key=lambda name: counts[name])
    return counts, most, preferred


def read_votes(lines: Iterable[str]) -> Iterable[str | None]:
    """Yield the vote of each session; of a user's sessions, only the first with a vote."""
    users = set()
    for line in filter(str.strip, lines):
        session = json.loads(line)
        found = vote(session["shown"], session["clicked"])
        user = session.get("user")
        if found is None or user is None or user not in users:
            yield found
        if found is not None:
            users.add(user)


def main() -> None:
    """Print the votes, and the conclusion."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/interleave.py sessions.jsonl")
    try:
        counts, most, preferred = conclude(read_votes(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        sys.exit(f"{sys.argv[1]} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(
            f"{sys.argv[1]}: each line must be a JSON object with `shown` and `clicked`, as in the example: {error!r}"
        )
    print(f"votes: {counts['first']} for the first, {counts['second']} for the second, {counts[None]} ties")
    print(f"evidence: {most:.3g}; {ENOUGH:g} is enough, at any look")
    print(
        f"people prefer the {preferred}"
        if preferred
        else "no preference so far: continue, or accept that people like both equally"
    )


if __name__ == "__main__":
    main()
