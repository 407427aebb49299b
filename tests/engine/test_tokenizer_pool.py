"""The tokenizer is shared fairly between callers, like the device: one text waits for a step of others, not for all."""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from gateway.engine.model.tokenizer import SHORT_CHARS, Steps
from gateway.engine.scheduler import RequestHandle
from gateway.engine.tokenizer_pool import LONG_STEP_CHARS, TokenizerPool, TokenizeTask
from gateway.errors import ContextLengthExceeded, DeadlineExceeded, RequestError
from gateway.telemetry import metrics
from gateway.types import Truncate
from tests.engine.scripted import PATIENCE_S, Gate, MakeJob, NumberEncoder, StartBatcher, answer, becomes

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

Begin = Callable[..., TokenizeTask]


class Readings:
    """Steps that note when they are run, in a room whose short texts' thread is held at first."""

    def __init__(self, room: TokenizerPool) -> None:
        self._tokenizers = room
        self.order: list[str] = []

    def begin(
        self, name: str, caller: str, sizes: list[int], handle: RequestHandle | None = None, *, may_be_now: bool = False
    ) -> TokenizeTask:
        steps = self._steps(name, sizes)
        return self._tokenizers.begin(handle or RequestHandle(caller, math.inf), steps, may_be_now=may_be_now)

    async def read(self, steps: Steps[Any]) -> Any:
        return await self._tokenizers.begin(RequestHandle("caller", math.inf), steps).done

    def _steps(self, name: str, sizes: list[int]) -> Steps[str]:
        for size in sizes:
            yield size
            self.order.append(name)
        return name


@pytest.fixture
async def held(gate: Gate) -> AsyncIterator[Readings]:
    room = TokenizerPool("numbers", asyncio.get_running_loop())
    room.start()

    def hold() -> Steps[None]:
        yield 1
        gate(None)

    first = room.begin(RequestHandle("first", math.inf), hold())
    await gate.reached()
    yield Readings(room)
    gate.open()
    await first.done
    assert await becomes(lambda: room.is_empty)
    room.close()
    assert await asyncio.to_thread(room.join, PATIENCE_S)


async def test_short_steps_run_on_the_event_loop_only_until_they_are_as_long_as_a_short_text(
    held: Readings, gate: Gate
) -> None:
    size = SHORT_CHARS // 3 + 1  # two of them, not three
    task = held.begin("a", "caller", [size] * 4, may_be_now=True)

    assert held.order == ["a"] * 2
    gate.open()
    assert await task.done == "a"


async def test_steps_of_exactly_a_short_text_run_on_the_event_loop(held: Readings) -> None:
    task = held.begin("a", "caller", [SHORT_CHARS - 1, 1], may_be_now=True)

    assert task.done.result() == "a"
    assert len(task.spans) == 1


@pytest.mark.parametrize("size", [1, LONG_STEP_CHARS + 1], ids=["short", "long"])
async def test_a_thread_that_is_busy_and_a_task_that_waits_for_it_show(gate: Gate, size: int) -> None:
    def steps() -> Steps[None]:
        yield size
        gate(None)

    room = TokenizerPool("numbers", asyncio.get_running_loop())
    room.start()
    room.begin(RequestHandle("first", math.inf), steps())
    room.begin(RequestHandle("second", math.inf), steps())
    await gate.reached()
    room.close()

    assert not room.is_empty
    assert not await asyncio.to_thread(room.join, 0.05)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("numbers-tokenize")]
    assert all(thread.daemon for thread in threads), "the process could not end"
    gate.open()
    assert await asyncio.to_thread(room.join, PATIENCE_S)


async def test_the_result_of_a_task_is_not_kept_by_the_thread(held: Readings, gate: Gate) -> None:
    class Result:
        """What a tokenizer returns, whose release shows."""

    def steps() -> Steps[Result]:
        yield 1
        return Result()

    gate.open()
    result = weakref.ref(await held.read(steps()))

    assert await becomes(lambda: result() is None)


