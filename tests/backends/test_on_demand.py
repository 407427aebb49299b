"""A model that is loaded on demand: requests that wait, are refused or disconnect, and the release of all resources."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from gateway.backends.on_demand import OnDemandBackend
from gateway.errors import (
    LoadError,
    ModelNotReady,
    ModelUnavailable,
    Overloaded,
    RequestError,
    ShuttingDown,
)
from gateway.telemetry import metrics
from gateway.types import ModelState
from tests.backends.loadable import Machine, settle

LOADED = [("loading", ""), ("ready", "")]


@pytest.fixture
def machine() -> Machine:
    return Machine()


def count(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


async def answers(backend: OnDemandBackend, machine: Machine) -> bool:
    result = await backend.embed(machine.job("a b c"))
    return result.num_tokens == [3]


# ----------------------------------------------------------------------------------------------------------- loading


async def test_the_first_job_loads_the_model(machine: Machine) -> None:
    backend = await machine.start("one")
    assert (machine.free, machine.states["one"]) == (100, [])
    loads = count("gateway_model_loads_total", model="one", outcome="ok")

    assert await answers(backend, machine)
    assert await answers(backend, machine)

    assert (machine.free, machine.states["one"], machine.inner["one"].num_loads) == (90, LOADED, 1)
    assert count("gateway_model_loads_total", model="one", outcome="ok") == loads + 1
    assert count("gateway_model_load_seconds_count", model="one") >= 1


async def test_all_that_wait_share_one_load_and_the_wait_counts_as_time_in_the_queue(machine: Machine) -> None:
    backend = await machine.start("one")
    inner = machine.inner["one"]
    inner.gate.clear()
    waiting = [asyncio.create_task(backend.embed(machine.job("a " * n))) for n in range(1, 9)]
    await settle()
    assert count("gateway_queue_texts", model="one") == 8

    machine.time.advance(7)
    inner.gate.set()
    results = await asyncio.gather(*waiting)

    assert inner.num_loads == 1
    assert [result.num_tokens for result in results] == [[n] for n in range(1, 9)]
    assert {result.timings.queue_s for result in results} == {7.0}
    assert (await backend.embed(machine.job())).timings.queue_s == 0
    assert count("gateway_queue_texts", model="one") == 0


async def test_a_job_that_is_canceled_while_it_waits_changes_nothing(machine: Machine) -> None:
    backend = await machine.start("one")
    inner = machine.inner["one"]
    inner.gate.clear()
    waiting = [asyncio.create_task(backend.embed(machine.job())) for _ in range(3)]
    await settle()

    for task in waiting[:2]:
        task.cancel()
    await settle()
    assert [task.cancelled() for task in waiting] == [True, True, False]
    assert count("gateway_queue_texts", model="one") == 1
    waiting[2].cancel()
    await settle()
    assert count("gateway_queue_texts", model="one") == 0
    inner.gate.set()
    await settle()

    assert machine.states["one"] == LOADED
    assert not backend.is_busy
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_job_whose_deadline_comes_first_learns_how_long_the_load_will_take() -> None:
    """The time is estimated from its size if it was never loaded: 4 s here."""
    machine = Machine(10**9)
    backend = await machine.start("one", 500_000_000)
    inner = machine.inner["one"]
    inner.gate.clear()

    with pytest.raises(ModelNotReady, match=r"'one' is loaded on demand, which will probably take 4 s more") as caught:
        await backend.embed(machine.job(seconds=0.01))
    assert caught.value.retry_after_s == 4
    machine.time.advance(3.5)
    with pytest.raises(ModelNotReady) as caught:
        await backend.embed(machine.job(seconds=0.01))
    assert caught.value.retry_after_s == 1
    machine.time.advance(60)  # longer than expected
    with pytest.raises(ModelNotReady) as caught:
        await backend.embed(machine.job(seconds=0.01))
    assert caught.value.retry_after_s == 1

    inner.gate.set()
    assert await answers(backend, machine)
    assert inner.num_loads == 1


async def test_a_load_that_is_known_to_take_too_long_is_not_waited_for(machine: Machine) -> None:
    backend = await machine.start("one")
    inner = machine.inner["one"]
    inner.gate.clear()
    first = asyncio.create_task(backend.embed(machine.job()))
    await settle()
    machine.time.advance(30)
    inner.gate.set()
    await first
    await backend.unload()
    inner.gate.clear()

    with pytest.raises(ModelNotReady) as caught:
        await asyncio.wait_for(backend.embed(machine.job(seconds=29)), 5)
    assert caught.value.retry_after_s == 30
    machine.time.advance(2)
    patient = asyncio.create_task(backend.embed(machine.job(seconds=29)))
    await settle()
    inner.gate.set()

    assert (await patient).num_tokens == [2]
    assert inner.num_loads == 2


async def test_a_job_that_may_not_wait_begins_the_load_and_is_refused(machine: Machine) -> None:
    backend = await machine.start("one")

    with pytest.raises(ModelNotReady):
        await backend.embed(machine.job(may_wait=False))
    await settle()

    assert machine.states["one"] == LOADED
    assert (await backend.embed(machine.job(may_wait=False))).num_tokens == [2]


async def test_no_more_jobs_wait_than_the_queue_takes() -> None:
    machine = Machine(max_queue_texts=4)
    backend = await machine.start("one")
    machine.inner["one"].gate.clear()
    waiting = [asyncio.create_task(backend.embed(machine.job("a", "b"))) for _ in range(2)]
    await settle()

    with pytest.raises(Overloaded, match="'one' is full: 4 texts") as caught:
        await backend.embed(machine.job("c"))

    assert (caught.value.status, caught.value.retry_after_s) == (429, 1)
    machine.inner["one"].gate.set()
    await asyncio.gather(*waiting)


async def test_the_vocabulary_is_that_of_the_loaded_model(machine: Machine) -> None:
    backend = await machine.start("one")

    vocabulary = await backend.vocabulary()

    assert len(vocabulary.split(["a b"], add_special_tokens=False)[0]) == 2
    assert machine.states["one"] == LOADED


# ---------------------------------------------------------------------------------------------------------- failures


async def test_a_load_that_fails_fails_all_that_wait_and_is_tried_again_after_a_pause_that_doubles(
    machine: Machine,
) -> None:
    backend = await machine.start("one")
    inner = machine.inner["one"]
    inner.error = LoadError("the weights are torn")
    inner.gate.clear()
    waiting = [asyncio.create_task(backend.embed(machine.job())) for _ in range(3)]
    await settle()
    inner.gate.set()

    errors = await asyncio.gather(*waiting, return_exceptions=True)

    assert len({id(error) for error in errors}) == 3, "an error that two tasks raise mixes their tracebacks"
    for error in errors:
        assert isinstance(error, ModelUnavailable)
        assert error.message == (
            "model 'one' failed to load: the weights are torn. The next attempt is possible in 2 s"
        )
        assert (error.retry_after_s, error.is_permanent) == (2, False)
    assert machine.states["one"] == [("loading", ""), ("unloaded", "failed to load: the weights are torn")]
    for pause_s in (2, 4, 8, 16, 32, 60, 60):
        num_loads = inner.num_loads
        machine.time.advance(pause_s - 0.5)
        with pytest.raises(ModelUnavailable) as caught:
            await backend.embed(machine.job())
        assert (caught.value.retry_after_s, inner.num_loads) == (1, num_loads)
        machine.time.advance(0.5)
        with pytest.raises(ModelUnavailable):
            await backend.embed(machine.job())
        assert inner.num_loads == num_loads + 1

    inner.error = None
    machine.time.advance(60)
    assert await answers(backend, machine)
    await backend.unload()
    inner.error = RuntimeError("out of luck")
    with capture_logs() as lines, pytest.raises(ModelUnavailable, match="RuntimeError: out of luck") as caught:
        await backend.embed(machine.job())
    assert caught.value.retry_after_s == 2, "a success ends the row of failures"
    [line] = [line for line in lines if line["event"] == "model_load_failed"]
    assert (line["log_level"], line["pause_s"], line["exc_info"]) == ("error", 2.0, True)


async def test_the_memory_of_a_failed_load_is_released(machine: Machine) -> None:
    backend = await machine.start("one")
    inner = machine.inner["one"]

    async def start_and_fail(report: object) -> None:
        await type(inner).start(inner)
        raise LoadError("its vectors are not the golden ones")

    inner.start = start_and_fail  # type: ignore[method-assign,assignment]
    with pytest.raises(ModelUnavailable):
        await backend.embed(machine.job())

    assert machine.free == 100


# ------------------------------------------------------------------------------------------------------------ leaving


async def test_the_least_recently_used_leaves(machine: Machine) -> None:
    backends = {name: await machine.start(name, 40) for name in ("a", "b", "c")}
    for name in ("a", "b", "a"):
        machine.time.advance(1)
        await backends[name].embed(machine.job())
    unloads = count("gateway_model_unloads_total", model="b", reason="memory")

    assert await answers(backends["c"], machine)

    assert machine.states == {"a": LOADED, "b": [*LOADED, ("unloaded", "")], "c": LOADED}
    assert count("gateway_model_unloads_total", model="b", reason="memory") == unloads + 1


async def test_as_many_leave_as_must(machine: Machine) -> None:
    backends = {name: await machine.start(name, size) for name, size in (("a", 30), ("b", 30), ("c", 30), ("big", 65))}
    for name in ("a", "b", "c"):
        machine.time.advance(1)
        await backends[name].embed(machine.job())

    assert await answers(backends["big"], machine)

    assert [name for name in "abc" if machine.states[name] == LOADED] == ["c"]


async def test_none_leaves_where_all_of_them_would_not_be_enough(machine: Machine) -> None:
    machine.free = 80
    small, big = await machine.start("small", 20), await machine.start("big", 90)
    await small.embed(machine.job())

    with pytest.raises(ModelUnavailable, match="too little memory on cpu: 30 are missing"):
        await big.embed(machine.job())

    assert machine.states["small"] == LOADED


async def test_models_of_other_devices_stay(machine: Machine) -> None:
    card = machine.make("card", 80, device="cuda:0, cuda:1")
    await card.start(lambda _state, _reason: None)
    await card.embed(machine.job())
    other = await machine.start("other", 40)

    with pytest.raises(ModelUnavailable, match="too little memory"):
        await other.embed(machine.job())

    assert (await card.embed(machine.job())).num_tokens == [2]
    assert machine.inner["card"].num_loads == 1


async def test_idle_models_leave_before_busy_ones_and_busy_ones_finish_their_work(machine: Machine) -> None:
    busy, idle, third = [await machine.start(name, 40) for name in ("busy", "idle", "third")]
    at_work = asyncio.create_task(busy.embed(machine.job("held")))
    await settle()
    machine.time.advance(1)
    await idle.embed(machine.job())

    assert await answers(third, machine)
    assert machine.states["idle"] == [*LOADED, ("unloaded", "")]

    also_at_work = asyncio.create_task(third.embed(machine.job("held")))
    back = asyncio.create_task(idle.embed(machine.job()))
    await settle()
    assert machine.states["busy"] == LOADED, "its work is not done"
    late = asyncio.create_task(busy.embed(machine.job()))  # comes when the model is leaving
    await settle()
    assert not back.done()
    machine.inner["busy"].release.set()
    machine.inner["third"].release.set()

    for job in (at_work, also_at_work, back, late):
        assert (await asyncio.wait_for(job, 5)).num_tokens in ([1], [2])
    assert machine.inner["busy"].num_loads == 2


async def test_two_models_that_exclude_each_other_take_turns(machine: Machine) -> None:
    pair = [await machine.start(name, 60) for name in ("left", "right")]

    jobs = [pair[n % 2].embed(machine.job()) for n in range(40)]
    results = await asyncio.wait_for(asyncio.gather(*jobs), 10)

    assert [result.num_tokens for result in results] == [[2]] * 40
    assert sum(inner.num_loads for inner in machine.inner.values()) == 2, "those that waited were answered by one load"


async def test_a_model_that_is_needed_again_while_it_leaves_comes_back(machine: Machine) -> None:
    """The load that unloads it and its own next load must not wait for each other."""
    first, second = await machine.start("first", 60), await machine.start("second", 60)
    at_work = asyncio.create_task(first.embed(machine.job("held")))
    await settle()
    jobs = [asyncio.create_task(backend.embed(machine.job())) for backend in (second, first, second, first)]
    leaving = asyncio.create_task(first.leave("idle"))
    await settle()
    machine.inner["first"].release.set()

    results = await asyncio.wait_for(asyncio.gather(at_work, *jobs), 5)
    await leaving

    assert [result.num_tokens for result in results] == [[1], [2], [2], [2], [2]]


async def test_a_model_leaves_after_a_time_without_jobs(machine: Machine) -> None:
    backend = await machine.start("one", idle_unload_s=60)
    await backend.embed(machine.job())
    machine.time.advance(40)
    await backend.embed(machine.job())
    machine.time.advance(40)
    await settle()
    assert machine.states["one"] == LOADED, "idle for 40 s"
    at_work = asyncio.create_task(backend.embed(machine.job("held")))
    await settle()
    machine.time.advance(100)
    await settle()
    assert machine.states["one"] == LOADED, "at work"
    machine.inner["one"].release.set()
    await at_work
    machine.time.advance(60)
    await settle()

    assert (machine.states["one"], machine.free) == ([*LOADED, ("unloaded", "")], 100)
    assert count("gateway_model_unloads_total", model="one", reason="idle") >= 1
    assert await answers(backend, machine)


async def test_without_a_time_limit_an_idle_model_stays(machine: Machine) -> None:
    backend = await machine.start("one")
    await backend.embed(machine.job())

    assert machine.time.timers == []


async def test_a_model_that_left_for_another_reason_is_not_unloaded_by_its_old_timer(machine: Machine) -> None:
    backend = await machine.start("one", idle_unload_s=60)
    await backend.embed(machine.job())
    await backend.unload()
    machine.time.advance(50)
    await backend.embed(machine.job())
    machine.time.advance(20)
    await settle()

    assert machine.states["one"] == [*LOADED, ("unloaded", ""), *LOADED]


# --------------------------------------------------------------------------------------------------------- the operator


async def test_the_operator_loads_and_unloads(machine: Machine) -> None:
    backend = await machine.start("one")

    await backend.unload()  # nothing to do
    await backend.load()
    await backend.load()
    assert machine.states["one"] == LOADED
    at_work = asyncio.create_task(backend.embed(machine.job("held")))
    await settle()
    unloading = asyncio.create_task(backend.unload())
    await settle()
    assert not unloading.done()
    machine.inner["one"].release.set()
    await unloading

    assert (await at_work).num_tokens == [1]
    assert (machine.states["one"], machine.free) == ([*LOADED, ("unloaded", "")], 100)
    assert count("gateway_model_unloads_total", model="one", reason="operator") >= 1


async def test_an_operator_who_gives_up_leaves_no_half_of_a_model(machine: Machine) -> None:
    backend = await machine.start("one")
    at_work = asyncio.create_task(backend.embed(machine.job("held")))
    await settle()
    unloading = asyncio.create_task(backend.unload())
    await settle()
    unloading.cancel()
    machine.inner["one"].release.set()
    await at_work
    await settle()

    assert (machine.states["one"], machine.free) == ([*LOADED, ("unloaded", "")], 100)
    assert await answers(backend, machine)


async def test_a_load_in_progress_ends_before_the_operator_unloads(machine: Machine) -> None:
    backend = await machine.start("one")
    machine.inner["one"].gate.clear()
    loading = asyncio.create_task(backend.load())
    await settle()
    unloading = asyncio.create_task(backend.unload())
    await settle()
    assert not unloading.done()
    machine.inner["one"].gate.set()
    await asyncio.gather(loading, unloading)

    assert machine.states["one"] == [*LOADED, ("unloaded", "")]


async def test_a_model_that_never_fits_is_announced_at_the_start(machine: Machine) -> None:
    small = await machine.start("small", 60)
    await small.embed(machine.job())
    with capture_logs() as lines:
        await machine.start("fits", 90)
        await machine.start("large", 140)

    assert [(line["event"], line["log_level"], line["model"], line["reason"]) for line in lines] == [
        ("model_does_not_fit", "warning", "large", "too little memory on cpu: 100 are missing")
    ]


# ------------------------------------------------------------------------------------------------------------ the end


async def test_a_stop_while_loading_answers_all_at_once_and_the_load_leaves_nothing(machine: Machine) -> None:
    backend = await machine.start("one")
    machine.inner["one"].gate.clear()
    waiting = [asyncio.create_task(backend.embed(machine.job())) for _ in range(2)]
    await settle()

    await asyncio.wait_for(backend.stop(), 5)
    errors = await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(error) for error in errors] == [ShuttingDown, ShuttingDown]
    with pytest.raises(ShuttingDown):
        await backend.embed(machine.job())
    machine.inner["one"].gate.set()
    await settle()
    assert (machine.free, machine.states["one"]) == (100, [("loading", "")])
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_stop_releases_a_loaded_model(machine: Machine) -> None:
    backend = await machine.start("one", idle_unload_s=60)
    await backend.embed(machine.job())

    await backend.stop()
    await backend.stop()
    machine.time.advance(60)
    await settle()

    assert (machine.free, machine.states["one"]) == (100, LOADED)
    with pytest.raises(RequestError):
        await backend.embed(machine.job())


async def test_reports_of_a_loaded_models_watchdog_are_passed_on(machine: Machine) -> None:
    backend = await machine.start("one")
    await backend.embed(machine.job())

    machine.inner["one"].report(ModelState.RECOVERING, "a batch hung")
    assert machine.states["one"][-1] == ("recovering", "a batch hung")
    await backend.unload()
    machine.inner["one"].report(ModelState.READY, "")

    assert machine.states["one"][-1] == ("unloaded", "")
