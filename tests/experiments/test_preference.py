"""The evidence of votes, checked after each vote, keeps its error rate and finds real preferences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.experiments.preference import THRESHOLD, Ballot, evidence, interval, judge

NUM_DUELS, NUM_VOTES = 2_000, 500


def paths(share: float, seed: int, num_duels: int = NUM_DUELS, num_votes: int = NUM_VOTES) -> np.ndarray:
    """Return the votes for the first after each vote of each duel: ``(duels, votes)``."""
    votes = np.random.default_rng(seed).random((num_duels, num_votes)) < share
    return np.cumsum(votes, axis=1)


def evidence_of(firsts: np.ndarray) -> np.ndarray:
    """Return the evidence after each vote, by the table of all counts."""
    num_votes = firsts.shape[1]
    table = np.array(
        [[evidence(w, n - w) if w <= n else 0.0 for w in range(num_votes + 1)] for n in range(num_votes + 1)]
    )
    return table[np.arange(1, num_votes + 1), firsts]


def test_a_look_after_each_vote_finds_a_false_preference_in_at_most_5_percent() -> None:
    is_found = (evidence_of(paths(0.5, seed=1)) >= THRESHOLD).any(axis=1)
    assert 0.01 < is_found.mean() < 0.05  # some: a test that never errs would find nothing


def test_the_sign_test_would_err_six_times_as_often() -> None:
    firsts = paths(0.5, seed=1)
    n = np.arange(1, NUM_VOTES + 1)
    z = np.abs(2 * firsts - n) / np.sqrt(n)
    assert (z[:, 9:] > 1.96).any(axis=1).mean() > 0.25


@pytest.mark.parametrize(("share", "median"), [(0.8, 23), (0.7, 47), (0.65, 77)])
def test_a_preference_is_found_after_as_many_votes_as_documented(share: float, median: int) -> None:
    is_found = evidence_of(paths(share, seed=2, num_duels=600)) >= THRESHOLD
    needed = np.where(is_found.any(axis=1), is_found.argmax(axis=1) + 1, NUM_VOTES + 1)
    assert np.median(needed) == pytest.approx(median, rel=0.25)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_the_interval_holds_the_share_at_every_look(share: float) -> None:
    firsts = paths(share, seed=3, num_duels=300, num_votes=150)
    known = {(w, n - w): interval(w, n - w) for n in range(1, 151) for w in range(n + 1)}
    missed = [
        any(not known[int(w), n - int(w)][0] <= share <= known[int(w), n - int(w)][1] for n, w in enumerate(row, 1))
        for row in firsts
    ]
    assert np.mean(missed) <= 0.06


def test_the_interval_leaves_one_half_out_exactly_where_the_evidence_reaches_the_threshold() -> None:
    for n in range(1, 80):
        for w in range(n + 1):
            low, high = interval(w, n - w)
            assert (low <= 0.5 <= high) == (evidence(w, n - w) < THRESHOLD * (1 + 1e-9)) or math.isclose(
                evidence(w, n - w), THRESHOLD, rel_tol=1e-6
            )


def test_a_verdict_stays_after_the_threshold_was_reached() -> None:
    ballots = [Ballot.FIRST] * 14 + [Ballot.SECOND] * 14
    early, late = judge(ballots[:14]), judge(ballots)
    assert early.preferred is late.preferred is Ballot.FIRST
    assert late.evidence == early.evidence >= THRESHOLD
    assert late.low <= 0.5 <= late.high  # the interval is the present one


def test_without_votes_there_is_no_verdict() -> None:
    nothing = judge([])
    assert (nothing.low, nothing.high, nothing.share, nothing.preferred) == (0.0, 1.0, 0.5, None)
    assert nothing.evidence == 1


def test_each_side_counts_alike() -> None:
    one, other = judge([Ballot.FIRST] * 9 + [Ballot.SECOND]), judge([Ballot.SECOND] * 9 + [Ballot.FIRST])
    assert one.evidence == other.evidence
    assert one.low == pytest.approx(1 - other.high)
    assert judge([Ballot.SECOND] * 14).preferred is Ballot.SECOND


def test_thousands_of_votes_do_not_overflow() -> None:
    assert evidence(9_000, 1_000) > 1e300
    low, high = interval(9_000, 1_000)
    assert 0.88 < low < 0.9 < high < 0.92