async def test_one_text_behind_many_requests_of_another_caller_waits_for_one_of_them(
    held: Readings, gate: Gate
) -> None:
    bulk = [held.begin(f"bulk {i}", "bulk", [15_000]) for i in range(40)]
    single = held.begin("single", "other", [20])

    gate.open()

    assert await single.done == "single"
    assert held.order.index("single") <= 1
    await asyncio.gather(*(task.done for task in bulk))


async def test_a_text_of_many_steps_waits_for_its_turn_after_each(held: Readings, gate: Gate) -> None:
    endless = held.begin("endless", "bulk", [10_000] * 30)
    singles = [held.begin(f"single {i}", f"caller {i}", [10]) for i in range(5)]

    gate.open()

    await asyncio.gather(*(task.done for task in singles))
    assert held.order.index("single 4") <= 6
    assert await endless.done == "endless"


async def test_callers_with_a_backlog_get_the_same_characters(held: Readings, gate: Gate) -> None:
    """Not the same number of requests: whose are long gets fewer of them read."""
    readings = [held.begin("long", "a", [10_000]) for _ in range(20)]
    readings += [held.begin("short", "b", [1_000]) for _ in range(200)]

    gate.open()

    await asyncio.gather(*(task.done for task in readings))
    until = held.order[:110]
    assert abs(10_000 * until.count("long") - 1_000 * until.count("short")) <= 11_000


async def test_a_step_of_many_characters_holds_no_short_one_up(held: Readings, gate: Gate) -> None:
    short = held.begin("short", "a", [LONG_STEP_CHARS])
    long = held.begin("long", "b", [LONG_STEP_CHARS + 1])

    assert await long.done == "long"  # though the thread for short ones is held
    assert held.order == ["long"]
    gate.open()
    assert await short.done == "short"


async def test_a_text_that_is_no_longer_needed_is_not_read(held: Readings, gate: Gate) -> None:
    gone, late = RequestHandle("gone", math.inf), RequestHandle("late", 0.0)
    for handle in (gone, late):
        held.begin(handle.caller, handle.caller, [10], handle)
    gone.is_live = False

    gate.open()

    assert await held.begin("next", "other", [10]).done == "next"
    assert held.order == ["next"]


async def test_an_error_of_a_step_is_raised_for_its_waiter(held: Readings, gate: Gate) -> None:
    def fail() -> Steps[None]:
        yield 1
        raise SystemExit(3)

    failing = held._tokenizers.begin(RequestHandle("a", math.inf), fail())
    gate.open()

    with pytest.raises(BaseException, match="3") as caught:
        await failing.done
    assert isinstance(caught.value, SystemExit)
    assert await held.begin("next", "a", [10]).done == "next"


# ------------------------------------------------------------------------------------------------------ in the batcher


@pytest.mark.usefixtures("no_text_is_short")
async def test_one_text_is_embedded_while_forty_long_ones_of_another_wait_to_be_read(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder, gate: Gate
) -> None:
    batcher = await start_batcher()
    num_read: list[str] = []

    def on_tokenize(texts: Any) -> None:
        num_read.append(texts[0][:5])
        gate(texts)

    encoder.numbers.on_tokenize = on_tokenize
    bulk = [asyncio.create_task(batcher.submit(make_job(f"{i} " * 3_000, caller="bulk"))) for i in range(1000, 1040)]
    await gate.reached()
    single = asyncio.create_task(batcher.submit(make_job("7", caller="other")))
    await asyncio.sleep(0)
    gate.open()

    assert (await single).vectors.tolist() == [[7, 1]]
    assert num_read.index("7") <= 2
    await asyncio.gather(*bulk)


