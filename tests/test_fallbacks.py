"""While a model cannot answer, another one of the same space does, and never one of another space."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import (
    BadInput,
    DeadlineExceeded,
    InferenceFailed,
    ModelNotFound,
    ModelNotReady,
    ModelRecovering,
    ModelUnavailable,
    OutOfMemory,
    Overloaded,
    RequestError,
    UpstreamFailed,
    UpstreamUnavailable,
)
from gateway.experiments.stats import ExperimentStats
from gateway.fleet import Fleet, Model
from gateway.requests import EmbedRequest
from gateway.routing.names import GATEWAY
from gateway.routing.spaces import is_same_space
from gateway.service import EmbeddingService
from gateway.telemetry import metrics
from gateway.types import EmbedJob, ModelState

MakeModel = Callable[..., Model]
MakeFleet = Callable[..., tuple[Registry, Fleet]]
Failing = dict[str, RequestError]


class Gateway:
    """Three models, ``gpu``, ``cpu`` and ``spare``, of which each can be made to fail."""

    def __init__(self, service: EmbeddingService, models: dict[str, Model], failing: Failing) -> None:
        self.models = models
        self.failing = failing
        self.service = service

    async def ask(self, name: str = "gpu", **fields: object) -> tuple[str, str]:
        """Return the model that answered, and the answer's ``model``."""
        fields = {"texts": ["a b"], "model": name, "timeout_s": 5.0, "caller": "me", "client": GATEWAY, **fields}
        answer = await self.service.embed(EmbedRequest(**fields))  # type: ignore[arg-type]
        return answer.model, answer.name


@pytest.fixture
async def make_gateway(make_model: MakeModel, make_fleet: MakeFleet) -> Callable[..., Awaitable[Gateway]]:
    async def make(**infos: dict[str, object]) -> Gateway:
        failing: Failing = {}

        def backend_of(name: str) -> FakeBackend:
            def on_embed(_job: EmbedJob) -> None:
                if name in failing:
                    raise failing[name]

            return FakeBackend(fake_info(name, **{"fingerprint": "f" * 64, **infos.get(name, {})}), on_embed=on_embed)

        models = {}
        for name in ("gpu", "cpu", "spare"):
            backend = backend_of(name)
            models[name] = make_model(name, backend=backend)
            models[name].info = await backend.start()
        registry, fleet = make_fleet(*models.values(), aliases={"default": "gpu"})
        registry = registry.model_copy(update={"fallbacks": {"gpu": ("cpu", "spare")}})
        return Gateway(
            EmbeddingService(Deployment(registry, Settings(), fleet), ExperimentStats(None)), models, failing
        )

    return make


MakeGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def gateway(make_gateway: MakeGateway) -> Gateway:
    return await make_gateway()


def num_fallbacks(to: str = "cpu", code: str = "inference_failed") -> float:
    labels = {"model": "gpu", "fallback": to, "code": code}
    return metrics.REGISTRY.get_sample_value("gateway_fallbacks_total", labels) or 0


async def test_the_model_itself_answers_while_it_can(gateway: Gateway) -> None:
    assert await gateway.ask() == ("gpu", "gpu")


@pytest.mark.parametrize(
    "error",
    [
        InferenceFailed("raised"),
        OutOfMemory("too large"),
        ModelRecovering("reloading", retry_after_s=5),
        ModelNotReady("no"),
        UpstreamFailed("NaN for text 0", is_permanent=True),  # permanent there, but not for the fallback
        UpstreamUnavailable("wrong key", is_permanent=True),
    ],
)
async def test_when_it_fails_at_a_request_the_next_one_answers(gateway: Gateway, error: RequestError) -> None:
    before = num_fallbacks(code=error.code)
    gateway.failing["gpu"] = error

    assert await gateway.ask() == ("cpu", "gpu")  # a concrete name is echoed: the vectors are of its space
    assert num_fallbacks(code=error.code) - before == 1


