"""A thread launches a batch while its card computes the previous one: the time of the launch, and failures."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from gateway.backends.watchdog import Stopwatch
from gateway.engine import faults
from gateway.engine import worker as worker_module
from gateway.engine.ahead import Launched, Pace, Window
from gateway.engine.batch_queue import BatchQueue
from gateway.engine.batcher import Batcher, Limits
from gateway.engine.model.in_flight import InFlight
from gateway.engine.model.items import Encoded, Item
from gateway.engine.scheduler import RequestHandle
from gateway.engine.worker import Worker
from gateway.errors import InferenceFailed, ModelRecovering
from gateway.types import Priority
from tests.engine.scripted import PATIENCE_S, MakeJob, NumberEncoder, answer, becomes, raise_for
from tests.engine.test_worker import Delivered, sequences, waiters

SHUT, OPEN = Window(math.inf, -math.inf, math.inf), Window(-math.inf, math.inf, math.inf)
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Flight:
    """A batch on the emulated card, which computes it until a test says that it is done, or has failed."""

    def __init__(self, encoder: CardEncoder, batch: list[list[int]]) -> None:
        self._encoder, self._batch = encoder, batch
        self.is_awaited = threading.Event()
        self._done = threading.Event()
        self._error: RuntimeError | None = None

    def end(self, error: RuntimeError | None = None) -> None:
        self._error = error
        self._done.set()

    @property
    def is_done(self) -> bool:
        if self._done.is_set() and self._error is not None:
            raise self._error
        return self._done.is_set()

    def wait(self) -> None:
        self.is_awaited.set()
        assert self._done.wait(PATIENCE_S)
        if self._error is not None:
            raise self._error

    def read(self) -> list[Encoded]:
        self._encoder.did("read", self._batch)
        return self._encoder.vectors(self._batch)


class CardEncoder(NumberEncoder):
    """Computes on an emulated card.

    Attributes:
        on_launch: called with the numbers of each batch that is launched; may raise.
        events: what was done, with the first numbers of the batch.
        flights: the launched batches.
        is_over: the card is done with every batch at once.
    """

    works_ahead = True
    device = "cuda:0"

    def __init__(self) -> None:
        super().__init__()
        self.on_launch: Callable[[list[list[int]]], None] = lambda _batch: None
        self.events: list[tuple[str, list[int]]] = []
        self.flights: list[Flight] = []
        self.is_over = False
        self._changed = threading.Condition()

    def did(self, what: str, batch: list[list[int]]) -> None:
        with self._changed:
            self.events.append((what, [ids[0] for ids in batch]))
            self._changed.notify_all()

    def begin(self, items: Sequence[Item]) -> Any:
        batch = [item.tokens.ids for item in items]
        self.num_padding += 10 * len(batch)
        self.progressed_at = time.monotonic()
        flight = Flight(self, batch)
        if self.is_over:
            flight.end()
        try:
            self.on_launch(batch)
            self.flights.append(flight)
        finally:
            self.did("launch", batch)
        return flight

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        self.did("encode", [item.tokens.ids for item in items])
        return super().encode(items)

    def wait_for(self, what: str, *numbers: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: (what, list(numbers)) in self.events, PATIENCE_S), self.events


class ScriptedPace(Pace):
    """Allows launches when a test allows them.

    Attributes:
        opened: the window of every batch.
        noted: what the worker has reported.
    """

    def __init__(self) -> None:
        super().__init__()
        self.opened = OPEN
        self.noted: list[dict[str, float]] = []

    def window(self, num_tokens: int, begun: float) -> Window:
        return _Follows(self)  # type: ignore[return-value]

    def note(self, num_tokens: int, **seconds: float) -> None:
        self.noted.append({"num_tokens": num_tokens, **seconds})


class _Follows:
    """The window of a pace at each moment."""

    def __init__(self, pace: ScriptedPace) -> None:
        self._pace = pace

    def __getattr__(self, name: str) -> float:
        return float(getattr(self._pace.opened, name))


class Bench:
    """A worker of an emulated card with its queue; batches have up to ten tokens."""

    def __init__(self, encoder: CardEncoder, pace: ScriptedPace) -> None:
        self.encoder, self.pace = encoder, pace
        self.queue, self.delivered = BatchQueue(10), Delivered()
        self.faults: list[list[int]] = []
        self.reported = threading.Event()
        self.lost: list[tuple[int, str]] = []
        self.worker = Worker(
            "numbers", encoder, self.queue, self.delivered, self._faulted, 0, lambda *how: self.lost.append(how)
        )

    def _faulted(self, lost: Sequence[Any]) -> None:
        self.faults.append([one.item.tokens.ids[0] for one in lost])
        self.reported.set()

    def add(self, *numbers: int, length: int = 5, handle: RequestHandle | None = None) -> None:
        self.queue.add(waiters(sequences(numbers, length, handle)))

    def launch_two(self) -> None:
        """Have batches of the texts 1 and 2, and 3 and 4, on the card."""
        self.add(1, 2, 3, 4)
        self.encoder.wait_for("launch", 3, 4)

    def join(self) -> None:
        self.worker.thread.join(PATIENCE_S)
        assert not self.worker.thread.is_alive()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Return a worker that launches ahead whenever it can."""
    monkeypatch.setattr(faults, "still_computes", lambda _device: True)
    pace = ScriptedPace()
    monkeypatch.setattr(worker_module, "Pace", lambda: pace)
    bench = Bench(CardEncoder(), pace)
    bench.worker.start()
    yield bench
    bench.encoder.is_over = True
    bench.queue.close()
    for flight in bench.encoder.flights:
        flight.end()
    bench.join()