@pytest.mark.usefixtures("no_text_is_short")
async def test_a_request_that_ends_while_it_waits_to_be_read_leaves_nothing(
    start_batcher: StartBatcher,
    make_job: MakeJob,
    encoder: NumberEncoder,
    gate: Gate,
    loop_errors: list[dict[str, Any]],
) -> None:
    batcher = await start_batcher()
    encoder.numbers.on_tokenize = gate
    first = asyncio.create_task(batcher.submit(make_job("1")))
    await gate.reached()
    cancelled = asyncio.create_task(batcher.submit(make_job("2")))
    late = asyncio.create_task(answer(batcher.submit(make_job("3", timeout_s=0.05))))
    await asyncio.sleep(0)

    cancelled.cancel()
    assert isinstance(await late, DeadlineExceeded)
    gate.open()

    assert (await first).vectors.tolist() == [[1, 1]]
    assert cancelled.cancelled() or await asyncio.wait({cancelled})
    assert await becomes(lambda: batcher.is_idle)
    assert encoder.computed == [1]
    for gauge in ("gateway_queue_texts", "gateway_queue_tokens"):
        assert metrics.REGISTRY.get_sample_value(gauge, {"model": "numbers"}) == 0
    assert not loop_errors


async def test_a_request_whose_first_texts_fail_does_not_wait_for_the_rest_to_be_read(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder
) -> None:
    batcher = await start_batcher()
    second = Gate()

    def on_tokenize(texts: Any) -> None:
        if "99" in texts:
            second(texts)

    def fail(_batch: object) -> None:
        raise RuntimeError("broken")

    encoder.numbers.on_tokenize = on_tokenize
    encoder.on_forward = fail
    failing = asyncio.create_task(answer(batcher.submit(make_job(*map(str, range(64)), *["99"] * 10))))

    try:
        error = await failing
        assert isinstance(error, RequestError)
        assert error.code == "inference_failed"
    finally:
        second.open()
    assert await becomes(lambda: batcher.is_idle)


@pytest.mark.usefixtures("no_text_is_short")
async def test_the_oldest_request_is_on_the_board_until_it_is_answered(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder, gate: Gate
) -> None:
    def oldest_s() -> float:
        return metrics.REGISTRY.get_sample_value("gateway_queue_oldest_seconds", {"model": "numbers"}) or 0.0

    batcher = await start_batcher()
    encoder.numbers.on_tokenize = gate
    assert oldest_s() == 0
    request = asyncio.create_task(batcher.submit(make_job("1")))
    await gate.reached()

    first = oldest_s()

    assert first > 0
    assert await becomes(lambda: oldest_s() > first)
    gate.open()
    await request
    assert oldest_s() == 0


@pytest.mark.parametrize(
    ("texts", "in_loop"),
    [
        (["1"], [True]),
        (["1 " * 250, "2"], [True]),
        (["1 " * 300], [False]),
        (["1"] * 64 + ["2"] * 64 + ["3"] * 64, [True, False, False]),
    ],
    ids=["one", "two", "long", "many"],
)
async def test_the_start_of_a_short_request_is_read_without_a_thread(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder, texts: list[str], in_loop: list[bool]
) -> None:
    threads: list[threading.Thread] = []
    encoder.numbers.on_tokenize = lambda _texts: threads.append(threading.current_thread())
    batcher = await start_batcher()

    answer = await batcher.submit(make_job(*texts))

    assert answer.vectors[:, 0].tolist() == [int(text.split()[0]) for text in texts]
    assert [thread is threading.current_thread() for thread in threads] == in_loop
    assert answer.timings.tokenize_s > 0


async def test_an_error_of_a_text_that_is_read_at_once_reaches_its_caller(
    start_batcher: StartBatcher, make_job: MakeJob, encoder: NumberEncoder
) -> None:
    batcher = await start_batcher()

    with pytest.raises(ContextLengthExceeded, match="64 tokens"):
        await batcher.submit(make_job("1", "1 " * 65, truncate=Truncate.REFUSE))

    assert batcher.is_idle
    assert (await batcher.submit(make_job("2"))).vectors.tolist() == [[2, 1]]
