"""A failing batch is halved until only the guilty texts are left; replicas share one batch_queue."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gateway.engine import batch_queue as queue_module
from gateway.engine import faults
from gateway.engine import worker as worker_module
from gateway.engine.batch_queue import BatchQueue
from gateway.engine.model.items import Encoded, Item, Tokens
from gateway.engine.scheduler import RequestHandle, TokenSequence, Waiter
from gateway.engine.worker import FinishedBatch, Worker
from gateway.errors import InferenceFailed, InvalidVectors, OutOfMemory
from gateway.telemetry import metrics
from gateway.types import Priority
from tests.engine.scripted import PATIENCE_S, Gate, NumberEncoder, raise_for

TokenSequences = list[TokenSequence]


def sequences(numbers: Iterable[int], length: int = 1, handle: RequestHandle | None = None) -> TokenSequences:
    """Return one sequence for each number, of one request."""
    owner = handle or RequestHandle("someone", math.inf)
    made = [TokenSequence(Item(Tokens([number] * length))) for number in numbers]
    for i, sequence in enumerate(made):
        sequence.waiters.append(Waiter(owner, i, sequence, 0.0))
    return made


def waiters(some: TokenSequences) -> list[Waiter]:
    return [waiter for sequence in some for waiter in sequence.waiters]


class Delivered:
    """Takes finished batches, in any thread."""

    def __init__(self) -> None:
        self.batches: list[FinishedBatch] = []
        self._changed = threading.Condition()

    def __call__(self, batch: FinishedBatch) -> None:
        with self._changed:
            self.batches.append(batch)
            self._changed.notify_all()

    @property
    def texts(self) -> list[int]:
        return [one.item.tokens.ids[0] for batch in self.batches for one in batch.sequences]

    def wait(self, num_texts: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.texts) >= num_texts, PATIENCE_S)


@pytest.fixture
def delivered() -> Delivered:
    return Delivered()


def no_fault(*_lost: object) -> None:
    raise AssertionError("the worker's own code failed")


Start = Callable[..., Worker]


@pytest.fixture
def start(delivered: Delivered) -> Iterator[Start]:
    """Return a function that starts a worker; each is stopped in the end."""
    started: list[tuple[Worker, BatchQueue]] = []

    def start(
        encoder: NumberEncoder,
        batch_queue: BatchQueue,
        on_fault: Callable[..., None] = no_fault,
        replica: int = 0,
        on_card_lost: Callable[[int, str], None] = no_fault,
        warm_up: Sequence[Sequence[Item]] = (),
    ) -> Worker:
        worker = Worker("numbers", encoder, batch_queue, delivered, on_fault, replica, on_card_lost, warm_up)
        worker.start()
        started.append((worker, batch_queue))
        return worker

    yield start
    for worker, batch_queue in started:
        batch_queue.close()
        worker.thread.join(PATIENCE_S)
        assert not worker.thread.is_alive()


def run_one(encoder: NumberEncoder, batch: TokenSequences) -> FinishedBatch:
    """Compute one batch the way the worker's thread does."""
    return Worker("numbers", encoder, BatchQueue(10**6), lambda _batch: None, no_fault).compute(batch)


# ------------------------------------------------------------------------------------------------------------ halving


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.data())
def test_only_the_guilty_texts_fail_and_the_order_is_kept(num_texts: int, data: st.DataObject) -> None:
    guilty = data.draw(st.sets(st.integers(0, num_texts - 1), max_size=6))
    encoder = NumberEncoder()

    def on_forward(batch: list[list[int]]) -> None:
        if any(ids[0] in guilty for ids in batch):
            raise RuntimeError("broken")

    encoder.on_forward = on_forward
    batch = sequences(range(num_texts))

    finished = run_one(encoder, batch)

    assert finished.sequences == batch
    for number, result in enumerate(finished.results):
        if number in guilty:
            assert type(result) is InferenceFailed
        else:
            assert isinstance(result, Encoded)
            assert result.dense.tolist() == [[number, 1]]
    # A binary tree above each guilty text, and the other child of each of its nodes.
    assert len(encoder.batches) <= 1 + 2 * len(guilty) * math.ceil(math.log2(num_texts))
    assert len(encoder.batches) <= 2 * num_texts - 1


