"""Find which of two models people prefer, from votes that arrive one by one: evidence, and an interval. Pure.

People look at a duel after every vote, and stop when they like what they see. A sign test at 5 % that is repeated from
the tenth vote on finds a preference in a third of the duels that have none. The e-process here may be checked at any
time (Ville's inequality; Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

THRESHOLD: Final = 20.0
"""The evidence that decides a duel. At most 5 % of the duels without a preference ever reach it."""

# The prior of the share of the votes: a beta distribution around one half, since two good models are close.
_PRIOR: Final = 5.0
_STEPS: Final = 60


class Ballot(Enum):
    """A vote that counts: for the first or for the second. Ties and "both bad" count for neither."""

    FIRST = "first"
    SECOND = "second"


@dataclass(frozen=True, slots=True)
class Preference:
    """The state of a duel.

    Attributes:
        first, second: votes for each.
        evidence: the largest evidence so far; at the threshold, the duel is decided.
        share: the share of the votes for the first; one half without votes.
        low, high: the ends of an interval for that share, which holds at any look.
        threshold: 20 for one comparison; 20 times their number for several with one baseline.
        preferred: the one that was ahead when the threshold was reached; ``None`` before.
    """

    first: int
    second: int
    evidence: float
    share: float
    low: float
    high: float
    threshold: float
    preferred: Ballot | None


def evidence(first: int, second: int) -> float:
    """Return the e-value of the votes against equal shares: ``B(5 + w, 5 + l) / B(5, 5) * 2**(w + l)``."""
    return math.exp(min(700.0, _log_mixture(first, second) + (first + second) * math.log(2)))


def judge(ballots: Iterable[Ballot], threshold: float = THRESHOLD) -> Preference:
    """Return the preference after the votes, taken in order."""
    counts = {Ballot.FIRST: 0, Ballot.SECOND: 0}
    largest, preferred = 1.0, None
    for ballot in ballots:
        counts[ballot] += 1
        largest = max(largest, evidence(counts[Ballot.FIRST], counts[Ballot.SECOND]))
        if preferred is None and largest >= threshold:
            preferred = max(Ballot, key=lambda one: counts[one])
    first, second = counts[Ballot.FIRST], counts[Ballot.SECOND]
    low, high = interval(first, second, threshold)
    share = first / (first + second) if first + second else 0.5
    return Preference(first, second, largest, share, low, high, threshold, preferred)


def interval(first: int, second: int, threshold: float = THRESHOLD) -> tuple[float, float]:
    """Return the interval of shares that the votes do not contradict: evidence against them is below the threshold.

    These are all p with ``B(5 + w, 5 + l) / B(5, 5) / (p**w * (1 - p)**l) < threshold``. They form an interval because
    the likelihood has one maximum.
    """
    limit = _log_mixture(first, second) - math.log(threshold)

    def is_possible(p: float) -> bool:
        likelihood = (first * math.log(p) if first else 0.0) + (second * math.log1p(-p) if second else 0.0)
        return likelihood > limit

    best = first / (first + second) if first + second else 0.5
    inside = min(max(best, 1e-12), 1 - 1e-12)

    def end(outside: float) -> float:
        near, far = inside, outside
        for _ in range(_STEPS):
            middle = (near + far) / 2
            if middle in (0.0, 1.0) or is_possible(middle):
                near = middle
            else:
                far = middle
        return near

    low = end(0.0) if first else 0.0
    high = end(1.0) if second else 1.0
    return low, high


def _log_mixture(first: int, second: int) -> float:
    """Return the logarithm of the probability of the votes, in their order, under the prior."""
    return _log_beta(_PRIOR + first, _PRIOR + second) - _log_beta(_PRIOR, _PRIOR)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
