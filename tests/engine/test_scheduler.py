"""The queue is fair, keeps its budget, and neither loses nor repeats anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine import scheduler
from gateway.engine.model.items import Item, Tokens
from gateway.engine.scheduler import FairQueue, RequestHandle, TokenSequence, Waiter

FOREVER = float("inf")


def handle(caller: str = "someone", deadline: float = FOREVER) -> RequestHandle:
    return RequestHandle(caller, deadline)


def waiters(owner: RequestHandle, sizes: Iterable[int], first: int = 0) -> list[Waiter]:
    return [waiter(owner, first + i, size) for i, size in enumerate(sizes)]


def waiter(owner: RequestHandle, index: int, size: int, queued_at: float = 0.0) -> Waiter:
    """Return a waiter that shares its sequence with no other."""
    sequence = TokenSequence(Item(Tokens([1] * size)))
    sequence.waiters.append(Waiter(owner, index, sequence, queued_at))
    return sequence.waiters[0]


def take(queue: FairQueue, max_batch_tokens: int, now: float) -> list[Waiter]:
    """Take a batch of sequences that are not shared: the waiter of each."""
    return [one.waiters[0] for one in scheduler.take(queue, max_batch_tokens, now)]


def queue_of(*waiting: Sequence[Waiter]) -> FairQueue:
    queue = FairQueue()
    for some in waiting:
        queue.add(some)
    return queue


def sizes_of(batch: Iterable[Waiter]) -> list[int]:
    return [waiter.num_tokens for waiter in batch]


# ------------------------------------------------------------------------------------------- small and large requests


def taken(queue: FairQueue[Waiter], budget: int, shared: int) -> list[tuple[str, int]]:
    """Return the caller and the size of each text of the next batch."""
    batch = scheduler.take(queue, budget, 0.0, shared)
    return [(one.waiters[0].handle.caller, one.item.num_tokens) for one in batch]


def test_a_small_request_is_computed_with_no_more_than_its_share_of_large_ones() -> None:
    queue = queue_of(waiters(handle("bulk"), [5] * 40))
    assert taken(queue, 100, 25) == [("bulk", 5)] * 20

    queue.add(waiters(handle("other"), [3, 3]))

    assert Counter(taken(queue, 100, 25)) == {("other", 3): 2, ("bulk", 5): 5}
    assert taken(queue, 100, 25) == [("bulk", 5)] * 15


def test_where_small_requests_are_expected_others_keep_to_their_share() -> None:
    queue = queue_of(waiters(handle("bulk"), [5] * 40))

    assert len(scheduler.take(queue, 100, 0.0, 25, True)) == 5
    assert queue.num_small == 0


def test_small_requests_fill_a_batch() -> None:
    queue = queue_of(*(waiters(handle(str(i)), [5]) for i in range(30)))

    assert len(taken(queue, 100, 25)) == 20
    assert len(taken(queue, 100, 25)) == 10


def test_a_request_is_small_if_all_of_it_is() -> None:
    """Else the texts that a large one has left at its end would make small batches of everything."""
    queue = queue_of(*(waiters(handle(str(i)), [5] * 8) for i in range(4)))

    assert [len(taken(queue, 100, 25)) for _ in range(2)] == [20, 12]


@pytest.mark.parametrize(("sizes", "num_bulk"), [([12, 13], 5), ([13, 13], 14)])
def test_a_request_is_small_up_to_the_share(sizes: list[int], num_bulk: int) -> None:
    queue = queue_of(waiters(handle("bulk"), [5] * 40), waiters(handle("other"), sizes))

    assert Counter(caller for caller, _size in taken(queue, 100, 25)) == {"other": 2, "bulk": num_bulk}


def test_the_rest_of_a_large_request_does_not_count_as_small() -> None:
    queue = queue_of(waiters(handle("bulk"), [5] * 40), waiters(handle("other"), [5] * 12))
    assert Counter(taken(queue, 100, 25)) == {("other", 5): 10, ("bulk", 5): 10}

    assert Counter(taken(queue, 100, 25)) == {("other", 5): 2, ("bulk", 5): 18}


def test_small_requests_join_a_text_that_is_larger_than_its_share() -> None:
    queue = queue_of(waiters(handle("bulk"), [30]), *(waiters(handle(caller), [3]) for caller in "xyz"))

    assert taken(queue, 100, 25) == [("bulk", 30), ("x", 3), ("y", 3), ("z", 3)]


def test_the_first_text_of_a_batch_is_taken_with_any_size() -> None:
    queue = queue_of(waiters(handle("bulk"), [200, 200]), waiters(handle("other"), [3]))

    batches = [taken(queue, 100, 25) for _ in range(3)]

    assert sorted(one for batch in batches for one in batch) == [("bulk", 200)] * 2 + [("other", 3)]
    assert all(len(batch) == 1 for batch in batches)


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
    queue = queue_of(waiters(handle(), sizes))

    taken = []
    while batch := take(queue, budget, now=0.0):
        taken.append(sizes_of(batch))

    assert taken == batches
    assert not queue


def test_the_texts_of_a_request_come_in_its_order() -> None:
    owner = handle()
    queue = queue_of(waiters(owner, [1, 2]), waiters(owner, [3, 4], first=2))

    assert [waiter.index for waiter in take(queue, 100, now=0.0)] == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------- unwanted


def test_entries_of_a_caller_that_has_gone_are_dropped() -> None:
    gone, here = handle(), handle()
    queue = queue_of(waiters(gone, [1, 2]), waiters(here, [3]))

    gone.is_live = False

    assert sizes_of(take(queue, 100, now=0.0)) == [3]
    assert not queue


@pytest.mark.parametrize(("now", "taken"), [(4.9, [1]), (5.0, []), (6.0, [])])
def test_entries_past_their_deadline_are_dropped(now: float, taken: list[int]) -> None:
    queue = queue_of(waiters(handle(deadline=5.0), [1]))

    assert sizes_of(take(queue, 100, now)) == taken
    assert not take(queue, 100, now=0.0)


def test_unwanted_entries_do_not_end_a_batch() -> None:
    first, gone, last = handle("a"), handle("b"), handle("c")
    queue = queue_of(waiters(first, [1]), waiters(gone, [50] * 100), waiters(last, [2]))

    gone.is_live = False

    assert sizes_of(take(queue, 10, now=0.0)) == [1, 2]


def test_a_ticket_can_queue_more_after_all_of_it_was_taken() -> None:
    owner = handle()
    queue = queue_of(waiters(owner, [1]))
    take(queue, 100, now=0.0)

    queue.add(waiters(owner, [2], first=1))

    assert sizes_of(take(queue, 100, now=0.0)) == [2]


# ------------------------------------------------------------------------------------------------------- fairness


@pytest.mark.parametrize("newcomer", ["the same caller", "another caller"])
@pytest.mark.parametrize("batches_before", [0, 1, 10])
def test_one_text_behind_a_request_of_2048_is_in_the_next_batch(newcomer: str, batches_before: int) -> None:
    queue = queue_of(waiters(handle("the same caller"), [32] * 2048))
    for _ in range(batches_before):
        take(queue, 2048, now=0.0)
    single = handle(newcomer)

    queue.add(waiters(single, [32]))

    assert single in {waiter.handle for waiter in take(queue, 2048, now=0.0)}


def test_a_newcomer_behind_oversize_texts_waits_for_one_of_them_at_most() -> None:
    queue = queue_of(waiters(handle("bulk"), [8192] * 100))
    take(queue, 2048, now=0.0)
    single = handle("single")

    queue.add(waiters(single, [8]))

    taken = [take(queue, 2048, now=0.0) for _ in range(2)]
    assert single in {waiter.handle for batch in taken for waiter in batch}


@pytest.mark.parametrize("caller", ["bulk", "another"], ids=["of the same caller", "of another caller"])
def test_small_requests_one_after_the_other_do_not_starve_a_large_text(caller: str) -> None:
    """Each comes when the one before has left the queue, and fills a batch: 10 of them weigh one large text."""
    bulk = handle("bulk")
    queue = queue_of(waiters(bulk, [1000] * 5))

    served = take(queue, 100, now=0.0)
    for _ in range(50):
        queue.add(waiters(handle(caller), [100]))
        served += take(queue, 100, now=0.0)

    assert sum(waiter.handle is bulk for waiter in served) >= 4


def test_who_asked_for_nothing_does_not_catch_up_later() -> None:
    busy, late = handle("busy"), handle("late")
    queue = queue_of(waiters(busy, [10] * 1000))
    for _ in range(50):
        take(queue, 100, now=0.0)

    queue.add(waiters(late, [10] * 1000))

    shares = Counter(waiter.handle.caller for _ in range(10) for waiter in take(queue, 100, now=0.0))
    assert abs(shares["busy"] - shares["late"]) <= 1


def test_many_requests_of_one_caller_weigh_no_more_than_one_of_another() -> None:
    many = [waiters(handle("many"), [10] * 100) for _ in range(20)]
    queue = queue_of(*many, waiters(handle("one"), [10] * 100))

    shares = Counter(waiter.handle.caller for _ in range(10) for waiter in take(queue, 100, now=0.0))

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
    """The difference stays below one batch and one largest waiter, while other callers come and go."""
    queue, backlog = FairQueue(), 40 * 300
    for caller, pattern, num_requests in zip("ab", sizes, requests, strict=True):
        for _ in range(num_requests):
            queue.add(waiters(handle(caller), pattern * (backlog // num_requests // sum(pattern) + 1)))
    served = Counter({"a": 0, "b": 0})

    for i in range(30):
        if i < len(visits):
            queue.add(waiters(handle(visits[i][0]), [visits[i][1]]))
        for waiter in take(queue, budget, now=0.0):
            served[waiter.handle.caller] += waiter.num_tokens
        if max(served["a"], served["b"]) > backlog - 1000:  # one of them may soon have nothing left
            break

        assert abs(served["a"] - served["b"]) <= budget + max(map(max, sizes))


# ----------------------------------------------------------------------------------------------- any order of events

ADD = st.tuples(
    st.just("add"),
    st.integers(0, 7),  # which of the handles
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
def test_each_wanted_entry_is_taken_exactly_once(
    events: list[tuple[str, int, list[int] | None]], deadlines: list[float]
) -> None:
    queue = FairQueue()
    handles = [handle(caller, deadline) for caller, deadline in zip("aaaabbcd", deadlines, strict=True)]
    indices = [count() for _ in handles]
    queued: list[Waiter] = []
    taken: list[Waiter] = []
    now = 0.0

    def take_one(budget: int) -> list[Waiter]:
        batch = take(queue, budget, now)
        assert all(waiter.handle.wants(now) for waiter in batch)
        assert len(batch) <= 1 or sum(sizes_of(batch)) <= budget
        taken.extend(batch)
        return batch

    for kind, number, sizes in events:
        match kind:
            case "add":
                owner = handles[number]
                new = [waiter(owner, next(indices[number]), n, now) for n in sizes or ()]
                queue.add(new)
                queued += new
            case "take":
                wanted = [waiter for waiter in queued if waiter.handle.wants(now) and waiter not in taken]
                assert bool(take_one(number)) == bool(wanted)
            case "cancel":
                handles[number].is_live = False
            case "wait":
                now += number
    while take_one(60):
        pass

    assert max(Counter(map(id, taken)).values(), default=1) == 1
    assert {id(waiter) for waiter in queued if waiter.handle.wants(now)} <= {id(waiter) for waiter in taken}
    for owner in handles:
        order = [waiter.index for waiter in taken if waiter.handle is owner]
        assert order == sorted(order)
    assert not queue
    assert queue.stats() == (0, 0, 0)
    assert queue.num_tokens == 0


# -------------------------------------------------------------------------------------------------- shared sequences


def share(sequence: TokenSequence, owner: RequestHandle, index: int = 0, queued_at: float = 0.0) -> Waiter:
    """Let one more wait for a sequence."""
    sequence.waiters.append(Waiter(owner, index, sequence, queued_at))
    return sequence.waiters[-1]


def computation_of(size: int) -> TokenSequence:
    return TokenSequence(Item(Tokens([1] * size)))


def test_a_shared_computation_is_taken_once() -> None:
    shared = computation_of(5)
    queue = queue_of(*([share(shared, handle(caller))] for caller in "abc"))

    assert scheduler.take(queue, 100, now=0.0) == [shared]
    assert scheduler.take(queue, 100, now=0.0) == []
    assert not queue


def test_the_second_place_counts_when_the_first_has_gone() -> None:
    shared = computation_of(5)
    gone, here = handle("a"), handle("b")
    queue = queue_of([share(shared, gone)], waiters(handle("b"), [9]), [share(shared, here)])

    gone.is_live = False

    assert [one.waiters[0].num_tokens for one in scheduler.take(queue, 100, now=0.0)] == [9, 5]


def test_a_shared_computation_comes_when_the_first_of_its_owners_is_served() -> None:
    """A newcomer with a text that a backlog ends with does not wait for the backlog."""
    last = computation_of(10)
    bulk = handle("bulk")
    queue = queue_of(waiters(bulk, [10] * 1000), [share(last, bulk, 1000)])
    take(queue, 100, now=0.0)

    queue.add([share(last, handle("single"))])

    assert last in scheduler.take(queue, 100, now=0.0)


def test_who_is_served_first_pays_and_the_others_do_not() -> None:
    """If both paid for their shared text, c would get a half instead of its third."""
    a, b, c = (handle(caller) for caller in "abc")
    shared = [computation_of(10) for _ in range(100)]
    queue = FairQueue()
    for owner in (a, b):
        queue.add([share(one, owner, i) for i, one in enumerate(shared)])
    queue.add(waiters(c, [10] * 100))

    taken = [one for _ in range(30) for one in scheduler.take(queue, 10, now=0.0)]

    assert [one for one in taken if one in shared] == shared[:20]
    assert len(taken) == 30


class LedgerQueue(FairQueue):
    """Keeps the tokens that each caller has paid."""

    def __init__(self) -> None:
        super().__init__()
        self.paid: Counter[str] = Counter()

    def pop(self, num_tokens: int) -> Waiter:
        waiter = super().pop(num_tokens)
        assert num_tokens in (0, waiter.num_tokens)
        self.paid[waiter.handle.caller] += num_tokens
        return waiter


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    sharing=st.lists(st.sampled_from(["both", "both", "a", "b"]), min_size=1, max_size=12),
    offset=st.integers(0, 30),
    num_requests=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    budget=st.integers(1, 300),
    visits=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 200)), max_size=15),
)
def test_sharing_leaves_the_callers_their_even_shares(
    sizes: list[int],
    sharing: list[str],
    offset: int,
    num_requests: tuple[int, int],
    budget: int,
    visits: list[tuple[str, int]],
) -> None:
    """What two callers with a backlog pay differs by less than one batch and one largest text, as without sharing."""
    queue = LedgerQueue()
    texts = [computation_of(sizes[i % len(sizes)]) for i in range(600)]
    backlog: dict[str, list[TokenSequence]] = {}
    for caller, number in zip("ab", num_requests, strict=True):
        own = [one for i, one in enumerate(texts) if sharing[i % len(sharing)] in ("both", caller)]
        if caller == "b":
            own = own[offset:] + own[:offset]
        backlog[caller] = own
        for first in range(number):
            owner = handle(caller)
            queue.add([share(one, owner, i) for i, one in enumerate(own[first::number])])
    largest = max(sizes)
    taken: list[TokenSequence] = []

    for i in range(25):
        if i < len(visits):
            caller, number = visits[i]
            queue.add([share(texts[number], handle(caller))])
        left = [sum(one.item.num_tokens for one in own if not one.is_taken) for own in backlog.values()]
        if min(left) <= 2 * budget + 2 * largest:  # one of them may soon have nothing left
            break
        batch = scheduler.take(queue, budget, now=0.0)
        assert batch
        taken += batch

        assert sum(queue.paid.values()) == sum(one.item.num_tokens for one in taken)
        assert abs(queue.paid["a"] - queue.paid["b"]) <= budget + largest
    assert len(set(map(id, taken))) == len(taken)


KEYS = st.lists(st.integers(0, 11), max_size=6)
SHARED_EVENTS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 7), KEYS),
    st.tuples(st.just("add late"), st.integers(0, 7), KEYS),  # taken between the look at it and its queueing
    st.tuples(st.just("take"), st.integers(1, 60), st.just(None)),
    st.tuples(st.just("deliver"), st.just(0), st.just(None)),
    st.tuples(st.just("cancel"), st.integers(0, 7), st.just(None)),
    st.tuples(st.just("wait"), st.integers(1, 5), st.just(None)),
)


class Flight:
    """Requests that come, share, leave and are served in any order, as the batcher lets them."""

    def __init__(self, deadlines: list[float], sizes: list[int]) -> None:
        self.queue = LedgerQueue()
        self.now = 0.0
        self.taken: list[TokenSequence] = []
        self.waiting: list[Waiter] = []  # those whose result has not been delivered
        self._tickets = [handle(caller, deadline) for caller, deadline in zip("aaaabbcd", deadlines, strict=True)]
        self._sizes = sizes
        self._in_flight: dict[int, TokenSequence] = {}

    def add(self, owner: RequestHandle, keys: Iterable[int], *, is_late: bool) -> None:
        """Join sequences, and queue those that are not taken; if it is late, they were taken in between."""
        if owner.is_live:
            joined = [
                share(self._in_flight.setdefault(key, computation_of(self._sizes[key])), owner, i, self.now)
                for i, key in enumerate(keys)
            ]
            self.waiting += joined
            self.queue.add(waiter for waiter in joined if is_late or not waiter.sequence.is_taken)

    def take(self, budget: int) -> bool:
        is_due = any(self._is_wanted(one) and not one.is_taken for one in self._in_flight.values())
        batch = scheduler.take(self.queue, budget, self.now)
        assert bool(batch) == is_due
        assert not {id(one) for one in batch} & {id(one) for one in self.taken}
        assert all(one.is_taken and self._is_wanted(one) for one in batch)
        assert len(batch) <= 1 or sum(one.item.num_tokens for one in batch) <= budget
        self.taken += batch
        return is_due

    def _is_wanted(self, sequence: TokenSequence) -> bool:
        return any(waiter.handle.wants(self.now) for waiter in sequence.waiters)

    def deliver(self) -> None:
        self.waiting = [waiter for waiter in self.waiting if not waiter.sequence.is_taken]
        self._in_flight = {key: one for key, one in self._in_flight.items() if not one.is_taken}

    def cancel(self, owner: RequestHandle) -> None:
        owner.is_live = False
        for one in self._in_flight.values():
            one.waiters = [waiter for waiter in one.waiters if waiter.handle is not owner]
        self._in_flight = {key: one for key, one in self._in_flight.items() if one.waiters or one.is_taken}

    def happen(self, kind: str, number: int, keys: Iterable[int] | None) -> None:
        match kind:
            case "add" | "add late":
                self.add(self._tickets[number], keys or (), is_late=kind == "add late")
            case "take":
                self.take(number)
            case "deliver":
                self.deliver()
            case "cancel":
                self.cancel(self._tickets[number])
            case "wait":
                self.now += number


@settings(max_examples=300)
@given(
    events=st.lists(SHARED_EVENTS, max_size=60),
    deadlines=st.lists(st.integers(1, 30) | st.just(FOREVER), min_size=8, max_size=8),
    sizes=st.lists(st.integers(0, 40), min_size=12, max_size=12),
)
def test_a_shared_text_is_computed_once_for_all_requests_that_want_it(
    events: list[tuple[str, int, list[int] | None]], deadlines: list[float], sizes: list[int]
) -> None:
    flight = Flight(deadlines, sizes)

    for event in events:
        flight.happen(*event)
        waiting = [waiter for request in flight.queue._requests.values() for waiter in request.waiters]
        assert flight.queue.num_tokens == sum(sizes_of(waiting))
    while flight.take(60):
        pass
    flight.deliver()

    assert not [waiter for waiter in flight.waiting if waiter.handle.wants(flight.now)]
    assert sum(flight.queue.paid.values()) == sum(one.item.num_tokens for one in flight.taken)
    assert not flight.queue
    assert flight.queue.stats() == (0, 0, 0)
    assert flight.queue.num_tokens == 0