def test_one_guilty_text_among_64_costs_13_forwards() -> None:
    encoder = NumberEncoder()
    encoder.on_forward = raise_for(13, RuntimeError("broken"))

    run_one(encoder, sequences(range(64)))

    assert [len(batch) for batch in encoder.batches] == [64, 32, 16, 8, 8, 4, 4, 2, 1, 1, 2, 16, 32]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_out_of_memory_costs_only_the_texts_that_do_not_fit_alone(lengths: list[int], memory_tokens: int) -> None:
    encoder = NumberEncoder()

    def on_forward(batch: list[list[int]]) -> None:
        if sum(map(len, batch)) > memory_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory (scripted)")

    encoder.on_forward = on_forward
    batch = [one for i, length in enumerate(lengths) for one in sequences([i], length)]

    results = run_one(encoder, batch).results

    for i, (length, result) in enumerate(zip(lengths, results, strict=True)):
        if length > memory_tokens:
            assert isinstance(result, OutOfMemory)
            assert f"a text of {length} tokens" in result.message
            assert result.is_permanent
        else:
            assert isinstance(result, Encoded)
            assert result.dense.tolist() == [[i, length]]


def test_memory_is_given_back_when_the_error_no_longer_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Activations:
        is_alive = True

        def __del__(self) -> None:
            Activations.is_alive = False

    def on_forward(batch: list[list[int]]) -> None:
        _held_by_the_traceback = Activations()
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (scripted)")

    was_alive: list[bool] = []
    monkeypatch.setattr(worker_module, "release_memory", lambda: was_alive.append(Activations.is_alive))
    encoder = NumberEncoder()
    encoder.on_forward = on_forward

    run_one(encoder, sequences(range(2)))

    assert was_alive == [False]


def test_memory_is_not_given_back_for_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[None] = []
    monkeypatch.setattr(worker_module, "release_memory", lambda: released.append(None))
    encoder = NumberEncoder()
    encoder.on_forward = raise_for(1, RuntimeError("broken"))

    batch = run_one(encoder, sequences(range(4)))

    assert sum(not isinstance(result, Encoded) for result in batch.results) == 1
    assert released == []


def test_the_requests_of_guilty_texts_end_before_the_next_batch_is_taken() -> None:
    guilty, innocent = RequestHandle("a", math.inf), RequestHandle("b", math.inf)
    encoder = NumberEncoder()
    encoder.on_forward = raise_for(13, RuntimeError("broken"))
    batch = [*sequences([13], handle=guilty), *sequences([1], handle=innocent)]
    twin = RequestHandle("c", math.inf)
    batch[0].waiters.append(Waiter(twin, 0, batch[0], 0.0))

    run_one(encoder, batch)

    assert (guilty.is_live, twin.is_live, innocent.is_live) == (False, False, True)


def test_every_forward_that_raises_is_counted() -> None:
    def count() -> float:
        return metrics.REGISTRY.get_sample_value("gateway_failed_batches_total", {"model": "numbers"}) or 0.0

    encoder = NumberEncoder()
    encoder.on_forward = raise_for(13, RuntimeError("broken"))
    before = count()

    run_one(encoder, sequences(range(10)))
    assert count() == before
    run_one(encoder, sequences([12, 13]))
    assert count() == before + 2


