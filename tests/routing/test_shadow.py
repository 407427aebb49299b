"""A shadow gets a copy of some requests, and never slows or changes an answer."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Registry, Shadow
from gateway.errors import InferenceFailed
from gateway.fleet import Fleet, Model
from gateway.routing.names import GATEWAY
from gateway.routing.router import Router
from gateway.routing.shadow import Shadows
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, ModelState, Priority, Truncate

MakeModel = Callable[..., Model]
MakeFleet = Callable[..., tuple[Registry, Fleet]]


TASKS = {"retrieval.query": "q: ", "retrieval.passage": "p: "}


class Second(FakeBackend):
    """The second model: waits at its gate, and remembers its jobs."""

    def __init__(self) -> None:
        super().__init__(fake_info("second"))
        self.jobs: list[EmbedJob] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def embed(self, job: EmbedJob) -> Embeddings:
        self.jobs.append(job)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return await super().embed(job)


@pytest.fixture
async def second() -> Second:
    backend = Second()
    await backend.start()
    return backend


@pytest.fixture
async def make_shadows(
    make_model: MakeModel, make_fleet: MakeFleet, second: Second
) -> AsyncIterator[Callable[..., tuple[Router, Shadows]]]:
    made: list[Shadows] = []

    def make(**fields: object) -> tuple[Router, Shadows]:
        registry, fleet = make_fleet(
            make_model("first"),
            make_model("second", backend=second, tasks=TASKS),
            aliases={"default": "first", "other": "first"},
        )
        shadow = Shadow.model_validate({"of": "default", "to": "second", **fields})
        registry = registry.model_copy(update={"shadows": (shadow,)})
        router = Router(registry, fleet)
        made.append(Shadows(registry, router))
        return router, made[-1]

    yield make
    for shadows in made:
        await shadows.stop()


MakeShadows = Callable[..., tuple[Router, Shadows]]


@pytest.fixture
def counted() -> Callable[[str], float]:
    """Return a function that counts an outcome's occurrences since the test began."""

    def read(outcome: str, of: str = "default") -> float:
        labels = {"of": of, "to": "second", "outcome": outcome}
        return metrics.REGISTRY.get_sample_value("gateway_shadow_requests_total", labels) or 0

    before = {
        outcome: read(outcome) for outcome in ("ok", "dropped", "inference_failed", "internal_error", "model_not_ready")
    }
    return lambda outcome: read(outcome) - before[outcome]


