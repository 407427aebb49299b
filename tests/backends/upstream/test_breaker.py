"""When a server gets requests, when it gets a trial, and which events do not matter."""

from __future__ import annotations

from gateway.backends.upstream.breaker import Breaker


def opened(pause_s: float = 10.0, now: float = 100.0) -> Breaker:
    breaker = Breaker(pause_s)
    breaker.open("broken", now)
    return breaker


def test_it_begins_closed_with_no_trial_due() -> None:
    breaker = Breaker(10.0)

    assert breaker.is_closed
    assert not breaker.is_trial_due(1e9)


def test_failed_requests_in_a_row_call_for_a_trial_and_never_open_it() -> None:
    breaker = Breaker(10.0)
    for _ in range(2):
        breaker.note_failure(is_grave=False)
    assert not breaker.is_trial_due(0.0)

    breaker.note_failure(is_grave=False)

    assert breaker.is_trial_due(0.0)  # at once
    for _ in range(1000):
        breaker.note_failure(is_grave=True)
    assert breaker.is_closed


def test_one_that_is_grave_calls_for_a_trial() -> None:
    breaker = Breaker(10.0)
    breaker.note_failure(is_grave=True)

    assert breaker.is_suspect
    assert breaker.is_trial_due(0.0)


def test_failures_count_only_in_a_row() -> None:
    breaker = Breaker(10.0)
    for _ in range(5):
        breaker.note_failure(is_grave=False)
        breaker.note_failure(is_grave=False)
        breaker.note_success()

    assert not breaker.is_suspect


def test_a_suspicion_is_not_lifted_by_other_clients_requests() -> None:
    breaker = Breaker(10.0)
    breaker.note_failure(is_grave=True)
    breaker.note_success()
    breaker.note_failure(is_grave=False)

    assert breaker.is_trial_due(0.0)


def test_a_trial_that_is_passed_lifts_it_and_the_next_one_waits_a_moment() -> None:
    breaker = Breaker(10.0)
    for _ in range(3):
        breaker.note_failure(is_grave=False)
    breaker.close(now=100.0)

    assert not breaker.is_suspect
    for _ in range(2):
        breaker.note_failure(is_grave=False)
    assert not breaker.is_suspect  # counted from the beginning
    breaker.note_failure(is_grave=False)
    assert not breaker.is_trial_due(100.9)  # a client must not cause it to be queried all the time
    assert breaker.is_trial_due(101.0)


def test_a_trial_that_has_shown_nothing_is_repeated_after_a_moment() -> None:
    breaker = Breaker(10.0)
    breaker.note_failure(is_grave=True)
    breaker.postpone(now=100.0)

    assert breaker.is_closed
    assert not breaker.is_trial_due(100.9)
    assert breaker.is_trial_due(101.0)


def test_an_open_one_is_tried_after_its_pause() -> None:
    breaker = opened(pause_s=10.0, now=100.0)

    assert not breaker.is_closed
    assert breaker.reason == "broken"
    assert not breaker.is_trial_due(107.9)
    assert breaker.is_trial_due(112.1)


def test_gateways_do_not_all_come_back_at_once() -> None:
    assert len({opened().is_trial_due(100 + tenths / 10) for tenths in (80, 120)}) == 2
    due = [next(tenths for tenths in range(200) if opened().is_trial_due(100 + tenths / 10)) for _ in range(50)]
    assert len(set(due)) > 1


def test_pauses_grow_to_a_minute_while_it_stays_open() -> None:
    breaker = opened(pause_s=10.0, now=0.0)
    longest = []
    for _ in range(8):
        breaker.open("still broken", now=0.0)
        longest.append(next(s for s in range(1000) if breaker.is_trial_due(float(s))))

    assert 16 <= longest[0] <= 24
    assert 32 <= longest[1] <= 48
    assert all(48 <= pause <= 72 for pause in longest[2:])
    assert breaker.reason == "still broken"


def test_a_pause_longer_than_a_minute_is_not_changed() -> None:
    breaker = opened(pause_s=300.0, now=0.0)
    breaker.open("still broken", now=0.0)

    assert not breaker.is_trial_due(239.0)
    assert breaker.is_trial_due(361.0)


def test_requests_that_were_on_their_way_when_it_opened_change_nothing() -> None:
    breaker = opened(pause_s=10.0, now=100.0)
    for _ in range(32):
        breaker.note_failure(is_grave=True)
    breaker.note_success()

    assert not breaker.is_closed  # only a trial lets it in
    assert breaker.is_trial_due(112.1)  # and it is due no later
    assert not breaker.is_suspect


def test_once_closed_the_pauses_are_short_again() -> None:
    breaker = opened(pause_s=10.0, now=0.0)
    breaker.open("still broken", now=0.0)
    breaker.close(now=0.0)
    breaker.open("broken", now=100.0)

    assert breaker.is_trial_due(112.1)


def test_a_held_server_is_tried_immediately_and_after_a_failure_waits_for_the_usual_pause() -> None:
    breaker = Breaker(10.0)
    breaker.open("broken", now=100.0)
    breaker.open("broken", now=200.0)

    breaker.hold("not checked yet")

    assert not breaker.is_closed
    assert breaker.is_trial_due(200.0)
    breaker.open("broken", now=300.0)
    assert not breaker.is_trial_due(307.9)  # 10 s, spread by a fifth
    assert breaker.is_trial_due(312.1)
