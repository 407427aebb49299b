"""The operator's requests to a running gateway: its metrics, a reload of its registry, and loads of single models."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field, SecretStr

from gateway import golden
from gateway.access.keyring import key_digest
from gateway.api.cards import CardList, find_cards
from gateway.api.live import ErrorList, error_list, live_cards
from gateway.api.wire import AnswerBody, error_responses, responses
from gateway.backends.base import Scraped
from gateway.backends.on_demand import OnDemandBackend
from gateway.config.wording import cut
from gateway.deployment import Deployment
from gateway.errors import BadInput, Forbidden, LoadError, ModelNotFound, ModelNotReady, ModelUnavailable, ReloadRefused
from gateway.fleet import Fleet, Model
from gateway.http.context import RequestContext
from gateway.http.parameters import read_query
from gateway.routing.changes import Reloaded
from gateway.telemetry import metrics
from gateway.telemetry.replica_metrics import merge
from gateway.types import ModelState

OPERATOR = "operator"
"""The default name of a person."""

_MAX_PERSON = 64


class ReloadAnswer(AnswerBody):
    """The registry was re-read, and is served."""

    status: Literal["reloaded"] = "reloaded"
    loaded: list[str] = Field(description="Models that were loaded for it, or will be loaded on demand.")
    kept: list[str] = Field(description="Unchanged models.")
    removed: list[str] = Field(description="Removed models.")
    aliases: dict[str, str] = Field(description="The change of each alias: `mini -> jina:retrieval.query`.")
    experiments: dict[str, str] = Field(
        description="The change of each experiment, whether its counts continue, and which share of its units moves "
        "to another "
        "arm: `mini 90, new 10 -> mini 50, new 50; counts start over; units that move: mini -> new 40.1%`."
    )
    seconds: float


class ModelAnswer(AnswerBody):
    """A model that is loaded on demand was loaded or unloaded."""

    id: str
    state: str
    seconds: float = Field(description="Duration. A model finishes its work in flight before it is unloaded.")


class VerifyAnswer(AnswerBody):
    """A serving model was compared with its golden vectors."""

    id: str
    ok: bool
    problem: str | None = Field(description="The problem, with the text and the cosine; `null` if the vectors agree.")
    cosine: float = Field(description="Lowest cosine to a golden vector.")
    limit: float = Field(description="Lowest cosine that the number format explains.")
    seconds: float


def require_operator(request: Request, key: SecretStr | None) -> None:
    """Let only the operator pass.

    Raises:
        Forbidden: no operator's key is set, or the request does not carry it.
    """
    path = request.url.path
    if key is None:
        raise Forbidden(f"{path} requires the operator's key, and none is configured: set GATEWAY_ADMIN_KEY")
    sent = RequestContext.of(request).api_key
    if sent is None or not hmac.compare_digest(sent, key_digest(key.get_secret_value())):
        raise Forbidden(f"{path} needs the operator's key: send `Authorization: Bearer KEY`")


def read_person(name: str, param: str) -> str:
    """Return the name of a person who votes or grades with the operator's key.

    Raises:
        BadInput: it is empty or too long, or cannot be shown.
    """
    if not 0 < len(name) <= _MAX_PERSON:
        raise BadInput(
            f"`{param}` must have 1 to {_MAX_PERSON} characters, got {len(name)}: {cut(name)!r}", param=param
        )
    if not name.isprintable():
        raise BadInput(f"`{param}` must have printable characters only, got {cut(name)!r}", param=param)
    return name


def person_of(request: Request, param: str) -> str:
    """Return the name of the person in a request's query; the operator if it has none.

    Raises:
        BadInput: as :func:`read_person`, or the name is given several times, or is not UTF-8.
    """
    if param not in request.query_params:
        return OPERATOR
    return read_person(read_query(request.scope["query_string"], param), param)


class Admin:
    """The operator's handlers.

    Args:
        are_metrics_open: whether every client that reaches the gateway may read the metrics.
    """

    def __init__(self, deployment: Deployment, *, are_metrics_open: bool) -> None:
        self._deployment = deployment
        self._are_metrics_open = are_metrics_open

    async def prometheus(self, request: Request) -> Response:
        """Return all metrics in Prometheus' text format."""
        if not self._are_metrics_open:
            require_operator(request, self._deployment.settings.admin_key)
        metrics.count_replicas(
            {
                model.id: model.backend.count_replicas()
                for model in self._deployment.fleet
                if isinstance(model.backend, Scraped) and model.state is not ModelState.DISABLED
            }
        )
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def replicas(self, request: Request) -> Response:
        """Return the metrics of a cluster's replicas, labeled `replica`. All fronts return the same metrics: scrape one."""
        if not self._are_metrics_open:
            require_operator(request, self._deployment.settings.admin_key)
        scraped = [model.backend for model in self._deployment.fleet if isinstance(model.backend, Scraped)]
        pages = await asyncio.gather(*(backend.replica_metrics() for backend in scraped))
        merged = await asyncio.to_thread(merge, dict(item for page in pages for item in page.items()))
        return Response(merged, media_type=CONTENT_TYPE_LATEST)

    async def reload(self, request: Request) -> ReloadAnswer:
        """Re-read `models.yaml`. It is checked, and its models are loaded, before the switch; a failure changes nothing."""
        require_operator(request, self._deployment.settings.admin_key)
        return reload_answer(await self._deployment.reload())

    async def errors(self, request: Request) -> ErrorList:
        """List the last errors of all clients, the latest first."""
        require_operator(request, self._deployment.settings.admin_key)
        return error_list(self._deployment.errors)

    async def cards(self, request: Request) -> CardList:
        """List the graphics cards of the machine, with the memory and the processes on each."""
        require_operator(request, self._deployment.settings.admin_key)
        live = {card.device: card for card in live_cards()}
        return await asyncio.to_thread(find_cards, live)

    async def verify(self, model: str, request: Request) -> VerifyAnswer:
        """Compare a model with its golden vectors now, between its requests."""
        require_operator(request, self._deployment.settings.admin_key)
        RequestContext.of(request).asked = model
        return await verify(self._deployment, model)

    async def load(self, model: str, request: Request) -> ModelAnswer:
        """Load a model that is loaded on demand, and wait until it is loaded."""
        return await self._change(request, model, lambda backend: backend.load())

    async def unload(self, model: str, request: Request) -> ModelAnswer:
        """Unload a model that is loaded on demand, after its work in flight. The next request loads it again."""
        return await self._change(request, model, lambda backend: backend.unload())

    async def _change(
        self, request: Request, model_id: str, change: Callable[[OnDemandBackend], Awaitable[None]]
    ) -> ModelAnswer:
        require_operator(request, self._deployment.settings.admin_key)
        RequestContext.of(request).asked = model_id
        started = time.monotonic()
        model, backend = _on_demand(self._deployment.fleet, model_id)
        with model.in_use():
            await change(backend)
        return ModelAnswer(id=model.id, state=model.state.value, seconds=round(time.monotonic() - started, 3))


