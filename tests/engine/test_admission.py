"""The requests that a model accepts while others wait for it, and the time after which a refused client may retry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from gateway.engine.admission import Admission
from gateway.errors import Overloaded
from gateway.telemetry import metrics
from gateway.types import Priority
from tests.engine.scripted import Gate, MakeJob, StartBatcher, answer, raise_for, texts_of


@pytest.fixture
def admission() -> Admission:
    """A model that takes 100 texts or 1,000 tokens, and reads 50 tokens of a text."""
    return Admission("numbers", max_texts=100, max_tokens=1000, longest_text=50)


@pytest.fixture
def waiting() -> Iterator[ExitStack]:
    """Admitted requests that wait until the test ends."""
    with ExitStack() as stack:
        yield stack


def test_waiting_texts_are_counted_until_they_are_answered(admission: Admission, make_job: MakeJob) -> None:
    with admission.admit(make_job("1", "four")), admission.admit(make_job("12345678")):
        counted = admission.num_texts, admission.num_tokens

    assert counted == (3, 2 + 3 + 4)
    assert (admission.num_texts, admission.num_tokens) == (0, 0)


@pytest.mark.parametrize(("priority", "gauges"), [(Priority.NORMAL, (3, 9, 0)), (Priority.LOW, (0, 0, 3))], ids=str)
def test_waiting_texts_are_in_the_metrics_of_their_priority(
    admission: Admission, make_job: MakeJob, priority: Priority, gauges: tuple[int, int, int]
) -> None:
    def measured() -> tuple[float | None, ...]:
        names = ("gateway_queue_texts", "gateway_queue_tokens", "gateway_low_priority_queue_texts")
        return tuple(metrics.REGISTRY.get_sample_value(name, {"model": "numbers"}) or 0 for name in names)

    with admission.admit(replace(make_job("1", "four", "12345678"), priority=priority)):
        assert measured() == gauges

    assert measured() == (0, 0, 0)


def test_a_request_that_fails_is_no_longer_counted(admission: Admission, make_job: MakeJob) -> None:
    with pytest.raises(KeyError), admission.admit(make_job("1")):
        raise KeyError

    assert (admission.num_texts, admission.num_tokens) == (0, 0)


def test_a_long_text_counts_with_the_tokens_that_the_model_reads(admission: Admission, make_job: MakeJob) -> None:
    with admission.admit(make_job("x" * 10_000)):
        assert admission.num_tokens == 50


def test_a_query_counts_with_each_of_its_texts(admission: Admission, make_job: MakeJob) -> None:
    with admission.admit(replace(make_job("1234", "5678"), query="a query of 20 letters"[:20])):
        assert admission.num_tokens == 2 * (24 // 4 + 2)


@pytest.mark.parametrize(
    ("num_waiting", "num_texts", "is_taken"),
    [(60, 40, True), (60, 41, False)],
    ids=["as many as there is room for", "one more"],
)
def test_the_limit_of_texts(
    admission: Admission, waiting: ExitStack, make_job: MakeJob, num_waiting: int, num_texts: int, is_taken: bool
) -> None:
    waiting.enter_context(admission.admit(make_job(*texts_of(range(num_waiting)), caller="bulk")))
    job = make_job(*texts_of(range(num_texts)), caller="bulk")

    if is_taken:
        waiting.enter_context(admission.admit(job))
    else:
        with pytest.raises(Overloaded) as caught, admission.admit(job):
            pass
        assert caught.value.message == (
            "model 'numbers' is full: 60 texts (about 120 tokens) are waiting, this request has 41 (about 82); the limits "
            "are 100 texts and 1000 tokens"
        )
    assert admission.num_texts == (100 if is_taken else 60)


@pytest.mark.parametrize(("num_texts", "is_taken"), [(5, True), (6, False)])
def test_the_limit_of_tokens(
    admission: Admission, waiting: ExitStack, make_job: MakeJob, num_texts: int, is_taken: bool
) -> None:
    waiting.enter_context(admission.admit(make_job(*["x" * 1000] * 15, caller="bulk")))
    job = make_job(*["x" * 1000] * num_texts, caller="bulk")

    if is_taken:
        waiting.enter_context(admission.admit(job))
    else:
        with pytest.raises(Overloaded), admission.admit(job):
            pass


@pytest.mark.parametrize(
    ("num_texts", "caller", "is_taken"),
    [(32, "ann", True), (33, "ann", False), (1, "bulk", False)],
    ids=["a few of another caller", "many of another caller", "one of the same caller"],
)
def test_a_full_queue_has_room_for_a_newcomer(
    admission: Admission, waiting: ExitStack, make_job: MakeJob, num_texts: int, caller: str, is_taken: bool
) -> None:
    waiting.enter_context(admission.admit(make_job(*texts_of(range(100)), caller="bulk")))
    job = make_job(*texts_of(range(num_texts)), caller=caller)

    if is_taken:
        waiting.enter_context(admission.admit(job))
    else:
        with pytest.raises(Overloaded), admission.admit(job):
            pass


def test_newcomers_get_half_of_the_limit_together(admission: Admission, waiting: ExitStack, make_job: MakeJob) -> None:
    waiting.enter_context(admission.admit(make_job(*texts_of(range(100)), caller="bulk")))
    for caller in ("ann", "ben"):
        waiting.enter_context(admission.admit(make_job(*texts_of(range(25)), caller=caller)))

    with pytest.raises(Overloaded), admission.admit(make_job("one too many", caller="cid")):
        pass


def test_a_caller_is_a_newcomer_again_when_its_last_request_is_answered(
    admission: Admission, waiting: ExitStack, make_job: MakeJob
) -> None:
    first, second = ExitStack(), ExitStack()
    for stack in (first, second):
        stack.enter_context(admission.admit(make_job("1", caller="ann")))
    waiting.enter_context(admission.admit(make_job(*texts_of(range(98)), caller="ben")))

    first.close()
    with pytest.raises(Overloaded), admission.admit(make_job("1", "2", caller="ann")):
        pass
    second.close()

    with admission.admit(make_job("1", "2", "3", caller="ann")):
        assert admission.num_texts == 101


def test_a_model_that_does_nothing_takes_any_request(admission: Admission, make_job: MakeJob) -> None:
    with admission.admit(make_job(*["x" * 1000] * 500)):
        assert admission.num_texts == 500


# -------------------------------------------------------------------------------------------------------- retry-after


def retry_after(admission: Admission, make_job: MakeJob) -> int | None:
    """Return the ``Retry-After`` of a refused request while 100 texts of 2 tokens wait."""
    with admission.admit(make_job(*texts_of(range(10)) * 10, caller="bulk")):
        with pytest.raises(Overloaded) as caught, admission.admit(make_job("1", caller="bulk")):
            pass
        return caught.value.retry_after_s


@pytest.mark.parametrize(("tokens_per_s", "expected"), [(10**9, 1), (100, 2), (99, 3), (1, 120)])
def test_retry_after_is_the_time_that_the_waiting_texts_will_take(
    admission: Admission, make_job: MakeJob, tokens_per_s: int, expected: int
) -> None:
    admission.note_rate(2 * tokens_per_s, seconds=2.0)

    assert retry_after(admission, make_job) == expected


def test_retry_after_is_a_second_while_no_speed_is_known(admission: Admission, make_job: MakeJob) -> None:
    assert retry_after(admission, make_job) == 1


def test_the_newest_batch_counts_a_tenth_of_the_speed(admission: Admission, make_job: MakeJob) -> None:
    admission.note_rate(10, seconds=1.0)
    admission.note_rate(110, seconds=1.0)

    assert retry_after(admission, make_job) == 10  # 200 tokens at 20 per second


def test_a_batch_that_took_no_time_that_can_be_measured_does_no_harm(admission: Admission, make_job: MakeJob) -> None:
    admission.note_rate(10, seconds=0.0)

    assert retry_after(admission, make_job) == 1


async def test_a_failed_batch_says_nothing_about_the_speed(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate
) -> None:
    batcher = await start_batcher(max_queue_texts=40)
    encoder.on_forward = lambda _batch: time.sleep(0.2)
    await batcher.submit(make_job("1"))  # at most 5 tokens per second
    encoder.on_forward = raise_for(13, RuntimeError())
    await answer(batcher.submit(make_job("13")))
    encoder.on_forward = gate
    waiting = asyncio.create_task(batcher.submit(make_job(*texts_of(range(40)))))  # about 80 tokens
    await gate.reached()

    error = await answer(batcher.submit(make_job("1")))

    assert isinstance(error, Overloaded)
    assert error.retry_after_s is not None
    assert error.retry_after_s >= 16
    gate.open()
    await waiting