@pytest.mark.parametrize(
    ("poison", "expected"),
    [((), 0), ((1,), 0), ((1, 2), 1)],
    ids=["all are well", "one is not", "none is"],
)
def test_failures_in_a_row_are_batches_that_gave_nothing_at_all(poison: Sequence[int], expected: int) -> None:
    encoder = NumberEncoder()
    worker = Worker("numbers", encoder, BatchQueue(10), lambda _batch: None, no_fault)

    def on_forward(batch: list[list[int]]) -> None:
        if any(ids[0] in poison for ids in batch):
            raise RuntimeError("broken")

    encoder.on_forward = on_forward
    worker.compute(sequences([1, 2]))
    assert worker.num_failed_in_a_row == expected
    worker.compute(sequences([1, 2]))
    assert worker.num_failed_in_a_row == 2 * expected
    worker.compute(sequences([3]))
    assert worker.num_failed_in_a_row == 0


def test_vectors_that_cannot_be_handed_out_count_as_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = NumberEncoder()
    worker = Worker("numbers", encoder, BatchQueue(10), lambda _batch: None, no_fault)
    monkeypatch.setattr(encoder, "width", 3)

    [result] = worker.compute(sequences([1])).results

    assert isinstance(result, InvalidVectors)
    assert result.is_permanent
    assert "shape (1, 2) instead of (1, 3)" in result.message
    assert worker.num_failed_in_a_row == 1


# -------------------------------------------------------------------------------------------------------------- batch_queue


def test_a_waiting_thread_is_woken_for_the_rest_of_anothers_batch(start: Start, delivered: Delivered) -> None:
    """One request, queued in one go, keeps all replicas busy."""
    batch_queue = BatchQueue(max_batch_tokens=4)
    together = threading.Barrier(3)
    encoders = [NumberEncoder() for _ in range(3)]
    for encoder in encoders:
        encoder.on_forward = lambda _batch: together.wait(PATIENCE_S) and None
        start(encoder, batch_queue)
    time.sleep(0.05)  # all of them wait

    batch_queue.add(waiters(sequences(range(12))))
    delivered.wait(12)  # none of the three forwards ends before all have begun

    assert sorted(delivered.texts) == list(range(12))
    assert [len(encoder.computed) for encoder in encoders] == [4, 4, 4]
    assert all(isinstance(result, Encoded) for batch in delivered.batches for result in batch.results)


def test_idle_threads_divide_the_work_that_one_of_them_could_take(start: Start, delivered: Delivered) -> None:
    batch_queue = BatchQueue(max_batch_tokens=10_000)
    together = threading.Barrier(3)
    encoders = [NumberEncoder() for _ in range(3)]
    for encoder in encoders:
        encoder.on_forward = lambda _batch: together.wait(PATIENCE_S) and None
        start(encoder, batch_queue)
    time.sleep(0.05)  # all of them wait

    batch_queue.add(waiters(sequences(range(30), length=20)))
    delivered.wait(30)

    assert [len(encoder.computed) for encoder in encoders] == [10, 10, 10]


def test_little_work_is_not_divided(start: Start, delivered: Delivered) -> None:
    batch_queue = BatchQueue(max_batch_tokens=10_000)
    encoders = [NumberEncoder() for _ in range(3)]
    for encoder in encoders:
        start(encoder, batch_queue)
    time.sleep(0.05)  # all of them wait

    batch_queue.add(waiters(sequences(range(16), length=4)))
    delivered.wait(16)

    assert sorted(len(encoder.computed) for encoder in encoders) == [0, 0, 16]


def test_a_thread_that_is_idle_alone_takes_all_that_fits(
    start: Start, delivered: Delivered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "_SHARED_S", 0.0)  # no small request is expected after the first ones
    batch_queue = BatchQueue(max_batch_tokens=100)
    busy, idle = NumberEncoder(), NumberEncoder()
    gate, second = Gate(), Gate()
    busy.on_forward, idle.on_forward = gate, second
    for encoder, held in ((busy, gate), (idle, second)):
        batch_queue.add(waiters(sequences([1000])))
        start(encoder, batch_queue)
        assert held.wait_reached()

    batch_queue.add(waiters(sequences(range(30), length=10)))
    second.open()
    delivered.wait(31)

    assert [len(batch) for batch in idle.batches] == [1, 10, 10, 10]
    gate.open()