def reload_answer(reloaded: Reloaded) -> ReloadAnswer:
    """Return the wire form of a reload."""
    return ReloadAnswer(
        loaded=list(reloaded.loaded),
        kept=list(reloaded.kept),
        removed=list(reloaded.removed),
        aliases=reloaded.aliases,
        experiments=reloaded.experiments,
        seconds=round(reloaded.seconds, 3),
    )


async def verify(deployment: Deployment, model_id: str) -> VerifyAnswer:
    """Compare a serving model with its golden vectors.

    Raises:
        ModelNotFound: no model has this id.
        BadInput: it has no golden vectors here.
        RequestError: it does not answer.
    """
    started = time.monotonic()
    model = _find(deployment.fleet, model_id)
    if model.entry.golden is None or model.entry.is_remote:
        raise BadInput(f"model {model.id!r} has no golden vectors here: record some with `gateway verify --record`")
    if model.info is None or not model.takes_requests:
        raise ModelNotReady(f"model {model.id!r} is {model.state.value}", retry_after_s=5)
    info = model.info
    try:
        vectors = await asyncio.to_thread(golden.read, Path(model.entry.golden), info.fingerprint, info.tasks)
    except LoadError as error:
        raise BadInput(str(error)) from error
    check = golden.GoldenCheck(model.id, vectors, golden.MIN_COSINE[info.dtype])
    problem = await check.recheck(model.compute, deployment.settings.forward_timeout_s)
    return VerifyAnswer(
        id=model.id,
        ok=not problem,
        problem=problem or None,
        cosine=metrics.values(metrics.GOLDEN_COSINE)[model.id,],
        limit=check.min_cosine,
        seconds=round(time.monotonic() - started, 3),
    )


