"""The memory for requests is divided among clients, and a request that does not fit is refused."""

from __future__ import annotations

import weakref

import pytest

from gateway.access.memory import MemoryBudget, Reservation
from gateway.errors import MemoryFull, TooMuchMemory

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budget(clock: Clock) -> MemoryBudget:
    return MemoryBudget(100 * MIB, clock)


def fill(budget: MemoryBudget, caller: str, each: int) -> list[Reservation]:
    """Reserve until a reservation is refused."""
    held = []
    for _ in range(1000):
        one = budget.open(caller)
        try:
            one.resize(each)
        except MemoryFull:
            return held
        held.append(one)
    pytest.fail("nothing is refused")


def test_a_client_that_is_alone_may_hold_half(budget: MemoryBudget) -> None:
    assert len(fill(budget, "ann", 10 * MIB)) == 5
    assert budget.num_bytes == 50 * MIB


def test_each_of_three_clients_leaves_as_much_free_as_it_holds(budget: MemoryBudget) -> None:
    held = [sum(r.num_bytes for r in fill(budget, caller, 2 * MIB)) / MIB for caller in ("ann", "ben", "cid")]

    assert held == [50, 24, 12]
    assert budget.num_bytes < 90 * MIB


def test_another_client_is_admitted_next_to_one_that_holds_its_full_share(budget: MemoryBudget) -> None:
    fill(budget, "ann", 4 * MIB)

    budget.open("ben").resize(16 * MIB)


def test_small_requests_get_in_where_large_ones_of_the_same_client_are_refused(budget: MemoryBudget) -> None:
    fill(budget, "ann", 2 * MIB)

    small = fill(budget, "ann", MIB)

    assert len(small) == 37  # up to seven eighths
    budget.open("ben").resize(MIB)


def test_memory_that_is_given_back_is_free_again(budget: MemoryBudget) -> None:
    held = fill(budget, "ann", 10 * MIB)
    for reservation in held:
        reservation.shrink(11 * MIB)  # does not grow
        reservation.shrink(1 * MIB)
    assert budget.num_bytes == len(held) * MIB
    for reservation in held:
        reservation.release()
        reservation.release()

    assert budget.num_bytes == 0
    assert len(fill(budget, "ann", 10 * MIB)) == len(held)


def test_a_client_that_holds_nothing_is_forgotten(budget: MemoryBudget) -> None:
    class Name(str):
        """A client's name, whose release shows."""

    name = Name("ann")
    known = weakref.ref(name)
    one = budget.open(name)
    one.resize(MIB)
    one.release()

    del one, name

    assert known() is None


def test_a_refusal_changes_nothing(budget: MemoryBudget) -> None:
    one = budget.open("ann")
    one.resize(40 * MIB)
    other = budget.open("ann")
    other.resize(5 * MIB)

    with pytest.raises(MemoryFull):
        other.resize(20 * MIB)

    assert (one.num_bytes, other.num_bytes, budget.num_bytes) == (40 * MIB, 5 * MIB, 45 * MIB)


def test_a_request_that_can_never_fit_is_refused_permanently(budget: MemoryBudget) -> None:
    with pytest.raises(TooMuchMemory, match=f"about {51 * MIB} bytes of memory; the maximum is {50 * MIB}") as raised:
        budget.open("ann").resize(51 * MIB)

    assert raised.value.status == 413
    assert raised.value.retry_after_s is None
    budget.open("ann").resize(50 * MIB)


def test_the_message_has_the_figures(budget: MemoryBudget) -> None:
    fill(budget, "ann", 10 * MIB)

    with pytest.raises(MemoryFull) as raised:
        budget.open("ann").resize(3 * MIB)

    assert raised.value.status == 503
    assert f"needs {3 * MIB} more bytes" in raised.value.message
    assert f"{50 * MIB} of {100 * MIB} are reserved, {50 * MIB} of them for ann's" in raised.value.message


def test_the_advice_follows_from_how_fast_memory_is_given_back(budget: MemoryBudget, clock: Clock) -> None:
    held = fill(budget, "ann", 10 * MIB)
    assert refusal(budget).retry_after_s == 5  # nothing is known yet

    for _ in range(100):  # 1 MiB per second, again and again
        clock.now += 1
        held[0].resize(9 * MIB)
        held[0].resize(10 * MIB)

    assert refusal(budget, 10 * MIB).retry_after_s in {10, 11}  # then it would hold half
    assert refusal(budget, 10 * MIB).retry_after_s > refusal(budget, 3 * MIB).retry_after_s
    clock.now += 200
    assert refusal(budget, 10 * MIB).retry_after_s == 120


def refusal(budget: MemoryBudget, num_bytes: int = 2 * MIB) -> MemoryFull:
    with pytest.raises(MemoryFull) as raised:
        budget.open("ann").resize(num_bytes)
    return raised.value