# -------------------------------------------------------------------------------------------------------- two batches


def test_a_batch_is_launched_before_the_one_on_the_card_is_read(bench: Bench) -> None:
    bench.launch_two()
    assert bench.delivered.texts == []
    assert [one.item.tokens.ids[0] for one in bench.worker.in_hand] == [1, 2, 3, 4]

    bench.encoder.flights[0].end()
    bench.delivered.wait(2)
    bench.encoder.flights[1].end()
    bench.delivered.wait(4)

    assert bench.encoder.events == [("launch", [1, 2]), ("launch", [3, 4]), ("read", [1, 2]), ("read", [3, 4])]
    assert [len(batch.sequences) for batch in bench.delivered.batches] == [2, 2]
    assert [batch.num_padding for batch in bench.delivered.batches] == [20, 20]


def test_no_more_than_two_batches_are_on_the_card(bench: Bench) -> None:
    bench.add(*range(1, 9))
    bench.encoder.wait_for("launch", 3, 4)

    bench.encoder.flights[0].end()
    bench.encoder.wait_for("launch", 5, 6)

    assert bench.encoder.events.index(("read", [1, 2])) < bench.encoder.events.index(("launch", [5, 6]))


def test_a_text_that_arrives_while_a_batch_runs_is_in_the_next_one(bench: Bench) -> None:
    """So the next batch is not taken before it is time."""
    bench.pace.opened = SHUT
    bench.add(*range(1, 9), handle=RequestHandle("bulk", math.inf))
    bench.encoder.wait_for("launch", 1, 2)

    bench.add(100, length=1, handle=RequestHandle("other", math.inf))
    bench.pace.opened = OPEN
    bench.encoder.wait_for("launch", 3, 100)

    assert bench.encoder.events == [("launch", [1, 2]), ("launch", [3, 100])]


def test_a_result_does_not_wait_for_more_work(bench: Bench) -> None:
    bench.add(1, 2)
    bench.encoder.wait_for("launch", 1, 2)

    bench.encoder.flights[0].end()
    bench.delivered.wait(2)

    assert bench.encoder.events == [("launch", [1, 2]), ("read", [1, 2])]


def test_a_result_is_read_at_once_if_it_comes_before_the_time_of_a_launch(bench: Bench) -> None:
    bench.pace.opened = SHUT
    bench.add(1, 2, 3, 4)
    bench.encoder.wait_for("launch", 1, 2)

    bench.encoder.flights[0].end()
    bench.encoder.wait_for("launch", 3, 4)

    assert bench.encoder.events == [("launch", [1, 2]), ("read", [1, 2]), ("launch", [3, 4])]


