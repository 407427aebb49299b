"""Identical texts in flight are computed once, and no request is worse off for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from gateway.engine.batcher import Batcher
from gateway.engine.model.items import Tokens
from gateway.engine.model.tokenizer import Steps
from gateway.errors import ContextLengthExceeded, DeadlineExceeded, InferenceFailed, RequestError
from gateway.types import Embeddings, Output, Truncate
from tests.engine.scripted import (
    Gate,
    MakeJob,
    NumberEncoder,
    StartBatcher,
    answer,
    becomes,
    raise_for,
    texts_of,
)

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class Blocked:
    """A batcher of two tokens a batch whose thread is held in a forward of the text 0."""

    def __init__(self, batcher: Batcher, encoder: NumberEncoder, gate: Gate) -> None:
        self.batcher = batcher
        self.encoder = encoder
        self._gate = gate

    async def queue(self, job: Any) -> asyncio.Task[Embeddings | RequestError]:
        """Submit a job, and return when each of its texts is in the queue."""
        num_queued = self.batcher.num_queued
        task = asyncio.create_task(answer(self.batcher.submit(job)))
        assert await becomes(lambda: self.batcher.num_queued > num_queued)
        return task

    def open(self) -> None:
        self._gate.open()

    @property
    def computed(self) -> list[int]:
        """The texts that were begun after the one that blocks."""
        return self.encoder.computed[1:]


@pytest.fixture
async def blocked(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder, gate: Gate
) -> AsyncIterator[Blocked]:
    batcher = await start_batcher(max_batch_tokens=2)
    encoder.on_forward = gate
    first = asyncio.create_task(batcher.submit(make_job("0")))
    await gate.reached()
    yield Blocked(batcher, encoder, gate)
    gate.open()
    await first
    assert await becomes(lambda: batcher.is_idle)


@pytest.fixture(autouse=True)
def nothing_is_complained_of(loop_errors: list[dict[str, Any]]) -> Iterator[None]:
    yield
    assert not loop_errors


def vectors_of(answered: Embeddings | RequestError) -> list[list[float]]:
    assert isinstance(answered, Embeddings), answered
    vectors: list[list[float]] = answered.vectors.tolist()
    return vectors


# ----------------------------------------------------------------------------------------------------- computed once


async def test_equal_texts_of_two_callers_are_computed_once(blocked: Blocked, make_job: MakeJob) -> None:
    tasks = [await blocked.queue(make_job("7", "8", caller=caller)) for caller in "ab"]

    blocked.open()

    assert [vectors_of(await task) for task in tasks] == [[[7, 1], [8, 1]]] * 2
    assert sorted(blocked.computed) == [7, 8]


async def test_equal_texts_in_one_request_are_computed_once(blocked: Blocked, make_job: MakeJob) -> None:
    task = await blocked.queue(make_job("7", "8", "7", "7", "9", "8"))

    blocked.open()

    assert vectors_of(await task) == [[n, 1] for n in (7, 8, 7, 7, 9, 8)]
    assert blocked.computed == [7, 8, 9]


async def test_equal_texts_in_two_slices_of_one_request_are_computed_once(blocked: Blocked, make_job: MakeJob) -> None:
    texts = [str(n % 50) for n in range(1000, 1200)]
    task = await blocked.queue(make_job(*texts))
    assert await becomes(lambda: blocked.batcher.num_queued == 200 - texts.count("0"))

    blocked.open()

    assert vectors_of(await task) == [[int(text), 1] for text in texts]
    assert sorted(blocked.computed) == list(range(1, 50))  # 0 is what blocks: it was in the device's hands already


async def test_a_duplicate_that_comes_while_its_twin_is_computed_gets_its_result(
    blocked: Blocked, make_job: MakeJob
) -> None:
    duplicate = asyncio.create_task(answer(blocked.batcher.submit(make_job("0", "5", caller="late"))))
    assert await becomes(lambda: blocked.batcher.num_queued > 0)

    blocked.open()

    assert vectors_of(await duplicate) == [[0, 1], [5, 1]]
    assert blocked.encoder.computed == [0, 5]


async def test_a_text_that_was_computed_before_is_computed_again(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder
) -> None:
    """There is no cache: texts are shared while they are in flight."""
    batcher = await start_batcher()

    for _ in range(3):
        await batcher.submit(make_job("7"))

    assert encoder.computed == [7, 7, 7]
    assert await becomes(lambda: batcher.is_idle)


async def test_each_caller_counts_its_own_tokens_and_cuts(blocked: Blocked, make_job: MakeJob) -> None:
    whole, cut = " ".join(["7"] * 64), " ".join(["7"] * 65)
    tasks = [await blocked.queue(make_job(text)) for text in (whole, cut)]

    blocked.open()
    answers = [await task for task in tasks]

    assert [vectors_of(one) for one in answers] == [[[7, 64]]] * 2
    assert [one.truncated for one in answers if isinstance(one, Embeddings)] == [[], [0]]
    assert blocked.computed == [7]


async def test_a_shared_result_is_a_separate_array_for_each_request(blocked: Blocked, make_job: MakeJob) -> None:
    tasks = [await blocked.queue(make_job("7", caller=caller)) for caller in "ab"]
    blocked.open()
    first, second = [await task for task in tasks]
    assert isinstance(first, Embeddings)
    assert isinstance(second, Embeddings)

    first.vectors[:] = 0

    assert second.vectors.tolist() == [[7, 1]]
    assert not np.shares_memory(first.vectors, second.vectors)


# -------------------------------------------------------------------------------------------------- different texts


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({"outputs": (Output.DENSE, Output.SPARSE)}, id="outputs"),
        pytest.param({"task": "7"}, id="instruction"),
    ],
)
async def test_different_texts_are_not_shared(blocked: Blocked, make_job: MakeJob, others: dict[str, Any]) -> None:
    tasks = [await blocked.queue(make_job("7", **more)) for more in ({}, others)]

    blocked.open()

    for task in tasks:
        assert isinstance(await task, Embeddings)
    assert blocked.computed == [7, 7]


async def test_tasks_with_the_same_tokens_are_not_shared(
    blocked: Blocked, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task may have an adapter, which does not appear in the tokens."""
    monkeypatch.setattr(blocked.encoder, "instruction", lambda _task: "")
    tasks = [await blocked.queue(make_job("7", task=name)) for name in (None, "a", "b", "a")]

    blocked.open()

    assert [vectors_of(await task) for task in tasks] == [[[7, 1]]] * 4
    assert blocked.computed == [7, 7, 7]