def test_each_text_goes_to_one_replica(start: Start, delivered: Delivered) -> None:
    batch_queue = BatchQueue(max_batch_tokens=10)
    encoders = [NumberEncoder() for _ in range(3)]
    for encoder in encoders:
        encoder.on_forward = lambda _batch: time.sleep(0.0005)
        start(encoder, batch_queue)

    for first in range(0, 600, 6):
        batch_queue.add(waiters(sequences(range(first, first + 6), length=3)))
    delivered.wait(600)

    assert sorted(delivered.texts) == list(range(600))
    assert sorted(number for encoder in encoders for number in encoder.computed) == list(range(600))
    assert max(len(batch) for encoder in encoders for batch in encoder.batches) <= 3
    assert all(encoder.batches for encoder in encoders)


def test_a_replica_that_hangs_does_not_stop_the_other(start: Start, delivered: Delivered) -> None:
    batch_queue = BatchQueue(max_batch_tokens=1)
    hanging, well = NumberEncoder(), NumberEncoder()
    gate = Gate()
    hanging.on_forward = gate
    stuck = start(hanging, batch_queue)
    batch_queue.add(waiters(sequences([1000])))
    assert gate.wait_reached()
    other = start(well, batch_queue)

    batch_queue.add(waiters(sequences(range(100))))
    delivered.wait(100)

    assert delivered.texts == list(range(100))
    assert stuck.busy_since is not None
    assert stuck.thread.is_alive()
    gate.open()
    delivered.wait(101)
    assert delivered.texts[-1] == 1000
    assert other.num_failed_in_a_row == stuck.num_failed_in_a_row == 0


def test_a_replica_that_fails_everything_counts_its_own_failures(start: Start, delivered: Delivered) -> None:
    batch_queue = BatchQueue(max_batch_tokens=1)
    broken, well = NumberEncoder(), NumberEncoder()
    both_have_begun = threading.Barrier(2)

    def fail(_batch: object) -> None:
        both_have_begun.wait(PATIENCE_S)
        raise RuntimeError("broken")

    broken.on_forward = fail
    well.on_forward = lambda _batch: both_have_begun.wait(PATIENCE_S) and None
    workers = [start(encoder, batch_queue) for encoder in (broken, well)]

    for number in range(0, 6, 2):
        batch_queue.add(waiters([*sequences([number]), *sequences([number + 1])]))
        delivered.wait(number + 2)

    assert [worker.num_failed_in_a_row for worker in workers] == [3, 0]


def test_busy_since_is_when_the_forward_in_hand_began(start: Start, delivered: Delivered) -> None:
    batch_queue = BatchQueue(max_batch_tokens=1)
    encoder, gate = NumberEncoder(), Gate()
    encoder.on_forward = gate
    worker = start(encoder, batch_queue)
    assert worker.busy_since is None

    before = time.monotonic()
    batch_queue.add(waiters(sequences([1])))
    assert gate.wait_reached()
    reached = time.monotonic()

    assert worker.busy_since is not None
    assert before <= worker.busy_since <= reached
    gate.open()
    delivered.wait(1)
    deadline = time.monotonic() + PATIENCE_S
    while worker.busy_since is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert worker.busy_since is None


def test_each_half_of_a_batch_that_failed_is_progress() -> None:
    """A batch that is out of memory may be halved many times: slow, and not hung."""
    encoder = NumberEncoder()
    worker = Worker("numbers", encoder, BatchQueue(100), lambda _batch: None, no_fault)
    seen: list[float | None] = []

    def on_forward(batch: list[list[int]]) -> None:
        seen.append(worker.busy_since)
        time.sleep(0.002)
        if len(batch) > 1:
            raise RuntimeError("broken")

    encoder.on_forward = on_forward

    worker.compute(sequences(range(4)))

    assert len(seen) == 7
    assert None not in seen
    assert seen == sorted(set(seen), key=lambda since: since or 0)


