"""Every request gets an answer, and only the right one, with faulty models, callers and clocks."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from gateway.engine import batch_queue as queue_module
from gateway.engine import batcher as batcher_module
from gateway.engine import worker as worker_module
from gateway.engine.batcher import Batcher, Limits
from gateway.engine.infinity import Engine, EngineArgs
from gateway.engine.model.items import Encoded, Item
from gateway.errors import (
    BadInput,
    ContextLengthExceeded,
    DeadlineExceeded,
    InferenceFailed,
    InvalidVectors,
    ModelNotReady,
    ModelRecovering,
    OutOfMemory,
    Overloaded,
    RequestError,
    ShuttingDown,
)
from gateway.telemetry import metrics
from gateway.types import Embeddings, Output, SparseVector, Truncate
from tests.engine.scripted import (
    Gate,
    MakeJob,
    NumberEncoder,
    StartBatcher,
    answer,
    becomes,
    raise_for,
    texts_of,
    threads_of,
)

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


# ---------------------------------------------------------------------------------------------------------- results


async def test_each_of_many_callers_gets_its_own_vectors_in_order(
    start_batcher: StartBatcher, make_job: MakeJob
) -> None:
    batcher = await start_batcher(max_batch_tokens=50)
    rng = random.Random(1)
    requests = [
        [(rng.randrange(10**6), rng.randint(1, 80)) for _ in range(rng.choice([1, 1, 1, 7, 64, 65, 200]))]
        for _ in range(60)
    ]

    answers = await asyncio.gather(
        *[
            batcher.submit(make_job(*[" ".join([str(n)] * size) for n, size in request], caller=f"caller {i % 5}"))
            for i, request in enumerate(requests)
        ]
    )

    for request, embeddings in zip(requests, answers, strict=True):
        assert embeddings.vectors.dtype == np.float32
        assert embeddings.vectors.tolist() == [[n, min(size, 64)] for n, size in request]
        assert embeddings.num_tokens == [min(size, 64) for _n, size in request]
        assert embeddings.truncated == [i for i, (_n, size) in enumerate(request) if size > 64]
    assert await becomes(lambda: batcher.is_idle)


async def test_the_task_reaches_the_tokens(start_batcher: StartBatcher, make_job: MakeJob) -> None:
    batcher = await start_batcher()

    embeddings = await batcher.submit(make_job("1", task="99"))

    assert embeddings.vectors.tolist() == [[99, 2]]


async def test_each_request_gets_the_outputs_that_it_asks_for(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(items: Sequence[Item]) -> list[Encoded]:
        return [
            Encoded(
                np.zeros((1, 2), np.float32),
                sparse=SparseVector(np.array(item.tokens.ids), np.ones(1, np.float32))
                if "sparse" in item.outputs
                else None,
                multivector=np.full((1, 2), item.tokens.ids, np.float32) if "multivector" in item.outputs else None,
                states=np.full((1, 3), item.tokens.ids, np.float32) if "states" in item.outputs else None,
            )
            for item in items
        ]

    monkeypatch.setattr(encoder, "encode", encode)
    batcher = await start_batcher()

    def given(outputs: Sequence[Output]) -> Coroutine[Any, Any, Embeddings]:
        return batcher.submit(make_job("7", "8", outputs=outputs))

    dense, sparse, multi, states = await asyncio.gather(
        *[given([Output.DENSE, *more]) for more in ([], [Output.SPARSE], [Output.MULTIVECTOR], [Output.STATES])]
    )

    assert (dense.sparse, dense.multivectors, dense.states) == (None, None, None)
    assert sparse.sparse is not None
    assert [one.indices.tolist() for one in sparse.sparse] == [[7], [8]]
    assert multi.multivectors is not None
    assert [one.tolist() for one in multi.multivectors] == [[[7, 7]], [[8, 8]]]
    assert states.states is not None
    assert [one.tolist() for one in states.states] == [[[7, 7, 7]], [[8, 8, 8]]]
    assert (sparse.multivectors, multi.states, states.sparse) == (None, None, None)


async def test_the_sizes_of_batches_are_shown(start_batcher: StartBatcher, make_job: MakeJob) -> None:
    def shown() -> list[float]:
        names = ("batch_texts", "batch_tokens", "batch_fill_ratio")
        sums = [f"gateway_{name}_{part}" for name in names for part in ("count", "sum")]
        return [metrics.REGISTRY.get_sample_value(name, {"model": "numbers"}) or 0 for name in sums]

    batcher = await start_batcher(max_batch_tokens=10)
    before = shown()

    await batcher.submit(make_job("1 1 1 1 1"))

    assert [now - was for now, was in zip(shown(), before, strict=True)] == [1, 1, 1, 5, 1, 0.5]


async def test_a_limit_of_tokens_is_that_of_all_texts_together(start_batcher: StartBatcher, make_job: MakeJob) -> None:
    batcher = await start_batcher()

    enough, too_many = [
        await answer(batcher.submit(replace(make_job("1 1", "2"), max_total_tokens=limit))) for limit in (3, 2)
    ]

    assert isinstance(enough, Embeddings)
    assert isinstance(too_many, BadInput)


async def test_no_batch_is_larger_than_the_budget(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate
) -> None:
    batcher = await start_batcher(max_batch_tokens=10)
    encoder.on_forward = gate
    requests = [asyncio.create_task(batcher.submit(make_job(*texts_of(range(9), length=3)))) for _ in range(5)]
    await gate.reached()
    gate.open()

    await asyncio.gather(*requests)

    assert max(sum(map(len, batch)) for batch in encoder.batches) <= 10
    assert len(encoder.batches) < 45


async def test_a_job_without_texts_is_done_at_once(start_batcher: StartBatcher, make_job: MakeJob) -> None:
    batcher = await start_batcher()

    embeddings = await answer(batcher.submit(make_job()))

    assert isinstance(embeddings, Embeddings)
    assert embeddings.vectors.shape == (0, 2)


async def test_the_stages_of_a_request_are_parts_of_its_time(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any
) -> None:
    encoder.on_forward = lambda _batch: time.sleep(0.05)
    encoder.numbers.on_tokenize = lambda _texts: time.sleep(0.05)
    batcher = await start_batcher(max_batch_tokens=1)
    started = time.monotonic()

    timings = (await batcher.submit(make_job("1", "2", "3"))).timings

    total_s = time.monotonic() - started
    assert timings.tokenize_s >= 0.05
    assert timings.inference_s >= 0.15
    assert timings.queue_s < 0.05  # its texts waited, but while other texts of the request were computed
    assert sum(timings.stages.values()) <= total_s


async def test_time_on_two_devices_in_parallel_is_not_counted_twice(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any
) -> None:
    other = NumberEncoder()
    for one in (encoder, other):
        one.on_forward = lambda _batch: time.sleep(0.01)
    batcher = await start_batcher(max_batch_tokens=4, others=[other])
    started = time.monotonic()

    timings = (await batcher.submit(make_job(*texts_of(range(300))))).timings

    total_s = time.monotonic() - started
    assert other.batches
    assert encoder.batches
    assert timings.inference_s >= 0.3
    assert sum(timings.stages.values()) <= total_s


async def test_waiting_behind_others_is_queue_and_their_inference_is_not_one_s_own(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate
) -> None:
    batcher = await start_batcher(max_batch_tokens=1)
    encoder.on_forward = gate
    first = asyncio.create_task(batcher.submit(make_job("1")))
    await gate.reached()
    second = asyncio.create_task(batcher.submit(make_job("2")))
    assert await becomes(lambda: batcher.num_queued == 1)
    await asyncio.sleep(0.05)
    gate.open()

    timings = (await second).timings

    assert timings.queue_s >= 0.05
    assert timings.inference_s < timings.queue_s
    assert (await first).timings.inference_s >= 0.05


# --------------------------------------------------------------------------------------------------- a forward fails


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA out of memory"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (RuntimeError("the device has fallen off the bus"), InferenceFailed),
        (SystemExit(1), InferenceFailed),
        (KeyboardInterrupt(), InferenceFailed),
        (GeneratorExit(), InferenceFailed),
    ],
    ids=["out of memory", "MemoryError", "RuntimeError", "SystemExit", "KeyboardInterrupt", "GeneratorExit"],
)
async def test_a_forward_that_raises_fails_its_own_request_alone(
    start_batcher: StartBatcher,
    make_job: MakeJob,
    encoder: Any,
    gate: Gate,
    error: BaseException,
    expected: type[RequestError],
) -> None:
    batcher = await start_batcher(max_batch_tokens=2)
    encoder.on_forward = gate
    first = asyncio.create_task(batcher.submit(make_job("0")))
    await gate.reached()
    encoder.on_forward = raise_for(13, error)
    rest = [asyncio.create_task(answer(batcher.submit(make_job(str(n), caller=str(n))))) for n in (13, 1, 2, 3)]
    assert await becomes(lambda: batcher.num_queued == 4)
    gate.open()

    failed, *others = await asyncio.gather(*rest)

    assert (await first).vectors.tolist() == [[0, 1]]
    assert encoder.batches[1:] == [[[13], [1]], [[13]], [[1]], [[2], [3]]]
    assert type(failed) is expected
    assert [one.vectors.tolist() for one in others if isinstance(one, Embeddings)] == [[[1, 1]], [[2, 1]], [[3, 1]]]
    assert (await batcher.submit(make_job("4"))).vectors.tolist() == [[4, 1]]
    assert await becomes(lambda: batcher.is_idle)


async def test_out_of_memory_names_the_tokens_of_the_text_and_is_permanent(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any
) -> None:
    batcher = await start_batcher()
    encoder.on_forward = raise_for(13, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))

    error = await answer(batcher.submit(make_job("13 13 13", "1")))

    assert isinstance(error, OutOfMemory)
    assert "a text of 3 tokens" in error.message
    assert (error.status, error.is_permanent, error.retry_after_s) == (500, True, None)


async def test_the_queued_texts_of_a_failed_request_are_not_computed(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any
) -> None:
    batcher = await start_batcher(max_batch_tokens=1)
    encoder.on_forward = raise_for(0, RuntimeError("broken"))

    failed = await answer(batcher.submit(make_job(*texts_of(range(500)))))
    await batcher.submit(make_job("1000"))

    assert isinstance(failed, InferenceFailed)
    assert encoder.computed == [0, 1000]
    assert await becomes(lambda: batcher.is_idle)


@pytest.mark.parametrize(
    "vectors",
    [
        pytest.param(np.zeros((1, 3), np.float32), id="too wide"),
        pytest.param(np.zeros((1, 1), np.float32), id="too narrow"),
        pytest.param(np.zeros((2, 2), np.float32), id="too many rows"),
        pytest.param(np.zeros((0, 2), np.float32), id="no row"),
        pytest.param(np.zeros(2, np.float32), id="no matrix"),
        pytest.param(np.array([[1, np.nan]], np.float32), id="NaN"),
        pytest.param(np.array([[-np.inf, 1]], np.float32), id="infinity"),
    ],
)
async def test_a_vector_that_cannot_be_handed_out_fails_its_own_request_alone(
    start_batcher: StartBatcher,
    make_job: MakeJob,
    encoder: Any,
    gate: Gate,
    vectors: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batcher = await start_batcher()
    real_vectors = encoder.vectors
    encoder.on_forward = gate
    first = asyncio.create_task(batcher.submit(make_job("0")))
    await gate.reached()
    monkeypatch.setattr(
        encoder,
        "vectors",
        lambda rows: [
            Encoded(vectors) if ids == [13] else one for ids, one in zip(rows, real_vectors(rows), strict=True)
        ],
    )
    rest = [asyncio.create_task(answer(batcher.submit(make_job(str(n), caller=str(n))))) for n in (1, 13, 2)]
    assert await becomes(lambda: batcher.num_queued == 3)
    gate.open()

    answers = await asyncio.gather(*rest)

    await first
    assert [type(one) for one in answers] == [Embeddings, InvalidVectors, Embeddings]
    assert encoder.batches == [[[0]], [[1], [13], [2]]]  # nothing is computed again
    assert await becomes(lambda: batcher.is_idle)


@pytest.mark.parametrize("num_results", [None, 0, 3], ids=["nothing", "too few", "too many"])
async def test_results_that_are_not_one_a_text_fail_their_requests(
    start_batcher: StartBatcher,
    make_job: MakeJob,
    encoder: Any,
    num_results: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batcher = await start_batcher()
    one = Encoded(np.zeros((1, 2), np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "vectors", lambda _rows: None if num_results is None else [one] * num_results)
        failed = await answer(batcher.submit(make_job("1", "2")))

    assert type(failed) is InferenceFailed
    assert (await batcher.submit(make_job("3"))).vectors.tolist() == [[3, 1]]


async def test_a_batch_with_a_result_missing_is_computed_again_in_halves(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results cannot be assigned to their texts: handing them out could mix them up."""
    batcher = await start_batcher()
    real_vectors = encoder.vectors
    monkeypatch.setattr(encoder, "vectors", lambda rows: real_vectors(rows[: max(1, len(rows) - 1)]))

    embeddings = await batcher.submit(make_job("1", "2", "3"))

    assert embeddings.vectors.tolist() == [[1, 1], [2, 1], [3, 1]]