async def test_chunks_are_not_shared_with_the_same_tokens_in_one_piece(
    blocked: Blocked, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: dict[str, tuple[tuple[int, int], ...] | None] = {
        "7 7 7": None,
        "7  7 7": ((0, 3),),
        "7 7  7": ((0, 2), (2, 3)),
    }

    def read(texts: Sequence[str], *_: object) -> Steps[list[Tokens]]:
        yield 1
        return [Tokens([7, 7, 7], spans=spans[text]) for text in texts]

    monkeypatch.setattr(blocked.encoder.numbers, "read", read)
    encode = blocked.encoder.encode
    items: list[Any] = []
    monkeypatch.setattr(blocked.encoder, "encode", lambda batch: items.extend(batch) or encode(batch))
    tasks = [await blocked.queue(make_job(text)) for text in spans]

    blocked.open()
    for task in tasks:
        await task

    assert [item.tokens.spans for item in items if item.tokens.ids == [7, 7, 7]] == list(spans.values())


async def test_token_ids_are_compared_as_a_whole(blocked: Blocked, make_job: MakeJob) -> None:
    texts = ["1 2", "2 1", "1", "12", "1 2 0", "256", "1 0"]
    tasks = [await blocked.queue(make_job(text)) for text in texts]

    blocked.open()

    for text, task in zip(texts, tasks, strict=True):
        assert vectors_of(await task) == [[int(text.split()[0]), len(text.split())]]
    assert len(blocked.computed) == len(texts)


# ------------------------------------------------------------------------------------------------- the twin goes away


async def test_the_twin_still_waits_when_the_first_owner_is_canceled_in_the_queue(
    blocked: Blocked, make_job: MakeJob
) -> None:
    first, second = [await blocked.queue(make_job("7", "8", caller=caller)) for caller in "ab"]

    first.cancel()
    await asyncio.wait({first})
    blocked.open()

    assert vectors_of(await second) == [[7, 1], [8, 1]]
    assert blocked.computed == [7, 8]


async def test_the_twin_gets_its_result_when_the_first_owner_is_canceled_during_the_forward(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder, gate: Gate
) -> None:
    batcher = await start_batcher()
    encoder.on_forward = gate
    first = asyncio.create_task(batcher.submit(make_job("7")))
    await gate.reached()
    second = asyncio.create_task(batcher.submit(make_job("7")))
    assert await becomes(lambda: batcher.stats() == (1, 2))

    first.cancel()
    await asyncio.wait({first})
    gate.open()

    assert (await second).vectors.tolist() == [[7, 1]]
    assert encoder.computed == [7]
    assert await becomes(lambda: batcher.is_idle)


async def test_a_newcomer_joins_a_computation_that_is_no_longer_needed(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder, gate: Gate
) -> None:
    batcher = await start_batcher()
    encoder.on_forward = gate
    gone = asyncio.create_task(batcher.submit(make_job("7")))
    await gate.reached()
    gone.cancel()
    await asyncio.wait({gone})

    newcomer = asyncio.create_task(batcher.submit(make_job("7")))
    assert await becomes(lambda: batcher.stats() == (1, 1))
    gate.open()

    assert (await newcomer).vectors.tolist() == [[7, 1]]
    assert encoder.computed == [7]
    assert await becomes(lambda: batcher.is_idle)


async def test_the_twin_still_waits_when_the_first_owner_has_expired(blocked: Blocked, make_job: MakeJob) -> None:
    first = await blocked.queue(make_job("7", caller="a", timeout_s=0.1))
    second = await blocked.queue(make_job("7", caller="b"))

    assert isinstance(await first, DeadlineExceeded)
    blocked.open()

    assert vectors_of(await second) == [[7, 1]]
    assert blocked.computed == [7]


async def test_a_text_that_no_request_needs_any_longer_is_not_computed(blocked: Blocked, make_job: MakeJob) -> None:
    leaving = [await blocked.queue(make_job("7", caller=caller)) for caller in "ab"]

    for task in leaving:
        task.cancel()
    await asyncio.wait(leaving)

    assert blocked.batcher.stats() == (1, 1)  # what is being computed
    blocked.open()
    await blocked.batcher.submit(make_job("9"))
    assert blocked.computed == [9]


async def test_a_text_that_all_have_left_is_computed_for_who_comes_then(blocked: Blocked, make_job: MakeJob) -> None:
    gone = await blocked.queue(make_job("7"))
    gone.cancel()
    await asyncio.wait({gone})

    newcomer = await blocked.queue(make_job("7"))
    blocked.open()

    assert vectors_of(await newcomer) == [[7, 1]]
    assert blocked.computed == [7]


async def test_the_twin_of_a_refused_text_is_computed(
    blocked: Blocked, make_job: MakeJob, start_batcher: StartBatcher
) -> None:
    """With ``truncate: false`` the first slices wait for the last, while others may want the same texts."""
    gate = Gate()
    blocked.encoder.numbers.on_tokenize = lambda texts: gate(texts) if len(texts) < 64 else None
    texts = [*texts_of(range(100, 164)), " ".join(["1"] * 65)]
    refused = asyncio.create_task(answer(blocked.batcher.submit(make_job(*texts, truncate=Truncate.REFUSE))))
    await gate.reached()
    blocked.encoder.numbers.on_tokenize = lambda _texts: None
    twin = asyncio.create_task(answer(blocked.batcher.submit(make_job("100", "163"))))
    gate.open()

    assert isinstance(await refused, ContextLengthExceeded)
    blocked.open()

    assert vectors_of(await twin) == [[100, 1], [163, 1]]
    assert blocked.computed == [100, 163]


# ------------------------------------------------------------------------------------------------------------ failure


async def test_a_failure_is_shared_and_each_request_gets_its_own_error(blocked: Blocked, make_job: MakeJob) -> None:
    jobs = [make_job("13", caller="a"), make_job("13", "1", caller="b"), make_job("2", caller="c")]
    failing_too, failing, other = [await blocked.queue(job) for job in jobs]

    blocked.encoder.on_forward = raise_for(13, RuntimeError("broken"))
    blocked.open()

    errors = [await failing, await failing_too]
    assert [type(error) for error in errors] == [InferenceFailed] * 2
    assert errors[0] is not errors[1]
    assert [str(error) for error in errors] == [str(errors[0])] * 2
    assert all(isinstance(error, RequestError) and error.__traceback__ is not None for error in errors)
    assert vectors_of(await other) == [[2, 1]]


async def test_a_duplicate_that_comes_while_its_twin_fails_fails_too(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder, gate: Gate
) -> None:
    def fail_when_open(batch: Any) -> None:
        gate(batch)
        raise RuntimeError("broken")

    batcher = await start_batcher()
    encoder.on_forward = fail_when_open
    first = asyncio.create_task(answer(batcher.submit(make_job("13"))))
    await gate.reached()
    second = asyncio.create_task(answer(batcher.submit(make_job("13"))))
    assert await becomes(lambda: batcher.stats() == (1, 2))

    gate.open()

    errors = await asyncio.gather(first, second)
    assert [type(error) for error in errors] == [InferenceFailed] * 2
    assert errors[0] is not errors[1]
    assert encoder.computed == [13]
    encoder.on_forward = lambda _batch: None
    assert (await batcher.submit(make_job("13"))).vectors.tolist() == [[13, 1]]  # the failure is not kept
    assert await becomes(lambda: batcher.is_idle)


# ----------------------------------------------------------------------------------------------------------- over time


async def test_many_equal_texts_of_many_callers_over_a_while(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder
) -> None:
    batcher = await start_batcher(max_batch_tokens=20, others=[NumberEncoder()])
    encoder.on_forward = lambda _batch: time.sleep(0.001)
    num_requests, num_texts = 200, 20

    answers = await asyncio.gather(
        *[
            batcher.submit(make_job(*texts_of((i + n) % 30 for n in range(num_texts)), caller=str(i % 7)))
            for i in range(num_requests)
        ]
    )

    for i, embeddings in enumerate(answers):
        assert embeddings.vectors.tolist() == [[(i + n) % 30, 1] for n in range(num_texts)]
    assert len(encoder.computed) < num_requests * num_texts / 10
    assert await becomes(lambda: batcher.is_idle)