def test_a_part_of_a_batch_that_is_done_is_progress() -> None:
    encoder = NumberEncoder()
    worker = Worker("numbers", encoder, BatchQueue(100), lambda _batch: None, no_fault)
    seen: list[float | None] = []

    def on_forward(_batch: object) -> None:
        seen.append(worker.busy_since)
        encoder.progressed_at = time.monotonic() + 1
        seen.append(worker.busy_since)

    encoder.on_forward = on_forward

    worker.compute(sequences([1]))

    assert seen[1] == encoder.progressed_at != seen[0]


def test_a_long_text_is_expected_to_take_longer_per_token() -> None:
    encoder = NumberEncoder()
    encoder.s_per_token = 0.1
    worker = Worker("numbers", encoder, BatchQueue(100), lambda _batch: None, no_fault)
    assert worker.expected_s == 0

    worker.in_hand = sequences([1, 2], length=10)
    assert worker.expected_s == pytest.approx(2.0, rel=0.01)
    worker.in_hand = sequences([1], length=30_000)
    assert worker.expected_s == pytest.approx(46_945, rel=0.01)  # 3,000 s at the speed of short texts


def test_a_closed_queue_ends_its_threads_and_keeps_queued_texts(start: Start, delivered: Delivered) -> None:
    batch_queue = BatchQueue(max_batch_tokens=1)
    encoder, gate = NumberEncoder(), Gate()
    encoder.on_forward = gate
    worker, idle = start(encoder, batch_queue), start(NumberEncoder(), BatchQueue(1))
    batch_queue.add(waiters(sequences(range(10))))
    assert gate.wait_reached()

    batch_queue.close()
    gate.open()

    worker.thread.join(PATIENCE_S)
    assert not worker.thread.is_alive()
    assert delivered.texts == [0]
    assert idle.thread.is_alive()


def test_a_cleared_queue_forgets_queued_texts(start: Start, delivered: Delivered) -> None:
    batch_queue = BatchQueue(max_batch_tokens=1)
    batch_queue.add(waiters(sequences(range(10))))

    batch_queue.clear()
    batch_queue.add(waiters(sequences([99])))
    start(NumberEncoder(), batch_queue)
    delivered.wait(1)

    assert delivered.texts == [99]