def test_near_its_expected_end_a_batch_is_awaited(bench: Bench) -> None:
    bench.pace.opened = Window(-math.inf, math.inf, -math.inf)
    bench.add(1, 2, 3, 4)
    bench.encoder.wait_for("launch", 1, 2)

    bench.encoder.flights[0].end()
    bench.encoder.wait_for("launch", 3, 4)

    assert bench.encoder.events == [("launch", [1, 2]), ("read", [1, 2]), ("launch", [3, 4])]


def test_a_batch_counts_from_the_end_of_the_one_before(bench: Bench) -> None:
    """Not from its launch, when the card computed another one: the card would seem to be half as fast."""
    bench.launch_two()
    before = time.monotonic()
    bench.encoder.flights[0].end()
    bench.delivered.wait(2)
    after = time.monotonic()
    bench.encoder.flights[1].end()
    bench.delivered.wait(4)

    first, second = bench.delivered.batches
    assert first.started < before <= first.started + first.device_s <= after
    assert second.started == pytest.approx(first.started + first.device_s, rel=0, abs=1e-6)
    assert second.started + second.device_s <= second.ended


def test_the_pace_is_learned_from_batches_that_are_not_small(bench: Bench) -> None:
    bench.add(1, 2)
    bench.encoder.wait_for("launch", 1, 2)
    bench.encoder.flights[0].end()
    bench.delivered.wait(2)
    assert bench.pace.noted == []

    bench.add(3, length=600)
    bench.encoder.wait_for("launch", 3)
    bench.encoder.flights[1].end()
    bench.delivered.wait(3)

    [noted] = bench.pace.noted
    [_small, batch] = bench.delivered.batches
    assert noted["num_tokens"] == 600
    assert noted["device_s"] == batch.device_s
    assert noted["read_s"] == pytest.approx(batch.ended - batch.started - batch.device_s, rel=0, abs=1e-6)
    assert 0 < noted["launch_s"] < batch.device_s


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_batch_that_fails_on_the_card_does_not_fail_the_one_behind_it(bench: Bench) -> None:
    bench.encoder.on_forward = raise_for(2, RuntimeError("broken"))
    bench.launch_two()

    bench.encoder.flights[0].end(RuntimeError("broken"))
    bench.encoder.flights[1].end()
    bench.delivered.wait(4)

    assert bench.encoder.events[2:] == [("read", [3, 4]), ("encode", [1]), ("encode", [2])]
    assert bench.delivered.texts == [3, 4, 1, 2]
    results = [result for batch in bench.delivered.batches for result in batch.results]
    assert [type(result) for result in results] == [Encoded, Encoded, Encoded, InferenceFailed]
    assert bench.faults == []


def test_a_batch_that_cannot_be_launched_does_not_fail_the_one_on_the_card(bench: Bench) -> None:
    bench.encoder.on_launch = bench.encoder.on_forward = raise_for(4, RuntimeError("broken"))
    bench.launch_two()
    bench.add(5)

    bench.encoder.flights[0].end()
    bench.delivered.wait(4)

    assert bench.encoder.events[2:5] == [("read", [1, 2]), ("encode", [3]), ("encode", [4])]
    results = [result for batch in bench.delivered.batches for result in batch.results]
    assert [type(result) for result in results] == [Encoded, Encoded, Encoded, InferenceFailed]
    bench.encoder.wait_for("launch", 5)


@pytest.mark.parametrize("place", ["wait", "launch"])
def test_two_batches_that_fail_are_both_tried_again(bench: Bench, place: str) -> None:
    """Neither batch waits for the other."""
    if place == "launch":
        bench.encoder.on_launch = raise_for(4, RuntimeError("broken"))
    bench.launch_two()

    for flight in bench.encoder.flights:
        flight.end(RuntimeError("broken"))
    bench.delivered.wait(4)

    assert sorted(bench.delivered.texts) == [1, 2, 3, 4]
    assert all(isinstance(result, Encoded) for batch in bench.delivered.batches for result in batch.results)
    assert bench.faults == []
    bench.add(5)
    bench.encoder.wait_for("launch", 5)


