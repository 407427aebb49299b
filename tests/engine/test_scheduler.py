"""The queue is fair, keeps its budget, and neither loses nor repeats anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine import scheduler
from gateway.engine.items import Item, Tokens
from gateway.engine.scheduler import Computation, Entry, FairQueue, Ticket

FOREVER = float("inf")


def ticket(caller: str = "someone", deadline: float = FOREVER) -> Ticket:
    return Ticket(caller, deadline)


def entries(owner: Ticket, sizes: Iterable[int], first: int = 0) -> list[Entry]:
    return [entry(owner, first + i, size) for i, size in enumerate(sizes)]


def entry(owner: Ticket, index: int, size: int, queued_at: float = 0.0) -> Entry:
    """Return an entry that shares its computation with nobody."""
    computation = Computation(Item(Tokens([1] * size)))
    computation.entries.append(Entry(owner, index, computation, queued_at))
    return computation.entries[0]


def take(queue: FairQueue, max_batch_tokens: int, now: float) -> list[Entry]:
    """Take a batch of computations that are shared with nobody: the entry of each."""
    return [one.entries[0] for one in scheduler.take(queue, max_batch_tokens, now)]


def queue_of(*waiting: Sequence[Entry]) -> FairQueue:
    queue = FairQueue()
    for some in waiting:
        queue.add(some)
    return queue


def sizes_of(batch: Iterable[Entry]) -> list[int]:
    return [entry.num_tokens for entry in batch]


# ------------------------------------------------------------------------------------------------------ one batch


@pytest.mark.parametrize(
    ("sizes", "budget", "batches"),
    [
        pytest.param([], 10, [], id="nothing"),
        pytest.param([3], 10, [[3]], id="one"),
        pytest.param([5, 5], 10, [[5, 5]], id="exactly the budget"),
        pytest.param([5, 6], 10, [[5], [6]], id="one token over"),
        pytest.param([11], 10, [[11]], id="oversize"),
        pytest.param([1, 11, 1], 10, [[1], [11], [1]], id="oversize between small ones"),
        pytest.param([0, 0], 10, [[0, 0]], id="no tokens at all"),
        pytest.param([1] * 25, 10, [[1] * 10, [1] * 10, [1] * 5], id="many"),
    ],
)
def test_a_batch_is_cut_by_tokens(sizes: list[int], budget: int, batches: list[list[int]]) -> None:
    queue = queue_of(entries(ticket(), sizes))

    taken = []
    while batch := take(queue, budget, now=0.0):
        taken.append(sizes_of(batch))

    assert taken == batches
    assert not queue


def test_the_texts_of_a_request_come_in_its_order() -> None:
    owner = ticket()
    queue = queue_of(entries(owner, [1, 2]), entries(owner, [3, 4], first=2))

    assert [entry.index for entry in take(queue, 100, now=0.0)] == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------- unwanted


def test_entries_of_a_caller_that_has_gone_are_dropped() -> None:
    gone, here = ticket(), ticket()
    queue = queue_of(entries(gone, [1, 2]), entries(here, [3]))

    gone.is_live = False

    assert sizes_of(take(queue, 100, now=0.0)) == [3]
    assert not queue


@pytest.mark.parametrize(("now", "taken"), [(4.9, [1]), (5.0, []), (6.0, [])])
def test_entries_past_their_deadline_are_dropped(now: float, taken: list[int]) -> None:
    queue = queue_of(entries(ticket(deadline=5.0), [1]))

    assert sizes_of(take(queue, 100, now)) == taken
    assert not take(queue, 100, now=0.0)


def test_unwanted_entries_do_not_end_a_batch() -> None:
    first, gone, last = ticket("a"), ticket("b"), ticket("c")
    queue = queue_of(entries(first, [1]), entries(gone, [50] * 100), entries(last, [2]))

    gone.is_live = False

    assert sizes_of(take(queue, 10, now=0.0)) == [1, 2]


def test_a_ticket_can_queue_more_after_all_of_it_was_taken() -> None:
    owner = ticket()
    queue = queue_of(entries(owner, [1]))
    take(queue, 100, now=0.0)

    queue.add(entries(owner, [2], first=1))

    assert sizes_of(take(queue, 100, now=0.0)) == [2]


# ------------------------------------------------------------------------------------------------------- fairness


@pytest.mark.parametrize("newcomer", ["the same caller", "another caller"])
@pytest.mark.parametrize("batches_before", [0, 1, 10])
def test_one_text_behind_a_request_of_2048_is_in_the_next_batch(newcomer: str, batches_before: int) -> None:
    queue = queue_of(entries(ticket("the same caller"), [32] * 2048))
    for _ in range(batches_before):
        take(queue, 2048, now=0.0)
    single = ticket(newcomer)

    queue.add(entries(single, [32]))

    assert single in {entry.ticket for entry in take(queue, 2048, now=0.0)}


def test_a_newcomer_behind_oversize_texts_waits_for_one_of_them_at_most() -> None:
    queue = queue_of(entries(ticket("bulk"), [8192] * 100))
    take(queue, 2048, now=0.0)
    single = ticket("single")

    queue.add(entries(single, [8]))

    taken = [take(queue, 2048, now=0.0) for _ in range(2)]
    assert single in {entry.ticket for batch in taken for entry in batch}


@pytest.mark.parametrize("caller", ["bulk", "another"], ids=["of the same caller", "of another caller"])
def test_small_requests_one_after_the_other_do_not_starve_a_large_text(caller: str) -> None:
    """Each comes when the one before has left the queue, and fills a batch: 10 of them weigh one large text."""
    bulk = ticket("bulk")
    queue = queue_of(entries(bulk, [1000] * 5))

    served = take(queue, 100, now=0.0)
    for _ in range(50):
        queue.add(entries(ticket(caller), [100]))
        served += take(queue, 100, now=0.0)

    assert sum(entry.ticket is bulk for entry in served) >= 4


def test_who_asked_for_nothing_does_not_catch_up_later() -> None:
    busy, late = ticket("busy"), ticket("late")
    queue = queue_of(entries(busy, [10] * 1000))
    for _ in range(50):
        take(queue, 100, now=0.0)

    queue.add(entries(late, [10] * 1000))

    shares = Counter(entry.ticket.caller for _ in range(10) for entry in take(queue, 100, now=0.0))
    assert abs(shares["busy"] - shares["late"]) <= 1


def test_many_requests_of_one_caller_weigh_no_more_than_one_of_another() -> None:
    many = [entries(ticket("many"), [10] * 100) for _ in range(20)]
    queue = queue_of(*many, entries(ticket("one"), [10] * 100))

    shares = Counter(entry.ticket.caller for _ in range(10) for entry in take(queue, 100, now=0.0))

    assert abs(shares["many"] - shares["one"]) <= 1


@given(
    sizes=st.tuples(*[st.lists(st.integers(1, 300), min_size=1, max_size=8)] * 2),
    requests=st.tuples(*[st.integers(1, 4)] * 2),
    budget=st.integers(1, 500),
    visits=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 300)), max_size=20),
)
def test_callers_with_a_backlog_get_the_same_tokens(
    sizes: tuple[list[int], list[int]],
    requests: tuple[int, int],
    budget: int,
    visits: list[tuple[str, int]],
) -> None:
    """The difference stays below one batch and one largest entry, whoever else comes and goes."""
    queue = FairQueue()
    for caller, pattern, num_requests in zip("ab", sizes, requests, strict=True):
        for _ in range(num_requests):
            queue.add(entries(ticket(caller), pattern * (60 * 300 // sum(pattern) + 1)))
    served = Counter({"a": 0, "b": 0})

    for i in range(30):
        if i < len(visits):
            queue.add(entries(ticket(visits[i][0]), [visits[i][1]]))
        for entry in take(queue, budget, now=0.0):
            served[entry.ticket.caller] += entry.num_tokens
        if max(served["a"], served["b"]) > 50 * 300:  # one of them may soon have nothing left
            break

        assert abs(served["a"] - served["b"]) <= budget + max(map(max, sizes))


# ----------------------------------------------------------------------------------------------- any order of events

ADD = st.tuples(
    st.just("add"),
    st.integers(0, 7),  # which of the tickets
    st.lists(st.integers(0, 40), max_size=6),
)
TAKE = st.tuples(st.just("take"), st.integers(1, 60), st.just(None))
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 7), st.just(None))
WAIT = st.tuples(st.just("wait"), st.integers(1, 5), st.just(None))


@settings(max_examples=300)
@given(
    events=st.lists(st.one_of(ADD, TAKE, CANCEL, WAIT), max_size=60),
    deadlines=st.lists(st.integers(1, 30) | st.just(FOREVER), min_size=8, max_size=8),
)
def test_whatever_happens_each_wanted_entry_is_taken_once(
    events: list[tuple[str, int, list[int] | None]], deadlines: list[float]
) -> None:
    queue = FairQueue()
    tickets = [ticket(caller, deadline) for caller, deadline in zip("aaaabbcd", deadlines, strict=True)]
    indices = [count() for _ in tickets]
    queued: list[Entry] = []
    taken: list[Entry] = []
    now = 0.0

    def take_one(budget: int) -> list[Entry]:
        batch = take(queue, budget, now)
        assert all(entry.ticket.wants(now) for entry in batch)
        assert len(batch) <= 1 or sum(sizes_of(batch)) <= budget
        taken.extend(batch)
        return batch

    for kind, number, sizes in events:
        match kind:
            case "add":
                owner = tickets[number]
                new = [entry(owner, next(indices[number]), n, now) for n in sizes or ()]
                queue.add(new)
                queued += new
            case "take":
                wanted = [entry for entry in queued if entry.ticket.wants(now) and entry not in taken]
                assert bool(take_one(number)) == bool(wanted)
            case "cancel":
                tickets[number].is_live = False
            case "wait":
                now += number
    while take_one(60):
        pass

    assert max(Counter(map(id, taken)).values(), default=1) == 1
    assert {id(entry) for entry in queued if entry.ticket.wants(now)} <= {id(entry) for entry in taken}
    for owner in tickets:
        order = [entry.index for entry in taken if entry.ticket is owner]
        assert order == sorted(order)
    assert not queue
    assert not queue._callers
    assert not queue._requests
    assert queue._num_waiting == 0