@pytest.mark.parametrize("output", ["sparse", "multivector", "states"])
async def test_an_output_that_is_not_finite_fails_its_own_request_and_names_the_text(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = await start_batcher()
    broken = np.array([[np.nan, 1]], np.float32)
    beside: dict[str, Any] = {output: SparseVector(np.array([1]), broken[0, :1]) if output == "sparse" else broken}
    real_vectors = encoder.vectors
    monkeypatch.setattr(
        encoder,
        "vectors",
        lambda rows: [
            replace(one, **beside) if ids == [13] else one for ids, one in zip(rows, real_vectors(rows), strict=True)
        ],
    )

    with structlog.testing.capture_logs() as logs:
        failed, good = await asyncio.gather(
            *(answer(batcher.submit(make_job(*texts))) for texts in (["1", "2", "13"], ["1", "2"]))
        )

    assert isinstance(good, Embeddings)
    assert isinstance(failed, InvalidVectors)
    assert failed.message == f"input[2]: the model returned a {output} output that is not finite (NaN or infinity)"
    assert failed.is_permanent
    [line] = [line for line in logs if line["event"] == "text_failed"]
    assert (line["model"], line["index"]) == ("numbers", [2])
    assert "13" not in str(line)


async def test_each_request_that_shares_a_failing_text_gets_its_own_index(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate
) -> None:
    batcher = await start_batcher()
    encoder.on_forward = gate
    first = asyncio.create_task(batcher.submit(make_job("0")))
    await gate.reached()
    encoder.on_forward = raise_for(13, RuntimeError("broken"))
    requests = [["13"], ["1", "2", "13"], ["1", "2"]]
    waiting = [asyncio.create_task(answer(batcher.submit(make_job(*texts, caller=str(texts))))) for texts in requests]
    assert await becomes(lambda: batcher.num_queued == 6)
    gate.open()

    one, other, good = await asyncio.gather(*waiting)

    await first
    assert isinstance(one, InferenceFailed)
    assert isinstance(other, InferenceFailed)
    assert isinstance(good, Embeddings)
    assert (one.message.split(":")[0], other.message.split(":")[0]) == ("input[0]", "input[2]")
    assert not other.is_permanent  # a device that fails may recover


async def test_a_fault_of_the_scheduler_answers_who_waits_and_ends(
    start_batcher: StartBatcher,
    make_job: MakeJob,
    monkeypatch: pytest.MonkeyPatch,
    loop_errors: list[dict[str, Any]],
) -> None:
    batcher = await start_batcher()
    is_broken = True
    real_take = queue_module.take

    def take(*args: Any) -> Any:
        if is_broken and args[0]:
            raise KeyError("a bug")
        return real_take(*args)

    monkeypatch.setattr(queue_module, "take", take)
    failed = await asyncio.gather(*[answer(batcher.submit(make_job(str(n)))) for n in range(10)])
    assert await becomes(lambda: batcher.num_queued == 0)
    is_broken = False

    assert {type(error) for error in failed} == {InferenceFailed}
    assert (await batcher.submit(make_job("3"))).vectors.tolist() == [[3, 1]]
    assert await becomes(lambda: batcher.is_idle)
    assert not loop_errors


async def test_a_fault_of_the_scheduler_costs_nothing_that_is_computed(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = NumberEncoder()
    batcher = await start_batcher(max_batch_tokens=1, others=[other])
    encoder.on_forward = other.on_forward = gate
    in_hand = asyncio.create_task(answer(batcher.submit(make_job("1"))))
    await gate.reached()
    real_take = queue_module.take

    def take(*args: Any) -> Any:
        if args[0]:
            monkeypatch.setattr(queue_module, "take", real_take)
            raise KeyError("a bug")
        return real_take(*args)

    monkeypatch.setattr(queue_module, "take", take)

    lost = await answer(batcher.submit(make_job("2")))
    gate.open()

    assert isinstance(lost, InferenceFailed)
    assert isinstance(await in_hand, Embeddings)
    assert await becomes(lambda: batcher.is_idle)


async def test_a_fault_in_one_replica_s_thread_costs_the_batch_in_its_hands_alone(
    start_batcher: StartBatcher,
    make_job: MakeJob,
    encoder: Any,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    loop_errors: list[dict[str, Any]],
) -> None:
    """Another one continues with its batch, and queued texts stay in the queue."""
    other, second = NumberEncoder(), Gate()
    batcher = await start_batcher(max_batch_tokens=1, others=[other])
    held = {"1": gate, "2": second}
    for one in (encoder, other):
        one.on_forward = lambda batch: held[str(batch[0][0])](batch) if str(batch[0][0]) in held else None
    requests = {}
    for text, its_gate in held.items():
        requests[text] = asyncio.create_task(answer(batcher.submit(make_job(text, caller=text))))
        await its_gate.reached()
    queued = [asyncio.create_task(answer(batcher.submit(make_job(text, caller="q")))) for text in ("3", "4", "5")]
    assert await becomes(lambda: batcher.num_queued == 3)
    faults = metrics.REGISTRY.get_sample_value("gateway_worker_faults_total", {"model": "numbers"}) or 0
    real_finished = worker_module.FinishedBatch

    def fail_once(*args: Any) -> Any:
        monkeypatch.setattr(worker_module, "FinishedBatch", real_finished)
        raise KeyError("a bug")

    monkeypatch.setattr(worker_module, "FinishedBatch", fail_once)
    gate.open()

    lost = await requests["1"]
    assert isinstance(lost, InferenceFailed)
    assert [type(one) for one in await asyncio.gather(*queued)] == [Embeddings] * 3
    second.open()
    assert isinstance(await requests["2"], Embeddings)
    assert metrics.REGISTRY.get_sample_value("gateway_worker_faults_total", {"model": "numbers"}) == faults + 1
    assert await becomes(lambda: batcher.is_idle)
    assert not loop_errors


async def test_a_question_goes_to_the_replica_that_is_asked(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any
) -> None:
    others = [NumberEncoder(), NumberEncoder()]
    batcher = await start_batcher(others=others)

    for _ in range(5):
        await batcher.submit(make_job("7"), replica=1)

    assert [one.computed for one in (encoder, *others)] == [[], [7] * 5, []]


async def test_a_question_to_a_replica_is_not_answered_by_another_replica(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate
) -> None:
    """Identical texts are computed once, but a broken replica would then seem well."""
    other = NumberEncoder()
    batcher = await start_batcher(others=[other])
    encoder.on_forward = other.on_forward = gate
    first = asyncio.create_task(batcher.submit(make_job("7")))
    await gate.reached()
    idle = 1 if encoder.batches else 0

    question = asyncio.create_task(batcher.submit(make_job("7"), replica=idle))
    assert await becomes(lambda: bool(encoder.batches and other.batches))
    gate.open()

    await asyncio.gather(first, question)


# --------------------------------------------------------------------------------------------------------- tokenize


async def test_an_error_in_tokenizing_fails_its_own_request_alone(
    start_batcher: StartBatcher, make_job: MakeJob
) -> None:
    batcher = await start_batcher()

    answers = await asyncio.gather(
        *[batcher.submit(make_job(text)) for text in ("1", "no number", "2")], return_exceptions=True
    )

    assert [type(a).__name__ for a in answers] == ["Embeddings", "ValueError", "Embeddings"]
    assert await becomes(lambda: batcher.is_idle)


async def test_refuse_computes_nothing_when_any_text_is_too_long(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any
) -> None:
    batcher = await start_batcher()
    texts = [*texts_of(range(300)), " ".join(["1"] * 65)]

    error = await answer(batcher.submit(make_job(*texts, truncate=Truncate.REFUSE)))

    assert isinstance(error, ContextLengthExceeded)
    await batcher.submit(make_job("1000"))
    assert encoder.computed == [1000]


async def test_refuse_embeds_when_all_texts_fit(start_batcher: StartBatcher, make_job: MakeJob) -> None:
    batcher = await start_batcher()

    embeddings = await batcher.submit(make_job(*texts_of(range(300)), truncate=Truncate.REFUSE))

    assert embeddings.vectors[:, 0].tolist() == list(range(300))


async def test_one_text_is_answered_while_a_large_request_is_tokenized(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any
) -> None:
    batcher = await start_batcher()
    has_begun = threading.Event()

    def tokenize(texts: Sequence[str]) -> None:
        has_begun.set()
        time.sleep(0.001 * len(texts))

    encoder.numbers.on_tokenize = tokenize
    bulk = asyncio.create_task(batcher.submit(make_job(*texts_of(range(1000)))))
    assert await becomes(has_begun.is_set)

    await batcher.submit(make_job("1"))

    assert not bulk.done()
    await bulk


async def test_one_text_is_answered_while_a_huge_one_is_tokenized(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate
) -> None:
    batcher = await start_batcher()
    encoder.numbers.on_tokenize = lambda texts: gate(texts) if len(texts[0]) > 1_000_000 else None
    huge = asyncio.create_task(batcher.submit(make_job("1 " * 600_000)))
    await gate.reached()

    assert isinstance(await answer(batcher.submit(make_job("1"))), Embeddings)

    gate.open()
    await huge


async def test_long_texts_are_tokenized_a_few_at_a_time(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any
) -> None:
    batcher = await start_batcher()
    sizes: list[int] = []
    encoder.numbers.on_tokenize = lambda texts: sizes.append(sum(map(len, texts)))

    embeddings = await batcher.submit(make_job(*texts_of(range(100), length=20_000)))

    assert embeddings.vectors[:, 0].tolist() == list(range(100))
    assert max(sizes) <= 150_000


# --------------------------------------------------------------------------------------------- deadline, cancellation


async def test_past_its_deadline_a_request_ends_and_its_queued_texts_are_not_computed(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate
) -> None:
    batcher = await start_batcher(max_batch_tokens=1)
    encoder.on_forward = gate
    blocking = asyncio.create_task(batcher.submit(make_job("0")))
    await gate.reached()

    error = await answer(batcher.submit(make_job("1", "2", timeout_s=0.1)))
    gate.open()
    await blocking
    await batcher.submit(make_job("3"))

    assert isinstance(error, DeadlineExceeded)
    assert "2 of 2 texts" in error.message
    assert encoder.computed == [0, 3]
    assert await becomes(lambda: batcher.is_idle)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
async def test_a_deadline_that_has_passed_already_computes_nothing(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, timeout_s: float
) -> None:
    batcher = await start_batcher()

    error = await answer(batcher.submit(make_job("1", timeout_s=timeout_s)))

    assert isinstance(error, DeadlineExceeded)
    assert encoder.computed == []


@pytest.mark.usefixtures("no_text_is_short")
async def test_the_deadline_holds_while_tokenizing(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate
) -> None:
    batcher = await start_batcher()
    encoder.numbers.on_tokenize = gate

    error = await answer(batcher.submit(make_job("1", timeout_s=0.1)))

    assert isinstance(error, DeadlineExceeded)


async def test_a_canceled_request_leaves_the_queue(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, loop_errors: list[dict[str, Any]]
) -> None:
    batcher = await start_batcher(max_batch_tokens=1)
    encoder.on_forward = gate
    blocking = asyncio.create_task(batcher.submit(make_job("0")))
    await gate.reached()
    leaving = asyncio.create_task(batcher.submit(make_job(*texts_of(range(1, 100)))))
    assert await becomes(lambda: batcher.num_queued > 0)
    assert not batcher.is_idle

    leaving.cancel()
    await asyncio.wait({leaving})
    gate.open()
    await blocking
    await batcher.submit(make_job("1000"))

    assert encoder.computed == [0, 1000]
    assert await becomes(lambda: batcher.is_idle)
    assert not loop_errors


async def test_a_request_canceled_during_its_forward_does_not_disturb_the_rest_of_the_batch(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, loop_errors: list[dict[str, Any]]
) -> None:
    batcher = await start_batcher()
    blocker = Gate()
    encoder.on_forward = blocker
    blocking = asyncio.create_task(batcher.submit(make_job("0")))
    await blocker.reached()
    encoder.on_forward = gate
    leaving, staying = (asyncio.create_task(batcher.submit(make_job(text))) for text in ("1", "2"))
    assert await becomes(lambda: batcher.num_queued == 2)
    blocker.open()
    await gate.reached()

    leaving.cancel()
    gate.open()

    assert (await staying).vectors.tolist() == [[2, 1]]
    assert encoder.batches == [[[0]], [[1], [2]]]
    await blocking
    assert await becomes(lambda: batcher.is_idle)
    assert not loop_errors


# --------------------------------------------------------------------------------------------------------- overload


@pytest.mark.parametrize(
    "limits",
    [{"max_queue_texts": 10}, {"max_queue_tokens": 30}],
    ids=["texts", "tokens"],
)
async def test_a_full_queue_refuses_and_says_when_to_come_back(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, limits: dict[str, int]
) -> None:
    batcher = await start_batcher(**limits)
    encoder.on_forward = gate
    waiting = asyncio.create_task(batcher.submit(make_job(*texts_of(range(10)))))
    await gate.reached()

    error = await answer(batcher.submit(make_job(*texts_of(range(6)))))

    assert isinstance(error, Overloaded)
    assert error.retry_after_s is not None
    assert 1 <= error.retry_after_s <= 120
    assert "this request has 6" in error.message
    gate.open()
    await waiting
    assert isinstance(await answer(batcher.submit(make_job(*texts_of(range(6))))), Embeddings)


async def test_a_queue_that_others_have_filled_has_room_for_a_few_texts_of_a_caller_with_none(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate
) -> None:
    batcher = await start_batcher(max_queue_texts=100)
    encoder.on_forward = gate
    waiting = asyncio.create_task(batcher.submit(make_job(*texts_of(range(100)), caller="bulk")))
    await gate.reached()

    refused = [
        await answer(batcher.submit(make_job("one more", caller="bulk"))),
        await answer(batcher.submit(make_job(*texts_of(range(33)), caller="large"))),
    ]
    few = [
        asyncio.create_task(batcher.submit(make_job(*texts_of(range(25)), caller=caller))) for caller in ("ann", "ben")
    ]
    await asyncio.sleep(0)
    late = await answer(batcher.submit(make_job("one too many", caller="cid")))
    gate.open()

    assert all(isinstance(error, Overloaded) for error in (*refused, late))
    assert [len((await task).vectors) for task in few] == [25, 25]
    await waiting


async def test_an_idle_model_takes_a_request_of_any_size(start_batcher: StartBatcher, make_job: MakeJob) -> None:
    batcher = await start_batcher(max_queue_texts=1, max_queue_tokens=1)

    embeddings = await batcher.submit(make_job(*texts_of(range(500))))

    assert embeddings.vectors.shape == (500, 2)


# --------------------------------------------------------------------------------------------------------- shutdown


async def test_a_stop_answers_all_requests(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, loop_errors: list[dict[str, Any]]
) -> None:
    batcher = await start_batcher(max_batch_tokens=1)
    encoder.on_forward = gate
    in_hand = asyncio.create_task(answer(batcher.submit(make_job("0"))))
    await gate.reached()
    queued = [asyncio.create_task(answer(batcher.submit(make_job(str(n))))) for n in range(1, 20)]
    assert await becomes(lambda: batcher.num_queued == 19)

    stopping = asyncio.create_task(batcher.shutdown())
    await asyncio.sleep(0)
    gate.open()
    await stopping

    assert isinstance(await in_hand, Embeddings)
    assert {type(error) for error in await asyncio.gather(*queued)} == {ShuttingDown}
    assert encoder.computed == [0]
    assert isinstance(await answer(batcher.submit(make_job("1"))), ShuttingDown)
    assert not threads_of("numbers")
    assert batcher.num_requests == 0
    assert not loop_errors


@pytest.mark.usefixtures("no_text_is_short")
async def test_a_stop_answers_those_who_are_being_tokenized(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, loop_errors: list[dict[str, Any]]
) -> None:
    batcher = await start_batcher()
    encoder.numbers.on_tokenize = gate
    requests = [asyncio.create_task(answer(batcher.submit(make_job(*texts_of(range(200)))))) for _ in range(5)]
    await gate.reached()

    stopping = asyncio.create_task(batcher.shutdown())
    await asyncio.sleep(0.05)
    gate.open()
    await stopping

    assert {type(error) for error in await asyncio.gather(*requests)} == {ShuttingDown}
    assert not threads_of("numbers")
    assert not loop_errors


async def test_a_stop_does_not_wait_forever_for_a_forward_that_hangs(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "_STOP_S", 0.1)
    batcher = await start_batcher()
    encoder.on_forward = gate
    request = asyncio.create_task(answer(batcher.submit(make_job("1"))))
    await gate.reached()

    await batcher.shutdown()

    assert isinstance(await request, ShuttingDown)


def recovering() -> ModelRecovering:
    return ModelRecovering("is being reloaded", retry_after_s=5)


async def test_giving_up_answers_all_requests_at_once_though_a_forward_hangs(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, loop_errors: list[dict[str, Any]]
) -> None:
    batcher = await start_batcher(max_batch_tokens=1)
    encoder.on_forward = gate
    requests = [asyncio.create_task(answer(batcher.submit(make_job(str(n))))) for n in range(20)]
    await gate.reached()
    assert await becomes(lambda: batcher.num_queued >= 19)

    batcher.give_up(recovering)
    answers = await asyncio.gather(*requests)  # the gate is closed, so the forward still hangs

    assert {type(error) for error in answers} == {ModelRecovering}
    assert len(set(map(id, answers))) == 20
    assert isinstance(await answer(batcher.submit(make_job("1"))), ModelRecovering)
    gate.open()  # a late result has no request left
    assert await becomes(lambda: not threads_of("numbers"))
    assert encoder.computed == [0]
    assert batcher.num_requests == 0
    assert not loop_errors


@pytest.mark.usefixtures("no_text_is_short")
async def test_giving_up_answers_those_who_are_being_tokenized(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, loop_errors: list[dict[str, Any]]
) -> None:
    batcher = await start_batcher()
    encoder.numbers.on_tokenize = gate
    requests = [asyncio.create_task(answer(batcher.submit(make_job(*texts_of(range(200)))))) for _ in range(5)]
    await gate.reached()

    batcher.give_up(recovering)
    gate.open()

    assert {type(error) for error in await asyncio.gather(*requests)} == {ModelRecovering}
    assert encoder.computed == []
    assert not loop_errors


async def test_a_lost_card_answers_all_requests_at_once(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, loop_errors: list[dict[str, Any]]
) -> None:
    batcher = await start_batcher(max_batch_tokens=1)
    encoder.device = "cuda:0"

    def fail(batch: object) -> None:
        gate(batch)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    encoder.on_forward = fail
    requests = [asyncio.create_task(answer(batcher.submit(make_job(str(n))))) for n in range(20)]
    await gate.reached()
    assert await becomes(lambda: batcher.num_queued >= 19)

    gate.open()
    answers = await asyncio.gather(*requests)

    assert {type(error) for error in answers} == {ModelRecovering}
    assert len(set(map(id, answers))) == 20
    assert {(error.message, error.status, error.retry_after_s) for error in answers} == {
        (
            "model 'numbers': its card was lost, and the gateway is about to restart: CUDA error: an illegal memory access "
            "was encountered",
            503,
            20,
        )
    }
    assert isinstance(await answer(batcher.submit(make_job("1"))), ModelRecovering)
    assert batcher.lost == {0: "CUDA error: an illegal memory access was encountered"}
    assert encoder.computed == [0]
    assert await becomes(lambda: "numbers-compute" not in threads_of("numbers"))
    assert not loop_errors


@pytest.mark.parametrize("hangs", [True, False])
async def test_the_queued_texts_of_a_lost_card_are_computed_on_the_other_one(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, hangs: bool, loop_errors: list[dict[str, Any]]
) -> None:
    other, gates = NumberEncoder(), [Gate(), Gate()]
    batcher = await start_batcher(max_batch_tokens=1, others=[other])
    encoder.device, other.device = "cuda:0", "cuda:1"
    held: dict[int, str] = {}

    def hold(replica: int) -> Callable[[list[list[int]]], None]:
        def on_forward(batch: list[list[int]]) -> None:
            if replica not in held:
                held[replica] = str(batch[0][0])
                gates[replica](batch)
                if replica == 1 and not hangs:
                    raise torch.AcceleratorError("CUDA error: device-side assert triggered")

        return on_forward

    encoder.on_forward, other.on_forward = hold(0), hold(1)
    requests = {n: asyncio.create_task(answer(batcher.submit(make_job(n, caller=n)))) for n in "12345"}
    for its_gate in gates:
        await its_gate.reached()
    assert await becomes(lambda: batcher.num_queued == 3)

    if hangs:
        batcher.lose(1, "it hangs")
    else:
        gates[1].open()
    lost = await requests[held[1]]
    assert isinstance(lost, ModelRecovering)
    gates[0].open()
    others = [await request for number, request in requests.items() if number != held[1]]

    assert [type(one) for one in others] == [Embeddings] * 4
    assert len(other.computed) == 1
    assert isinstance(await batcher.submit(make_job("7")), Embeddings)
    gates[1].open()  # a late result has no request left, and its thread ends
    assert await becomes(lambda: threads_of("numbers").count("numbers-compute") == 1)
    assert len(other.computed) == 1
    assert await becomes(lambda: batcher.is_idle)
    assert not loop_errors


async def test_stopping_twice_is_harmless(start_batcher: StartBatcher) -> None:
    batcher = await start_batcher()

    await batcher.shutdown()
    await batcher.shutdown()

    assert not threads_of("numbers")


def test_the_end_of_the_event_loop_during_a_forward_is_not_an_error(
    encoder: Any, make_job: MakeJob, gate: Gate, recwarn: pytest.WarningsRecorder
) -> None:
    encoder.on_forward = gate

    async def leave_during_a_forward() -> Batcher:
        batcher = Batcher("numbers", [encoder], Limits(64, 100, 1000))
        await batcher.spawn()
        request = asyncio.create_task(batcher.submit(make_job("1")))
        await gate.reached()
        request.cancel()
        return batcher

    batcher = asyncio.run(leave_during_a_forward())
    gate.open()
    batcher.give_up(recovering)
    assert asyncio.run(becomes(lambda: not threads_of("numbers")))

    assert not recwarn.list


# ------------------------------------------------------------------------------------------------------ over a while


OUTCOMES = {
    "one": {"done"},
    "many": {"done"},
    "unlucky": {"InferenceFailed"},
    "late": {"done", "DeadlineExceeded"},
    "gone": {"done", "CancelledError"},
    "too long": {"ContextLengthExceeded"},
    "no number": {"ValueError"},
}
"""The possible results of a request, by its kind: never the result of another request."""


@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_nothing_is_left_after_2000_requests_of_all_kinds(
    start_batcher: StartBatcher,
    make_job: MakeJob,
    encoder: Any,
    num_replicas: int,
    loop_errors: list[dict[str, Any]],
) -> None:
    others = [NumberEncoder() for _ in range(num_replicas - 1)]
    for one in (encoder, *others):
        one.on_forward = raise_for(13, RuntimeError("unlucky"))
    batcher = await start_batcher(max_batch_tokens=40, max_queue_texts=10**6, others=others)
    rng = random.Random(2)

    async def request(i: int) -> tuple[str, str]:
        kind = rng.choice(["one", "one", *OUTCOMES])
        await asyncio.sleep(rng.random() * 2)
        number = str(100 + rng.randrange(50))  # some are equal, and in flight together
        texts = {"many": texts_of(range(100, 150), 3), "unlucky": [number, "13"], "no number": ["x"]}.get(
            kind, [number]
        )
        if kind == "too long":
            texts = ["1 " * 100]
        task = asyncio.create_task(
            batcher.submit(
                make_job(
                    *texts,
                    caller=str(i % 50),
                    timeout_s=0.001 if kind == "late" else 30,
                    truncate=Truncate.REFUSE if kind == "too long" else Truncate.END,
                )
            )
        )
        if kind == "gone":
            await asyncio.sleep(rng.random() / 100)
            task.cancel()
        try:
            embeddings = await task
        except (RequestError, asyncio.CancelledError, ValueError) as error:
            return kind, type(error).__name__
        assert embeddings.vectors[:, 0].tolist() == [int(text.split()[0]) for text in texts]
        return kind, "done"

    outcomes = set(await asyncio.gather(*[request(i) for i in range(2000)]))

    assert outcomes <= {(kind, outcome) for kind, possible in OUTCOMES.items() for outcome in possible}
    assert {kind for kind, _outcome in outcomes} == set(OUTCOMES)
    assert {("gone", "CancelledError"), ("late", "DeadlineExceeded")} <= outcomes
    assert await becomes(lambda: batcher.is_idle)
    assert not loop_errors


# ------------------------------------------------------------------------------------------------ Infinity's interface


@pytest.fixture
def engine(encoder: Any) -> Engine:
    args = EngineArgs(model_name_or_path="owner/numbers", served_model_name="numbers", device="cpu")
    return Engine(args, [encoder], Limits(64, 100, 1000))


async def test_infinitys_embed_returns_vectors_and_token_usage(engine: Engine) -> None:
    async with engine:
        vectors, usage = await engine.embed(["1 1 1", "2"])

    assert [vector.tolist() for vector in vectors] == [[1, 3], [2, 1]]
    assert usage == 4


async def test_infinitys_embed_cuts_to_matryoshka_dimensions(engine: Engine) -> None:
    async with engine:
        vectors, _usage = await engine.embed(["1 1 1"], matryoshka_dim=1)

    assert [vector.tolist() for vector in vectors] == [[1]]


async def test_infinitys_capabilities_and_overload_status(engine: Engine, encoder: Any, gate: Gate) -> None:
    encoder.on_forward = gate
    async with engine:
        idle = engine.overload_status()
        request = asyncio.create_task(engine.embed([str(n) for n in range(150)]))
        await gate.reached()
        busy = engine.overload_status()
        is_overloaded = engine.is_overloaded()
        gate.open()
        await request

        assert engine.capabilities == {"embed"}
        assert (idle.queue_absolute, idle.queue_fraction, idle.results_absolute) == (0, 0.0, 0)
        assert (busy.queue_absolute, busy.queue_fraction, busy.results_absolute) == (150, 1.5, 1)
        assert is_overloaded
        assert not engine.is_overloaded()


async def test_an_engine_starts_and_stops_again_and_again(engine: Engine) -> None:
    for _ in range(2):
        await engine.astart()
        await engine.astart()
        assert engine.is_running
        assert (await engine.embed(["7"]))[0][0].tolist() == [7, 1]
        await engine.astop()
        await engine.astop()
        assert not engine.is_running
        assert not threads_of("numbers")


async def test_an_engine_that_was_never_started_says_so(engine: Engine, make_job: MakeJob) -> None:
    await engine.astop()
    with pytest.raises(ValueError, match="didn't start"):
        await engine.embed(["1"])
    with pytest.raises(ModelNotReady):
        await engine.submit(make_job("1"))


def test_an_engine_prints_as_infinitys_do(engine: Engine) -> None:
    assert str(engine).startswith("AsyncEmbeddingEngine(running=False")


@pytest.mark.parametrize("is_canceled", [False, True], ids=["answered", "canceled"])
async def test_a_request_that_has_ended_keeps_no_vectors_while_the_queue_remembers_it(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any, gate: Gate, is_canceled: bool
) -> None:
    kept: list[weakref.ref[Any]] = []
    vectors = encoder.vectors

    def remember(batch: list[list[int]]) -> list[Encoded]:
        encoded = vectors(batch)
        kept.extend(weakref.ref(one.dense) for one in encoded)
        return encoded  # type: ignore[no-any-return]

    encoder.vectors = remember
    encoder.on_forward = lambda batch: gate(batch) if [9] in batch else None
    batcher = await start_batcher(max_batch_tokens=1)
    others = texts_of(range(9, 20))
    request = asyncio.create_task(batcher.submit(make_job("1", *(others if is_canceled else []), caller="a")))
    if not is_canceled:
        bulk = asyncio.create_task(batcher.submit(make_job(*others, caller="b")))
    await gate.reached()
    if is_canceled:
        assert kept[0]() is not None
        request.cancel()
    await asyncio.wait({request})
    if not is_canceled:
        del request

    assert batcher.num_queued > 0
    assert await becomes(lambda: kept[0]() is None)
    gate.open()
    if not is_canceled:
        await bulk


async def test_the_error_of_a_request_that_has_failed_is_freed_without_the_collector(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: Any
) -> None:
    batcher = await start_batcher()
    encoder.on_forward = raise_for(0, RuntimeError("broken"))
    gc.collect()
    gc.disable()
    try:
        failed: Any = await answer(batcher.submit(make_job("0")))
        assert isinstance(failed, InferenceFailed)
        kept = weakref.ref(failed)
        del failed
        assert kept() is None  # the frames of its traceback hold the texts
    finally:
        gc.enable()