def test_a_batch_without_memory_next_to_another_one_is_tried_again_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "release_memory", lambda: bench.encoder.did("release", []))
    bench.encoder.on_launch = raise_for(4, torch.OutOfMemoryError("CUDA out of memory (scripted)"))
    bench.launch_two()

    bench.encoder.flights[0].end()
    bench.delivered.wait(4)

    assert bench.encoder.events[2:] == [("read", [1, 2]), ("release", []), ("encode", [3, 4])]
    assert all(isinstance(result, Encoded) for batch in bench.delivered.batches for result in batch.results)


def test_a_batch_without_memory_is_halved_if_it_was_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "release_memory", lambda: bench.encoder.did("release", []))
    bench.encoder.on_launch = raise_for(2, torch.OutOfMemoryError("CUDA out of memory (scripted)"))
    bench.add(1, 2)
    bench.delivered.wait(2)

    assert bench.encoder.events == [("launch", [1, 2]), ("release", []), ("encode", [1]), ("encode", [2])]


def test_a_result_that_is_not_finite_is_computed_again_behind_the_next_batch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: list[int] = []

    def vectors(batch: list[list[int]]) -> list[Encoded]:
        encoded = NumberEncoder.vectors(bench.encoder, batch)
        for one in encoded:
            one.dense[one.dense == 2] = math.inf
        return encoded

    def encode_exactly(items: Sequence[Item]) -> list[Encoded]:
        exact.extend(item.tokens.ids[0] for item in items)
        return NumberEncoder.vectors(bench.encoder, [item.tokens.ids for item in items])

    bench.encoder.accumulates_in_float16 = True
    monkeypatch.setattr(bench.encoder, "vectors", vectors)
    monkeypatch.setattr(bench.encoder, "encode_exactly", encode_exactly)
    bench.launch_two()

    bench.encoder.flights[0].end()
    bench.delivered.wait(2)

    assert exact == [2]
    results = bench.delivered.batches[0].results
    assert [one.dense.tolist() for one in results if isinstance(one, Encoded)] == [[[1, 5]], [[2, 5]]]


@pytest.mark.parametrize("place", ["wait", "launch"])
def test_a_lost_card_costs_both_batches(bench: Bench, place: str) -> None:
    if place == "launch":
        bench.encoder.on_launch = raise_for(4, LOST)
    bench.launch_two()
    if place == "wait":
        bench.encoder.flights[0].end(LOST)
    bench.join()

    assert bench.lost == [(0, str(LOST))]
    assert [one.item.tokens.ids[0] for one in bench.worker.in_hand] == [1, 2, 3, 4]
    assert bench.delivered.texts == []
    assert bench.worker.busy_since is None
    assert [what for what, _numbers in bench.encoder.events] == ["launch", "launch"]


async def test_each_request_of_a_lost_card_gets_one_error(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "Pace", ScriptedPace)
    encoder = CardEncoder()
    batcher = Batcher("numbers", [encoder], Limits(2, 100, 10_000))
    await batcher.spawn()
    requests = [asyncio.create_task(answer(batcher.submit(make_job(f"{number} 0")))) for number in (1, 2, 3)]
    assert await becomes(lambda: len(encoder.flights) == 2)

    encoder.flights[0].end(LOST)

    assert [type(error) for error in await asyncio.gather(*requests)] == [ModelRecovering] * 3
    assert len(encoder.events) == 2
    assert await becomes(lambda: batcher.num_requests == 0)


