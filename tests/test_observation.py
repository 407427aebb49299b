"""Each request is recorded once, under the registry's names only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Experiment, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import BadInput, DeadlineExceeded, InferenceFailed, ModelNotReady, Overloaded, RequestError
from gateway.experiments.arms import RequestRecord
from gateway.experiments.stats import ExperimentStats
from gateway.fleet import Fleet, Model
from gateway.observation import observe_tokenizer
from gateway.requests import EmbedRequest
from gateway.routing.names import GATEWAY
from gateway.service import EmbeddingService
from gateway.telemetry import forgetting, metrics
from gateway.types import EmbedJob, ModelState

MakeModel = Callable[..., Model]
MakeFleet = Callable[..., tuple[Registry, Fleet]]

TASKS = {"retrieval.query": "query: ", "text-matching": ""}
INFO = fake_info("observed", tasks=TASKS, default_task="text-matching")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forgetting.forget_model("observed")


async def service(make_model: MakeModel, make_fleet: MakeFleet, **backend: object) -> EmbeddingService:
    model = make_model("observed", backend=FakeBackend(INFO, **backend), tasks=TASKS, default_task="text-matching")
    await model.backend.start(model.report)
    registry, fleet = make_fleet(model, aliases={"queries": ("observed", "query")})
    return EmbeddingService(Deployment(registry, Settings(), fleet), ExperimentStats(None))


def request(model: str = "observed", task: str | None = None) -> EmbedRequest:
    return EmbedRequest(["a b"], model, timeout_s=5.0, caller="me", client=GATEWAY, task=task)


def outcomes() -> dict[tuple[str, str], float]:
    """Return the number of requests by task and outcome."""
    return {
        (sample.labels["task"], sample.labels["outcome"]): sample.value
        for family in metrics.REGISTRY.collect()
        for sample in family.samples
        if sample.name == "gateway_embed_requests_total" and sample.labels["model"] == "observed" and sample.value
    }


@pytest.mark.parametrize(
    ("name", "task", "label"),
    [
        pytest.param("observed", None, "text-matching", id="default"),
        pytest.param("observed", "search_query", "retrieval.query", id="canonical"),
        pytest.param("queries", None, "retrieval.query", id="alias"),
        pytest.param("observed:query", None, "retrieval.query", id="in the name"),
    ],
)
@pytest.mark.parametrize("is_failing", [False, True])
async def test_a_request_is_counted_under_its_task(
    make_model: MakeModel, make_fleet: MakeFleet, name: str, task: str | None, label: str, is_failing: bool
) -> None:
    def fail(_job: EmbedJob) -> None:
        if is_failing:
            raise Overloaded("full", retry_after_s=1)

    embedding = await service(make_model, make_fleet, on_embed=fail)

    with pytest.raises(Overloaded) if is_failing else nullcontext():
        await embedding.embed(request(name, task))

    assert outcomes() == {(label, "overloaded" if is_failing else "ok"): 1}


async def test_a_task_that_a_client_makes_up_is_not_a_label(make_model: MakeModel, make_fleet: MakeFleet) -> None:
    embedding = await service(make_model, make_fleet)

    with pytest.raises(RequestError) as caught:
        await embedding.embed(request(task="made-up"))

    assert outcomes() == {("", caught.value.code): 1}


async def test_a_request_to_a_model_that_has_not_been_read_has_no_task(
    make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    registry, fleet = make_fleet(make_model("observed", state=ModelState.LOADING))
    embedding = EmbeddingService(Deployment(registry, Settings(), fleet), ExperimentStats(None))

    with pytest.raises(ModelNotReady):
        await embedding.embed(request(task="query"))

    assert outcomes() == {("", "model_not_ready"): 1}


async def test_requests_that_are_canceled_or_crash_are_counted_too(
    make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    has_begun = asyncio.Event()

    def crash(_job: EmbedJob) -> None:
        raise ZeroDivisionError

    slow = await service(make_model, make_fleet, delay_s=60.0, on_embed=lambda _job: has_begun.set())
    running = asyncio.create_task(slow.embed(request()))
    await has_begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(ZeroDivisionError):
        await (await service(make_model, make_fleet, on_embed=crash)).embed(request())

    assert outcomes() == {("text-matching", "client_disconnected"): 1, ("text-matching", "internal_error"): 1}


class Noted(ExperimentStats):
    """Keeps the records."""

    def __init__(self) -> None:
        super().__init__(None)
        self.records: list[RequestRecord] = []

    def record(self, request: RequestRecord) -> None:
        self.records.append(request)


FULL, LATE, WRONG = Overloaded("full"), DeadlineExceeded("late"), BadInput("wrong", param="input")


@pytest.mark.parametrize(
    ("error", "code", "is_server_error", "is_cut"),
    [
        (None, None, False, False),
        (FULL, "overloaded", True, False),
        (LATE, "deadline_exceeded", True, True),
        (WRONG, "invalid_input", False, False),
        (ZeroDivisionError(), "internal_error", True, False),
        (asyncio.CancelledError(), "client_disconnected", True, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_an_arm_has_what_became_of_each_of_its_requests(
    make_model: MakeModel,
    make_fleet: MakeFleet,
    error: BaseException | None,
    code: str | None,
    is_server_error: bool,
    is_cut: bool,
) -> None:
    def fail(_job: EmbedJob) -> None:
        if error is not None:
            raise error

    model = make_model("observed", backend=FakeBackend(INFO, on_embed=fail), tasks=TASKS, default_task="text-matching")
    await model.backend.start(model.report)
    arms = ({"model": "observed", "weight": 1}, {"model": "other", "weight": 0})
    split = Experiment.model_validate({"id": "exp", "kind": "cross_space", "unit": ("body:user",), "arms": arms})
    registry, fleet = make_fleet(model, make_model("other"), experiments=[split])
    stats = Noted()
    embedding = EmbeddingService(Deployment(registry, Settings(), fleet), stats)

    with nullcontext() if error is None else pytest.raises(type(error)):
        await embedding.embed(request("exp"))

    [record] = stats.records
    assert (record.experiment, record.arm, record.model) == ("exp", "observed", "observed")
    assert (record.error_code, record.is_server_error, record.is_cut) == (code, is_server_error, is_cut)
    assert record.num_characters == 3
    known = (1, 2, INFO.space("text-matching")) if error is None else (0, 0, None)
    assert (record.num_texts, record.num_tokens, record.space) == known


async def test_an_arm_has_the_model_that_answered_when_another_failed(
    make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    def fail(_job: EmbedJob) -> None:
        raise InferenceFailed("broken")

    models = [
        make_model("observed", backend=FakeBackend(INFO, on_embed=fail), tasks=TASKS, default_task="text-matching"),
        make_model("spare", backend=FakeBackend(replace(INFO, id="spare")), tasks=TASKS, default_task="text-matching"),
        make_model("other"),
    ]
    for model in models[:2]:
        model.info = await model.backend.start(model.report)
    assert models[1].info is not None
    arms = ({"model": "observed", "weight": 1}, {"model": "other", "weight": 0})
    split = Experiment.model_validate({"id": "exp", "kind": "cross_space", "unit": ("body:user",), "arms": arms})
    registry, fleet = make_fleet(*models, experiments=[split])
    registry = registry.model_copy(update={"fallbacks": {"observed": ("spare",)}})
    stats = Noted()

    await EmbeddingService(Deployment(registry, Settings(), fleet), stats).embed(request("exp"))

    [record] = stats.records
    assert (record.arm, record.model, record.space) == ("observed", "spare", models[1].info.space("text-matching"))


async def test_each_stage_of_a_request_is_measured_once(make_model: MakeModel, make_fleet: MakeFleet) -> None:
    def measured() -> dict[str, float]:
        return {
            sample.labels["stage"]: sample.value
            for family in metrics.REGISTRY.collect()
            for sample in family.samples
            if sample.name == "gateway_stage_duration_seconds_count" and sample.labels["model"] == "observed"
        }

    embedding = await service(make_model, make_fleet)
    before = measured()

    await embedding.embed(request())

    grown = {stage for stage, number in measured().items() if number == before.get(stage, 0) + 1}
    assert {"tokenize", "queue", "inference"} <= grown


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (Overloaded("full"), "overloaded"),
        (ZeroDivisionError(), "internal_error"),
        (asyncio.CancelledError(), "client_disconnected"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_use_of_a_tokenizer_is_counted_by_its_outcome(error: BaseException | None, outcome: str) -> None:
    labels = {"model": "observed", "operation": "split", "outcome": outcome}
    name = "gateway_tokenizer_requests_total"
    before = metrics.REGISTRY.get_sample_value(name, labels) or 0

    with nullcontext() if error is None else pytest.raises(type(error)), observe_tokenizer("observed", "split"):
        if error is not None:
            raise error

    assert metrics.REGISTRY.get_sample_value(name, labels) == before + 1
