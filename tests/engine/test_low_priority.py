"""Low-priority work waits for all other work, and no other work waits for more than a small batch of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine.admission import Admission
from gateway.engine.batch_queue import BatchQueue
from gateway.engine.model.items import Item, Tokens
from gateway.engine.model.tokenizer import Steps
from gateway.engine.scheduler import Lanes, RequestHandle, TokenSequence, Waiter
from gateway.engine.tokenizer_pool import TokenizerPool
from gateway.errors import DeadlineExceeded, Overloaded
from gateway.types import EmbedJob, Priority
from tests.engine.scripted import PATIENCE_S, Gate, MakeJob, NumberEncoder, StartBatcher, answer, becomes, texts_of


def handle(priority: Priority = Priority.LOW, caller: str = "someone") -> RequestHandle:
    return RequestHandle(caller, math.inf, priority=priority)


def waiters(owner: RequestHandle, sizes: Iterable[int]) -> list[Waiter]:
    return [share(TokenSequence(Item(Tokens([1] * size))), owner, i) for i, size in enumerate(sizes)]


def share(sequence: TokenSequence, owner: RequestHandle, index: int = 0) -> Waiter:
    sequence.waiters.append(Waiter(owner, index, sequence, 0.0))
    return sequence.waiters[-1]


def low(job: EmbedJob) -> EmbedJob:
    return replace(job, priority=Priority.LOW)


# ---------------------------------------------------------------------------------------------------- the device


def test_a_text_is_in_the_next_batch_however_much_of_low_priority_waits() -> None:
    batches = BatchQueue(2048)
    batches.add(waiters(handle(), [32] * 10_000))
    batches.next_batch()

    batches.add(waiters(handle(Priority.NORMAL), [7]))

    assert [one.item.num_tokens for one in batches.next_batch()] == [7]


@pytest.mark.parametrize(("limit", "most"), [(8192, 2048), (2048, 512), (1000, 512), (100, 100)])
def test_a_batch_of_low_priority_is_a_quarter_of_a_batch_where_that_is_fast_enough(limit: int, most: int) -> None:
    batches = BatchQueue(limit)
    batches.add(waiters(handle(), [4] * 5_000))

    assert [sum(one.item.num_tokens for one in batches.next_batch()) for _ in range(3)] == [most] * 3


def test_a_text_that_both_wait_for_comes_with_the_higher_priority_and_once() -> None:
    batches = BatchQueue(100)
    last = TokenSequence(Item(Tokens([1] * 5)))
    patient = handle()
    batches.add([*waiters(patient, [10] * 20), share(last, patient, 20)])

    batches.add([share(last, handle(Priority.NORMAL))])

    assert batches.next_batch() == [last]
    rest = [one for _ in range(2) for one in batches.next_batch()]
    assert len(rest) == 20
    assert last not in rest


def test_callers_share_the_time_for_low_priority() -> None:
    batches = BatchQueue(400)
    batches.add(waiters(handle(caller="first"), [10] * 1000))
    batches.next_batch()

    batches.add(waiters(handle(caller="second"), [10] * 1000))

    assert "second" in {one.waiters[0].handle.caller for one in batches.next_batch()}


EVENTS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 7), st.lists(st.integers(0, 40), max_size=6)),
    st.tuples(st.just("take"), st.just(0), st.just(None)),
    st.tuples(st.just("cancel"), st.integers(0, 7), st.just(None)),
)


@settings(max_examples=200)
@given(events=st.lists(EVENTS, max_size=60), priorities=st.lists(st.sampled_from(Priority), min_size=8, max_size=8))
def test_low_priority_is_served_only_while_nothing_else_waits(
    events: list[tuple[str, int, list[int] | None]], priorities: list[Priority]
) -> None:
    batches = BatchQueue(60)
    handles = [handle(priority, caller) for priority, caller in zip(priorities, "aaaabbcd", strict=True)]
    indices = [count() for _ in handles]
    queued: list[Waiter] = []
    taken: list[Waiter] = []

    def wanted() -> list[Waiter]:
        return [one for one in queued if one.handle.is_live and not one.sequence.is_taken]

    def take_one() -> None:
        is_urgent = any(one.handle.priority is Priority.NORMAL for one in wanted())
        batch = [one.waiters[0] for one in batches.next_batch()]
        assert batch
        assert {one.handle.priority for one in batch} == {Priority.NORMAL if is_urgent else Priority.LOW}
        taken.extend(batch)

    for kind, number, sizes in events:
        if kind == "add":
            new = waiters(handles[number], sizes or ())
            for one in new:
                one.index = next(indices[number])
            batches.add(new)
            queued += new
        elif kind == "cancel":
            handles[number].is_live = False
        elif wanted():
            take_one()
    while wanted():
        take_one()

    assert len(set(map(id, taken))) == len(taken)
    for owner in handles:
        order = [one.index for one in taken if one.handle is owner]
        assert order == sorted(order)


def test_lanes_are_empty_when_the_last_waiter_is_gone() -> None:
    lanes: Lanes[Waiter] = Lanes()
    lanes.add([*waiters(handle(), [1]), *waiters(handle(Priority.NORMAL), [1, 2])])
    assert lanes.num_waiters == 3

    order = [one.handle.priority for _ in range(3) if (one := lanes.pop(0.0)) is not None]

    assert order == [Priority.NORMAL] * 2 + [Priority.LOW]
    assert lanes.pop(0.0) is None
    assert not lanes


# ---------------------------------------------------------------------------------------------------- tokenizing


async def test_texts_of_low_priority_are_read_when_no_other_waits_to_be_read(gate: Gate) -> None:
    pool = TokenizerPool("numbers", asyncio.get_running_loop())
    pool.start()
    order: list[str] = []

    def steps(name: str, sizes: list[int]) -> Steps[None]:
        for size in sizes:
            yield size
            order.append(name)

    def hold() -> Steps[None]:
        yield 1
        gate(None)

    tasks = [pool.begin(handle(Priority.NORMAL), hold())]
    await gate.reached()
    tasks += [pool.begin(handle(caller=str(i)), steps("low", [1, 1])) for i in range(3)]
    tasks += [pool.begin(handle(Priority.NORMAL), steps("normal", [100, 100])) for _ in range(2)]

    gate.open()
    await asyncio.gather(*(task.done for task in tasks))

    assert order == ["normal"] * 4 + ["low"] * 6
    pool.close()
    assert await asyncio.to_thread(pool.join, PATIENCE_S)


# ----------------------------------------------------------------------------------------------------- admission


def test_waiting_low_priority_texts_take_no_room_from_others(make_job: MakeJob) -> None:
    admission = Admission("numbers", max_texts=100, max_tokens=1000, longest_text=50)

    with admission.admit(low(make_job(*["1"] * 25))), admission.admit(make_job(*["1"] * 100)):
        assert (admission.num_texts, admission.num_low_texts) == (100, 25)
        with pytest.raises(Overloaded, match="low-priority work: 25 texts"):
            admission.admit(low(make_job(*["1"] * 33))).__enter__()

    assert admission.is_empty


def test_low_priority_may_have_a_quarter_of_the_queue(make_job: MakeJob) -> None:
    admission = Admission("numbers", max_texts=400, max_tokens=1_000_000, longest_text=50)
    waiting = low(make_job(*["1"] * 60))

    with admission.admit(waiting):
        with pytest.raises(Overloaded, match="the limits are 100 texts and 250000 tokens"):
            admission.admit(low(make_job(*["1"] * 41))).__enter__()
        with admission.admit(low(make_job(*["1"] * 40))):
            assert admission.num_low_texts == 100


# ------------------------------------------------------------------------------------------------------ requests


@pytest.mark.usefixtures("no_thread_is_left")
async def test_a_low_priority_request_is_computed_last(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder, gate: Gate
) -> None:
    encoder.on_forward = gate
    batcher = await start_batcher()
    first = asyncio.create_task(batcher.submit(make_job("1")))
    await gate.reached()
    assert batcher.oldest_s(Priority.LOW) == 0 < batcher.oldest_s()

    patient = asyncio.create_task(batcher.submit(low(make_job(*texts_of(range(100, 104))))))
    assert await becomes(lambda: batcher.num_queued == 4)
    others = [asyncio.create_task(batcher.submit(make_job(str(i), caller="other"))) for i in range(2, 5)]
    assert await becomes(lambda: batcher.num_queued == 7)
    assert (batcher.num_texts, batcher.oldest_s(Priority.LOW) > 0) == (4, True)
    gate.open()
    await asyncio.gather(first, patient, *others)

    assert encoder.computed[:4] == [1, 2, 3, 4]
    assert sorted(encoder.computed[4:]) == [100, 101, 102, 103]
    assert await becomes(lambda: batcher.is_idle)


@pytest.mark.usefixtures("no_thread_is_left")
async def test_a_low_priority_request_that_starves_says_so(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder, gate: Gate
) -> None:
    encoder.on_forward = gate
    batcher = await start_batcher()
    first = asyncio.create_task(batcher.submit(make_job("1")))
    await gate.reached()

    error = await answer(batcher.submit(low(make_job("2", timeout_s=0.05))))

    assert isinstance(error, DeadlineExceeded)
    assert "because low-priority requests wait" in error.message
    gate.open()
    await first