def test_a_fault_of_the_workers_own_code_loses_the_sequences_in_hand(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = worker_module.FinishedBatch

    def fail(*args: Any) -> None:
        monkeypatch.setattr(worker_module, "FinishedBatch", real)
        raise KeyError("a bug")

    monkeypatch.setattr(worker_module, "FinishedBatch", fail)
    bench.launch_two()
    bench.encoder.flights[0].end()
    bench.add(5)
    bench.encoder.wait_for("launch", 5)
    bench.encoder.flights[2].end()
    bench.delivered.wait(1)

    assert bench.faults == [[1, 2, 3, 4]]
    assert bench.delivered.texts == [5]


def test_a_fault_of_the_queue_costs_no_batch_that_is_on_the_card(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the fault is reported: requests that the queue has lost would otherwise never be answered."""
    bench.pace.opened = SHUT
    bench.add(1, 2)
    bench.encoder.wait_for("launch", 1, 2)

    def fail(_replica: int) -> None:
        monkeypatch.undo()
        raise KeyError("a bug")

    monkeypatch.setattr(bench.queue, "batch_ahead", fail)
    bench.pace.opened = OPEN
    assert bench.reported.wait(PATIENCE_S)
    bench.encoder.flights[0].end()
    bench.delivered.wait(2)

    assert bench.faults == [[]]
    assert bench.delivered.texts == [1, 2]


# ------------------------------------------------------------------------------------------------------- hang and stop


def test_a_card_that_hangs_shows_no_progress_after_the_next_launch(bench: Bench) -> None:
    bench.pace.opened = SHUT
    bench.add(1, 2, 3, 4)
    bench.encoder.wait_for("launch", 1, 2)
    since = bench.worker.busy_since
    assert since is not None
    bench.pace.opened = OPEN
    assert bench.encoder.flights[0].is_awaited.wait(PATIENCE_S)  # after the launch of the second
    assert bench.worker.busy_since == since
    stopwatch = Stopwatch(10.0, since)
    looks = [stopwatch.look([bench.worker.busy_since], since + seconds)[0] for seconds in (10, 20, 30)]
    assert looks == pytest.approx([10, 20, 30])

    before = time.monotonic()
    bench.encoder.flights[0].end()
    bench.delivered.wait(2)
    now_since = bench.worker.busy_since
    assert now_since is not None
    assert now_since >= before  # the card has begun with the second batch
    bench.encoder.flights[1].end()


def test_a_stop_answers_what_is_on_the_card(bench: Bench) -> None:
    bench.launch_two()
    bench.add(5)

    bench.queue.close()
    for flight in bench.encoder.flights:
        flight.end()
    bench.join()

    assert bench.delivered.texts == [1, 2, 3, 4]


def test_a_retired_worker_finishes_what_is_on_the_card(bench: Bench) -> None:
    bench.launch_two()
    bench.add(5)

    bench.worker.is_retired = True
    for flight in bench.encoder.flights:
        flight.end()
    bench.join()

    assert bench.delivered.texts == [1, 2, 3, 4]
    assert bench.queue.num_waiting == 1


# ----------------------------------------------------------------------------------------------------- queue and pace


def test_an_idle_thread_takes_work_before_one_whose_card_is_busy() -> None:
    queue = BatchQueue(10)
    taken: list[int] = []
    idle = threading.Thread(target=lambda: taken.append(len(queue.next_batch(1))), daemon=True)
    idle.start()
    deadline = time.monotonic() + PATIENCE_S
    while not queue._num_idle and time.monotonic() < deadline:
        time.sleep(0.001)
    queue._lanes.add(waiters(sequences([1], 5)))  # queued, but the thread has not woken up yet

    assert queue.batch_ahead(0) == []
    queue.add(waiters(sequences([2], 5)), replica=0)
    assert [one.item.tokens.ids for one in queue.batch_ahead(0)] == [[2] * 5]  # which no other thread may take
    queue.add([])  # wakes the idle thread
    idle.join(PATIENCE_S)
    assert taken == [1]
    queue.add(waiters(sequences([3], 5)))
    assert [one.item.tokens.ids for one in queue.batch_ahead(0)] == [[3] * 5]


def test_nothing_is_launched_ahead_while_small_requests_come() -> None:
    """The next one would wait for it."""
    queue = BatchQueue(100)
    bulk = waiters(sequences(range(20), 10, RequestHandle("bulk", math.inf)))
    queue.add([*bulk, *waiters(sequences([7], 10, RequestHandle("other", math.inf)))])
    assert len(queue.batch_ahead()) > 1  # with the small request

    assert queue.batch_ahead() == []
    assert queue.next_batch()


def test_low_priority_work_is_not_launched_ahead() -> None:
    """A request waits for at most one batch of it."""
    queue = BatchQueue(10)
    queue.add(waiters(sequences([1], handle=RequestHandle("a", math.inf, priority=Priority.LOW))))

    assert queue.batch_ahead() == []
    queue.add(waiters(sequences([2])))
    assert [one.item.tokens.ids for one in queue.batch_ahead()] == [[2]]
    assert [one.item.tokens.ids for one in queue.next_batch()] == [[1]]


def test_a_closed_queue_gives_nothing_ahead() -> None:
    queue = BatchQueue(10)
    queue.add(waiters(sequences([1])))
    queue.close()

    assert queue.batch_ahead() == []


def window(launch_s: float, device_s: float, read_s: float) -> tuple[float, float, float]:
    """Return the window of a batch that begins at 0 and is like the ones before, in milliseconds."""
    pace = Pace()
    for _ in range(3):
        pace.note(1000, launch_s=launch_s / 1e3, device_s=device_s / 1e3, read_s=read_s / 1e3)
    found = pace.window(1000, 0.0)
    assert found is not None
    return tuple(round(1e3 * one, 6) for one in (found.first, found.last, found.end))  # type: ignore[return-value]


def test_without_a_rate_nothing_is_launched_ahead() -> None:
    assert Pace().window(1000, 0.0) is None


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((10, 22, 1), (9, 15.5, 22)),  # a launch, and 3 ms to spare
        ((10, 200, 1), (180, 190, 200)),  # 5 % to spare
        ((10, 22, 11), (9, 20, 22)),  # reading is slow: even a late launch keeps the card busy in the meantime
        ((10, 22, 50), (9, 21, 22)),  # but for no longer than the card computes after a launch
    ],
    ids=str,
)
def test_a_batch_is_launched_so_that_it_is_ready_when_the_card_is(
    times: tuple[float, float, float], expected: tuple[float, float, float]
) -> None:
    assert window(*times) == expected


def test_a_card_that_waits_for_launches_gets_none_ahead() -> None:
    """A launch takes as long as the card: it would only delay the results of the batch before."""
    _first, last, _end = window(10, 11, 1)

    assert last < 10  # when the launch of the running batch is over


def test_a_window_follows_the_number_of_tokens() -> None:
    pace = Pace()
    pace.note(1000, launch_s=0.01, device_s=0.1, read_s=0.0)

    found = pace.window(2000, 5.0)

    assert found is not None
    assert found.end == pytest.approx(5.2)
    assert found.first == pytest.approx(5.18)


def test_the_pace_follows_the_newest_batches_slowly() -> None:
    pace = Pace()
    pace.note(1000, launch_s=0.01, device_s=0.1, read_s=0.0)
    pace.note(1000, launch_s=0.02, device_s=0.05, read_s=0.1)  # a fifth of each difference counts

    found = pace.window(1200, 0.0)

    assert found is not None
    assert found.end == pytest.approx(0.1)  # 12,000 tokens per second
    assert found.first == pytest.approx(0.1 - 0.012 - 0.005)
    assert found.last == pytest.approx(0.1 - 0.012 - 0.005 + 0.02)


def test_a_batch_in_no_time_has_a_pace() -> None:
    pace = Pace()
    pace.note(1000, launch_s=0.0, device_s=0.0, read_s=0.0)

    found = pace.window(1000, 0.0)

    assert found is not None
    assert found.end == pytest.approx(1e-6)


class Event:
    """The end of a batch on a card."""

    def __init__(self, answer: bool | RuntimeError) -> None:
        self._answer = answer

    def query(self) -> bool:
        if isinstance(self._answer, RuntimeError):
            raise self._answer
        return self._answer


@pytest.mark.parametrize(
    ("answer", "is_done"), [(False, False), (True, True), (RuntimeError("CUDA error"), True)], ids=str
)
def test_a_batch_is_done_when_a_wait_for_it_would_return_or_fail(
    answer: bool | RuntimeError, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_flight = InFlight(list, torch.device("cpu"))
    monkeypatch.setattr(in_flight, "_end", Event(answer))

    assert Launched([], 0.0, in_flight=in_flight).is_done is is_done
    assert Launched([], 0.0).is_done