async def test_an_answer_under_an_alias_names_the_model(gateway: Gateway) -> None:
    gateway.failing["gpu"] = InferenceFailed("raised")

    assert await gateway.ask("default") == ("cpu", "gpu")


async def test_fallbacks_are_tried_in_order_and_the_last_error_is_returned(gateway: Gateway) -> None:
    gateway.failing |= {"gpu": InferenceFailed("one"), "cpu": InferenceFailed("two")}
    assert await gateway.ask() == ("spare", "gpu")

    gateway.failing["spare"] = InferenceFailed("three")
    with pytest.raises(InferenceFailed, match="three"):
        await gateway.ask()


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.RECOVERING, ModelState.FAILED, ModelState.STOPPED])
async def test_a_model_that_is_not_ready_is_passed_over(gateway: Gateway, state: ModelState) -> None:
    gateway.models["gpu"].report(state, "of this test")

    assert (await gateway.ask())[0] == "cpu"

    gateway.models["cpu"].report(state, "of this test")
    assert (await gateway.ask())[0] == "spare"


async def test_where_nothing_is_ready_the_answer_is_a_503_for_the_model_that_was_asked(gateway: Gateway) -> None:
    for model in gateway.models.values():
        model.report(ModelState.FAILED, "failed to load: torn")

    with pytest.raises(ModelUnavailable, match="model 'gpu' failed to load: torn") as caught:
        await gateway.ask()
    assert caught.value.status == 503


async def test_a_disabled_model_has_no_fallback(gateway: Gateway) -> None:
    """The registry causes it, and not a fault."""
    gateway.models["gpu"].report(ModelState.DISABLED, "switched off")

    with pytest.raises(ModelNotFound):
        await gateway.ask()


async def test_a_model_of_which_nothing_is_known_has_no_fallback(gateway: Gateway) -> None:
    """Its space is not known either."""
    gateway.models["gpu"].report(ModelState.FAILED, "no such folder")
    gateway.models["gpu"].info = None

    with pytest.raises(ModelUnavailable):
        await gateway.ask()


@pytest.mark.parametrize(
    "error",
    [BadInput("wrong"), Overloaded("full", retry_after_s=1), DeadlineExceeded("late")],
)
async def test_errors_of_the_request_or_the_load_are_not_tried_elsewhere(gateway: Gateway, error: RequestError) -> None:
    gateway.failing["gpu"] = error

    with pytest.raises(type(error)) as caught:
        await gateway.ask()
    assert caught.value is error


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"fingerprint": "0" * 64}, id="other weights"),
        pytest.param({"tasks": {"query": "q: "}, "default_task": "query"}, id="other tasks"),
        pytest.param({"instruction": "embed: "}, id="another instruction"),
        pytest.param({"is_normalized": False}, id="not normalized"),
        pytest.param({"width": 16, "dimensions": (16,)}, id="another width"),
        pytest.param({"max_tokens": 8}, id="shorter texts"),
    ],
)
async def test_a_model_of_another_space_never_answers(make_gateway: MakeGateway, other: dict[str, object]) -> None:
    """A registry with it would not have started; even so, it never answers."""
    gateway = await make_gateway(cpu=other, spare=other)
    gateway.failing["gpu"] = InferenceFailed("raised")

    with pytest.raises(InferenceFailed):
        await gateway.ask()
    gateway.models["gpu"].report(ModelState.FAILED, "failed to load")
    with pytest.raises(ModelUnavailable):
        await gateway.ask()


async def test_the_answers_are_of_one_space(gateway: Gateway) -> None:
    service = gateway.service
    request = EmbedRequest(texts=["a"], model="gpu", timeout_s=5.0, caller="me", client=GATEWAY)
    first = await service.embed(request)
    gateway.failing["gpu"] = InferenceFailed("raised")
    second = await service.embed(request)

    assert (first.model, second.model) == ("gpu", "cpu")
    assert is_same_space(first.space, second.space)