def _find(fleet: Fleet, model_id: str) -> Model:
    """Return a model.

    Raises:
        ModelNotFound: no model has this id.
    """
    model = fleet.get(model_id)
    if model is None:
        raise ModelNotFound(
            f"no model has the id {cut(model_id)!r}; available: {', '.join(model.id for model in fleet)}"
        )
    return model


def _on_demand(fleet: Fleet, model_id: str) -> tuple[Model, OnDemandBackend]:
    """Return a model that is loaded on demand, with its backend.

    Raises:
        ModelNotFound: no model has this id.
        BadInput: the model is not loaded on demand.
        ModelNotReady: the gateway has just been started, and has not read the model yet.
        ModelUnavailable: the model is disabled or has failed.
    """
    model = _find(fleet, model_id)
    backend = model.on_demand
    if model.entry.is_remote:
        raise BadInput(f"model {model.id!r} runs on other servers, and is loaded there")
    if backend is None:
        raise BadInput(
            f"model {model.id!r} is loaded at the start and stays loaded: set `load: on_demand` in "
            "models.yaml to change that"
        )
    if model.state is ModelState.LOADING and not backend.is_started:
        raise ModelNotReady(f"model {model.id!r} cannot be loaded yet: the gateway is starting", retry_after_s=5)
    if not backend.is_started:
        raise ModelUnavailable(f"model {model.id!r} is {model.state.value}: {model.reason}", is_permanent=True)
    return model, backend


def admin_router(deployment: Deployment, *, are_metrics_open: bool) -> APIRouter:
    """Return the operator's routes.

    Args:
        are_metrics_open: whether every client that reaches the gateway may read the metrics.
    """
    router = APIRouter(tags=["Admin"])
    admin = Admin(deployment, are_metrics_open=are_metrics_open)
    for path, page in (("/metrics", admin.prometheus), ("/metrics/replicas", admin.replicas)):
        router.add_api_route(
            path,
            page,
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}}, **error_responses(Forbidden)},
        )
    router.add_api_route(
        "/admin/reload", admin.reload, methods=["POST"], responses=responses(ReloadAnswer, ReloadRefused, Forbidden)
    )
    router.add_api_route("/admin/errors", admin.errors, responses=responses(ErrorList, Forbidden))
    router.add_api_route("/admin/cards", admin.cards, responses=responses(CardList, Forbidden))
    router.add_api_route(
        "/admin/models/{model:path}/verify",
        admin.verify,
        methods=["POST"],
        responses=responses(VerifyAnswer, BadInput, Forbidden, ModelNotFound, ModelNotReady),
    )
    for name, handler in (("load", admin.load), ("unload", admin.unload)):
        router.add_api_route(
            f"/admin/models/{{model:path}}/{name}",
            handler,
            methods=["POST"],
            responses=responses(ModelAnswer, BadInput, Forbidden, ModelNotFound, ModelNotReady, ModelUnavailable),
        )
    return router