def test_a_fault_of_the_workers_own_code_is_reported_and_the_thread_continues(
    start: Start, delivered: Delivered, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_queue = BatchQueue(max_batch_tokens=1)
    faults: list[str] = []
    real_take = queue_module.take

    def take(queue: Any, *args: Any) -> TokenSequences:
        if queue and not faults:
            raise KeyError("a bug")
        return real_take(queue, *args)

    def on_fault(lost: Sequence[TokenSequence]) -> None:
        assert not lost  # it was the queue
        faults.append(threading.current_thread().name)
        batch_queue.clear()

    monkeypatch.setattr(queue_module, "take", take)
    start(NumberEncoder(), batch_queue, on_fault)

    batch_queue.add(waiters(sequences([1])))
    deadline = time.monotonic() + PATIENCE_S
    while not faults and time.monotonic() < deadline:
        time.sleep(0.001)
    batch_queue.add(waiters(sequences([2])))
    delivered.wait(1)

    assert faults == ["numbers-compute"]
    assert delivered.texts == [2]


def test_a_fault_that_recurs_is_a_failure_of_its_replica(
    start: Start, delivered: Delivered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog therefore asks that replica whether it still works."""
    batch_queue = BatchQueue(max_batch_tokens=1)
    lost: list[Sequence[TokenSequence]] = []

    def fail(*_args: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(worker_module, "FinishedBatch", fail)
    worker = start(NumberEncoder(), batch_queue, lost.append)
    batch = sequences(range(3))
    batch_queue.add(waiters(batch))
    deadline = time.monotonic() + PATIENCE_S
    while len(lost) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)

    assert lost == [[one] for one in batch]
    assert worker.num_failed_in_a_row == 3


# ------------------------------------------------------------------------------------------------- float16 accumulation


class OverflowingEncoder(NumberEncoder):
    """Gives infinity for a number above 100, unless its products add up in float32; for one above 1,000 in any case.

    Attributes:
        exact: the numbers of each batch that was computed exactly.
    """

    def __init__(self, *, accumulates_in_float16: bool) -> None:
        super().__init__()
        self.accumulates_in_float16 = accumulates_in_float16
        self.exact: list[list[int]] = []

    def vectors(self, batch: list[list[int]]) -> list[Encoded]:
        return self._cut(batch, 100)

    def encode_exactly(self, items: Sequence[Item]) -> list[Encoded]:
        batch = [item.tokens.ids for item in items]
        self.exact.append([ids[0] for ids in batch])
        return self._cut(batch, 1000)

    def _cut(self, batch: list[list[int]], limit: int) -> list[Encoded]:
        encoded = super().vectors(batch)
        for one in encoded:
            one.dense[one.dense > limit] = math.inf
        return encoded


def recomputed() -> float:
    return metrics.REGISTRY.get_sample_value("gateway_recomputed_texts_total", {"model": "numbers"}) or 0.0


def test_a_vector_that_is_not_finite_is_computed_again_before_it_fails() -> None:
    encoder, before = OverflowingEncoder(accumulates_in_float16=True), recomputed()

    results = run_one(encoder, sequences([1, 200, 3, 2000, 300])).results

    assert [type(result) for result in results] == [Encoded, Encoded, Encoded, InvalidVectors, Encoded]
    assert [result.dense[0, 0] for result in results if isinstance(result, Encoded)] == [1, 200, 3, 300]
    assert encoder.exact == [[200, 2000, 300]]
    assert recomputed() == before + 3


def test_a_vector_that_is_not_finite_in_float32_accumulation_fails() -> None:
    encoder, before = OverflowingEncoder(accumulates_in_float16=False), recomputed()

    results = run_one(encoder, sequences([1, 200])).results

    assert [type(result) for result in results] == [Encoded, InvalidVectors]
    assert encoder.exact == []
    assert recomputed() == before


# ------------------------------------------------------------------------------------------------------------ warm-up


def test_a_thread_warms_up_before_its_first_batch(start: Start, delivered: Delivered) -> None:
    batch_queue, threads = BatchQueue(max_batch_tokens=10**6), list[str]()
    encoder = NumberEncoder()
    encoder.on_forward = lambda _batch: threads.append(threading.current_thread().name)
    batch_queue.add(waiters(sequences([7])))
    warm_up = [[Item(Tokens([n] * n))] * n for n in (1, 2)]

    worker = start(encoder, batch_queue, warm_up=warm_up)
    delivered.wait(1)

    assert [len(batch) for batch in encoder.batches] == [1, 2, 1]
    assert set(threads) == {worker.thread.name}
    assert delivered.texts == [7]


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (torch.AcceleratorError("CUDA error: misaligned address"), True),
    ],
    ids=["too little memory", "lost"],
)
def test_a_warm_up_that_fails_costs_nothing_unless_the_card_is_lost(
    start: Start, delivered: Delivered, error: RuntimeError, is_lost: bool
) -> None:
    batch_queue, lost = BatchQueue(max_batch_tokens=10**6), list[tuple[int, str]]()
    encoder = NumberEncoder()
    encoder.device = "cuda:0"
    encoder.on_forward = raise_for(1, error)
    batch_queue.add(waiters(sequences([7])))

    worker = start(
        encoder,
        batch_queue,
        warm_up=[[Item(Tokens([1]))], [Item(Tokens([2]))]],
        on_card_lost=lambda *how: lost.append(how),
    )
    if is_lost:
        worker.thread.join(PATIENCE_S)
    else:
        delivered.wait(1)

    assert encoder.computed == ([1] if is_lost else [1, 7])
    assert lost == ([(0, "CUDA error: misaligned address")] if is_lost else [])


# -------------------------------------------------------------------------------------------------------- a lost card

ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(
            f"{ILLEGAL}\nCUDA kernel errors might be asynchronously reported at some other API call"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"),
    ],
    ids=repr,
)
def test_a_batch_on_a_lost_card_is_not_halved(
    start: Start, delivered: Delivered, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """Every further call would fail: 127 attempts for a batch of 64, and a traceback for each."""
    monkeypatch.setattr(faults, "still_computes", lambda _device: False)
    batch_queue, lost = BatchQueue(max_batch_tokens=10**6), list[tuple[int, str]]()
    encoder = NumberEncoder()
    encoder.device = "cuda:1"
    encoder.on_forward = raise_for(13, error)
    batch_queue.add(waiters(sequences(range(64))))

    with capture_logs() as lines:
        worker = start(encoder, batch_queue, replica=1, on_card_lost=lambda *how: lost.append(how))
        worker.thread.join(PATIENCE_S)

    assert not worker.thread.is_alive()
    assert [len(batch) for batch in encoder.batches] == [64]
    assert lost == [(1, str(error).split("\n")[0])]
    assert len(worker.in_hand) == 64
    assert worker.busy_since is None
    assert [(line["event"], line["exc_info"]) for line in lines] == [("batch_failed", True)]
    assert delivered.batches == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        torch.AcceleratorError("CUDA error: invalid configuration argument"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("the device has fallen off the bus"),
    ],
    ids=repr,
)
def test_an_error_that_a_card_survives_costs_its_own_text(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    monkeypatch.setattr(faults, "still_computes", lambda _device: True)
    encoder = NumberEncoder()
    encoder.device = "cuda:0"
    encoder.on_forward = raise_for(13, error)

    finished = run_one(encoder, sequences(range(64)))

    assert [i for i, result in enumerate(finished.results) if not isinstance(result, Encoded)] == [13]


def test_a_replica_that_was_given_up_takes_no_more_batches(start: Start, delivered: Delivered) -> None:
    """It hung and was replaced, and now it returns."""
    batch_queue, gate, encoder = BatchQueue(max_batch_tokens=1), Gate(), NumberEncoder()
    encoder.on_forward = gate
    batch_queue.add(waiters(sequences([1, 2])))
    worker = start(encoder, batch_queue)
    assert gate.wait_reached()

    worker.is_retired = True
    gate.open()
    worker.thread.join(PATIENCE_S)

    assert encoder.computed == [1]
    assert batch_queue.num_waiting == 1


# ------------------------------------------------------------------------------------------------ how large a batch is


def sizes_of(batch_queue: BatchQueue, number: int) -> list[int]:
    return [sum(one.item.num_tokens for one in batch_queue.next_batch()) for _ in range(number)]


@pytest.mark.parametrize(("tokens_per_s", "size"), [(100_000, 4000), (6_000, 3000), (1_000, 510), (10, 510)], ids=str)
def test_a_batch_is_so_small_that_it_takes_half_a_second_at_most(tokens_per_s: int, size: int) -> None:
    """But not so small that it is slow: the smallest forward costs as much as a forward of some hundred tokens."""
    batch_queue = BatchQueue(max_batch_tokens=4000)
    batch_queue.note_rate(4000, 4000 / tokens_per_s)
    batch_queue.add(waiters(sequences(range(2000), length=10)))

    assert sizes_of(batch_queue, 4) == [size] * 4


def test_small_batches_say_nothing_of_the_rate() -> None:
    batch_queue = BatchQueue(max_batch_tokens=4000)
    batch_queue.note_rate(4000, 2.0)
    for _ in range(100):
        batch_queue.note_rate(5, 0.1)
    batch_queue.add(waiters(sequences(range(800), length=10)))

    assert sizes_of(batch_queue, 2) == [1000] * 2


def test_the_rate_follows_the_newest_batch_slowly() -> None:
    batch_queue = BatchQueue(max_batch_tokens=4000)
    batch_queue.note_rate(4000, 1.0)
    batch_queue.note_rate(511, 0.001)  # too small to say anything
    batch_queue.note_rate(512, 0.064)  # 8,000 per second: the average is 4,400
    batch_queue.add(waiters(sequences(range(800), length=10)))

    assert sizes_of(batch_queue, 1) == [2200]


def test_the_texts_that_wait_are_counted_until_they_are_dropped() -> None:
    batch_queue = BatchQueue(max_batch_tokens=10)
    low = RequestHandle("low", math.inf, priority=Priority.LOW)
    assert batch_queue.is_empty

    for i, (handle, replica) in enumerate(((None, None), (low, None), (None, 1)), start=1):
        batch_queue.add(waiters(sequences([i] * i, handle=handle)), replica)
        assert batch_queue.num_waiting == i * (i + 1) // 2
        assert not batch_queue.is_empty
    batch_queue.clear()

    assert batch_queue.num_waiting == 0
    assert batch_queue.is_empty


@pytest.mark.parametrize("replica", [None, 1])
def test_texts_for_any_replica_or_for_one_are_waiting(replica: int | None) -> None:
    batch_queue = BatchQueue(max_batch_tokens=10)
    batch_queue.add(waiters(sequences([1])), replica)

    assert (batch_queue.num_waiting, batch_queue.is_empty) == (1, False)


def test_the_rate_is_learned_from_computed_batches(start: Start, delivered: Delivered) -> None:
    batch_queue = BatchQueue(max_batch_tokens=1000)
    encoder = NumberEncoder()
    encoder.on_forward = lambda _batch: time.sleep(1.0)
    batch_queue.add(waiters(sequences(range(300), length=10)))
    start(encoder, batch_queue)
    delivered.wait(100)
    encoder.on_forward = lambda _batch: None
    delivered.wait(300)

    assert len(delivered.batches[0].sequences) == 100
    assert len(delivered.batches[1].sequences) < 60


def test_a_small_request_waits_for_a_quarter_of_a_batch_of_others() -> None:
    batch_queue = BatchQueue(max_batch_tokens=4000)
    batch_queue.add(waiters(sequences(range(2000), length=10, handle=RequestHandle("bulk", math.inf))))
    assert sizes_of(batch_queue, 1) == [4000]

    batch_queue.add(waiters(sequences([7], length=10, handle=RequestHandle("other", math.inf))))

    assert sizes_of(batch_queue, 1) == [1010]


@pytest.mark.parametrize(("seconds", "size"), [(3600.0, 1000), (0.0, 4000)])
def test_the_next_small_request_will_not_wait_for_a_large_batch_either(
    monkeypatch: pytest.MonkeyPatch, seconds: float, size: int
) -> None:
    """For a while after the last one, batches of others stay small."""
    monkeypatch.setattr(queue_module, "_SHARED_S", seconds)
    batch_queue = BatchQueue(max_batch_tokens=4000)
    batch_queue.add(waiters(sequences(range(2000), length=10, handle=RequestHandle("bulk", math.inf))))
    batch_queue.add(waiters(sequences([7], length=10, handle=RequestHandle("other", math.inf))))

    assert sizes_of(batch_queue, 3)[1:] == [size, size]


@pytest.mark.parametrize(("tokens_per_s", "size"), [(100_000, 1000), (13_000, 650), (1_000, 120), (10, 120)], ids=str)
def test_a_small_request_waits_no_longer_than_a_moment_where_a_quarter_of_a_batch_takes_longer(
    tokens_per_s: int, size: int
) -> None:
    """But others get so much that a forward is not mostly fixed cost."""
    batch_queue = BatchQueue(max_batch_tokens=4000)
    batch_queue.note_rate(4000, 4000 / tokens_per_s)
    batch_queue.add(waiters(sequences(range(2000), length=10, handle=RequestHandle("bulk", math.inf))))
    batch_queue.add(waiters(sequences([7], length=10, handle=RequestHandle("other", math.inf))))

    assert sizes_of(batch_queue, 3)[1:] == [size, size]