def offer(
    router: Router,
    shadows: Shadows,
    name: str = "default",
    texts: tuple[str, ...] = ("a b",),
    task: str | None = "query",
    timeout_s: float = 5.0,
    priority: Priority = Priority.NORMAL,
) -> None:
    shadows.offer(router.choose(name, GATEWAY), list(texts), task, Truncate.START, timeout_s, priority)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_copy_goes_to_the_second_model_and_is_recorded(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    router, shadows = make_shadows()
    tokens = metrics.REGISTRY.get_sample_value("gateway_shadow_tokens_total", {"of": "default", "to": "second"}) or 0
    second.gate.set()

    offer(router, shadows, texts=("a b", "c"))
    await settle()

    assert [job.texts for job in second.jobs] == [["a b", "c"]]
    assert second.jobs[0].truncate is Truncate.START
    assert counted("ok") == 1
    after = metrics.REGISTRY.get_sample_value("gateway_shadow_tokens_total", {"of": "default", "to": "second"}) or 0
    assert after - tokens == 3


@pytest.mark.parametrize(
    ("of", "name", "num_copies"),
    [
        pytest.param("default", "default", 1, id="the alias"),
        pytest.param("default", "first", 0, id="its model by another name"),
        pytest.param("default", "other", 0, id="another alias of its model"),
        pytest.param("first", "default", 1, id="a model, asked for by an alias"),
        pytest.param("first", "first", 1, id="a model, asked for by its id"),
        pytest.param("first", "second", 0, id="another model"),
        pytest.param("second", "second", 0, id="never to the model that answered"),
    ],
)
async def test_a_shadow_follows_its_name_or_its_model(
    make_shadows: MakeShadows, second: Second, of: str, name: str, num_copies: int
) -> None:
    router, shadows = make_shadows(of=of)

    offer(router, shadows, name)
    await settle()

    assert len(second.jobs) == num_copies


async def test_a_queue_that_is_full_drops_and_never_waits(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    """Four are worked on, three wait, and the other 93 are dropped at once."""
    router, shadows = make_shadows(max_queue=3)

    for _ in range(4):
        offer(router, shadows)
        await settle()
    for _ in range(96):
        offer(router, shadows)

    assert len(second.jobs) == 4
    assert counted("dropped") == 93
    second.gate.set()
    await settle()
    assert counted("ok") == 7


async def test_long_texts_cannot_fill_the_memory(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    router, shadows = make_shadows(max_queue=1000)
    text = "x" * 5_000_000

    for _ in range(10):
        offer(router, shadows, texts=(text,))

    assert counted("dropped") == 7  # three times 5 million characters wait


async def test_a_sample_of_the_requests_is_copied(make_shadows: MakeShadows, second: Second) -> None:
    router, shadows = make_shadows(sample=0.25, max_queue=10_000)
    second.gate.set()

    for _ in range(2000):
        offer(router, shadows)
    num_done = -1
    for _ in range(1000):
        await settle()
        if len(second.jobs) == num_done:
            break
        num_done = len(second.jobs)

    assert 350 < len(second.jobs) < 650  # 500 on average, with a standard deviation of 19


@pytest.mark.parametrize(
    ("error", "code"),
    [(InferenceFailed("it raised"), "inference_failed"), (RuntimeError("unexpected"), "internal_error")],
)
async def test_an_error_of_the_second_model_is_counted_and_the_next_copy_runs(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float], error: Exception, code: str
) -> None:
    router, shadows = make_shadows()
    second.gate.set()
    second.error = error

    offer(router, shadows)
    await settle()
    second.error = None
    offer(router, shadows)
    await settle()

    assert (counted(code), counted("ok")) == (1, 1)


async def test_a_second_model_that_is_not_ready_is_counted(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    router, shadows = make_shadows()
    router.choose("second", GATEWAY).model.report(ModelState.LOADING, "")

    offer(router, shadows)
    await settle()

    assert (len(second.jobs), counted("model_not_ready")) == (0, 1)


async def test_stopping_drops_what_waits(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    router, shadows = make_shadows()
    for _ in range(6):
        offer(router, shadows)
    await settle()

    await shadows.stop()

    assert counted("dropped") == 6
    assert counted("ok") == 0


# --------------------------------------------------------------------------------------------- as long as it serves


def queued(of: str = "default") -> float:
    return metrics.REGISTRY.get_sample_value("gateway_shadow_queue", {"of": of, "to": "second"}) or 0


async def test_after_a_lull_copies_are_taken_up_again(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    """More often than there are workers: each of them has ended and made room."""
    router, shadows = make_shadows()
    second.gate.set()

    for _ in range(20):
        offer(router, shadows)
        await settle()

    assert (counted("ok"), counted("dropped")) == (20, 0)


async def test_a_burst_in_the_turn_in_which_the_workers_end_is_taken_up(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    """A worker that has run out of copies takes no more, though its task is not done yet."""
    router, shadows = make_shadows()
    for _ in range(4):
        offer(router, shadows)
    await settle()
    assert len(second.jobs) == 4

    # Called in the turn after the gate has opened: behind the last steps of the workers, before their tasks' callbacks.
    second.gate.set()
    loop = asyncio.get_running_loop()
    for turn in range(6):
        loop.call_soon(lambda: None)
        await asyncio.sleep(0)
        if counted("ok") == 4:
            break
        assert turn < 5
    offer(router, shadows)
    await settle()

    assert (counted("ok"), len(second.jobs)) == (5, 5)


async def test_room_for_long_texts_is_given_back(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    router, shadows = make_shadows(max_queue=1000)
    second.gate.set()

    for _ in range(10):
        offer(router, shadows, texts=("x" * 15_000_000,))
        await settle()

    assert (counted("ok"), counted("dropped")) == (10, 0)


async def test_the_queue_is_shown_while_it_waits(make_shadows: MakeShadows, second: Second) -> None:
    before = queued()
    router, shadows = make_shadows()
    for _ in range(4):
        offer(router, shadows)
        await settle()
    for _ in range(3):
        offer(router, shadows)

    assert queued() - before == 3
    second.gate.set()
    await settle()
    assert queued() == before


async def test_a_copy_has_the_task_and_the_patience_and_its_own_caller(
    make_shadows: MakeShadows, second: Second
) -> None:
    names = ("gateway_shadow_texts_total", "gateway_shadow_duration_seconds_count")
    labels = {"of": "default", "to": "second"}
    before = [metrics.REGISTRY.get_sample_value(name, labels) or 0 for name in names]
    router, shadows = make_shadows()
    second.gate.set()
    started = time.monotonic()

    offer(router, shadows, texts=("a", "b", "c"))
    await settle()

    [job] = second.jobs
    assert (job.caller, job.task) == ("shadow", "retrieval.query")
    assert started + 5 <= job.deadline <= time.monotonic() + 5
    after = [metrics.REGISTRY.get_sample_value(name, labels) or 0 for name in names]
    assert [now - was for now, was in zip(after, before, strict=True)] == [3, 1]


@pytest.mark.parametrize("priority", Priority)
async def test_a_copy_has_the_priority_and_does_not_wait_for_a_day_as_the_line_of_a_batch_does(
    make_shadows: MakeShadows, second: Second, priority: Priority
) -> None:
    router, shadows = make_shadows()
    second.gate.set()

    offer(router, shadows, timeout_s=86_400.0, priority=priority)
    await settle()

    [job] = second.jobs
    assert job.priority is priority
    assert job.deadline <= time.monotonic() + 60


async def test_a_copy_has_the_task_that_the_name_says(make_shadows: MakeShadows, second: Second) -> None:
    router, shadows = make_shadows()

    offer(router, shadows, "default:passage", task=None)
    await settle()

    assert [job.task for job in second.jobs] == ["retrieval.passage"]


async def test_work_that_is_done_leaves_nothing_behind(make_shadows: MakeShadows, second: Second) -> None:
    def num_done() -> int:
        gc.collect()
        return sum(isinstance(one, asyncio.Task) and one.done() for one in gc.get_objects())

    router, shadows = make_shadows()
    second.gate.set()
    before = num_done()

    for _ in range(20):
        offer(router, shadows)
        await settle()

    assert num_done() - before < 20


async def test_after_a_stop_nothing_is_taken_up(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    """A request that began before a reload ends after it."""
    router, shadows = make_shadows()
    for _ in range(6):
        offer(router, shadows)
    await settle()
    await shadows.stop()
    second.gate.set()

    offer(router, shadows)
    await settle()

    assert len(second.jobs) == 4
    assert counted("dropped") == 7
    assert queued() == 0


async def test_copies_that_are_offered_just_before_a_stop_are_dropped_once(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    router, shadows = make_shadows()
    offer(router, shadows)

    await shadows.stop()

    assert (counted("dropped"), len(second.jobs)) == (1, 0)


async def test_the_queue_after_a_reload_has_the_gauge_for_itself(make_shadows: MakeShadows, second: Second) -> None:
    router, old = make_shadows()
    _router, new = make_shadows()
    for shadows in (old, new):
        for _ in range(4):
            offer(router, shadows)
            await settle()
        for _ in range(2):
            offer(router, shadows)
    assert queued() == 4

    await old.stop()

    assert queued() == 2


async def test_no_more_than_four_are_ever_worked_on(make_shadows: MakeShadows, second: Second) -> None:
    """Also after workers have come and gone."""
    router, shadows = make_shadows()
    second.gate.set()
    for _ in range(8):
        offer(router, shadows)
        await settle()
    second.gate.clear()
    num_before = len(second.jobs)

    for _ in range(20):
        offer(router, shadows)
        await settle()

    assert len(second.jobs) - num_before == 4


async def test_texts_may_fill_the_available_room_completely(
    make_shadows: MakeShadows, second: Second, counted: Callable[[str], float]
) -> None:
    router, shadows = make_shadows()
    second.gate.set()

    offer(router, shadows, texts=("x" * 16_000_000,))
    await settle()
    offer(router, shadows, texts=("x" * 16_000_001,))
    await settle()

    assert (counted("ok"), counted("dropped")) == (1, 1)
