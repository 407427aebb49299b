"""Each request is recorded once, under names of the registry only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import ModelNotReady, Overloaded, RequestError
from gateway.experiments.stats import ExperimentStats
from gateway.fleet import Fleet, Model
from gateway.requests import EmbedRequest
from gateway.routing.names import GATEWAY
from gateway.service import EmbeddingService
from gateway.telemetry import metrics
from gateway.types import EmbedJob, ModelState

MakeModel = Callable[..., Model]
MakeFleet = Callable[..., tuple[Registry, Fleet]]

TASKS = {"retrieval.query": "query: ", "text-matching": ""}
INFO = fake_info("observed", tasks=TASKS, default_task="text-matching")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    metrics.forget_model("observed")


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


async def test_a_task_that_a_client_makes_up_is_no_label(make_model: MakeModel, make_fleet: MakeFleet) -> None:
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
