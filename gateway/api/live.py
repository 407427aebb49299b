"""The current state of a gateway: traffic and queue of each model, shadows, and the last errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from gateway.api.endpoint import add
from gateway.api.wire import AnswerBody, responses
from gateway.deployment import Deployment
from gateway.fleet import Model
from gateway.http.context import RequestContext
from gateway.recent import MAX_ERRORS, NUM_MINUTES, RecentError, RecentTraffic
from gateway.routing.names import Client
from gateway.telemetry import metrics

_UTC = "%Y-%m-%dT%H:%M:%SZ"


class LiveModel(BaseModel):
    """The current state of a model. Times and rates cover this process, and requests that reached the model."""

    id: str
    state: str
    reason: str | None
    device: str | None
    dtype: str | None
    memory_bytes: int | None = Field(description="The memory that the model needs: weights and largest batch.")
    waiting_texts: int = Field(description="Texts admitted and not yet answered.")
    waiting_tokens: int
    oldest_s: float = Field(description="Age of the oldest request that is not answered yet.")
    requests_per_s: float = Field(description="Rate in the last minute.")
    requests: int = Field(description=f"Requests in the last {NUM_MINUTES} minutes, errors included.")
    errors: int
    requests_by_minute: Sequence[int] = Field(
        description=f"Requests in each of the last {NUM_MINUTES} minutes, the current one last."
    )
    p50_s: float | None = Field(
        description="Latency of requests without an error; `null` if there are no such requests."
    )
    p99_s: float | None
    golden_cosine: float | None = Field(description="Lowest cosine at the last check; `null` before the first check.")
    golden_limit: float | None
    cache_hit_rate: float | None = Field(
        description="Share of the texts that were cached; `null` without a cache, or before the first text."
    )


class LiveCard(BaseModel):
    """A graphics card."""

    device: str
    total_bytes: int | None
    used_bytes: int | None = Field(description="Memory that all processes use.")
    allocated_bytes: int | None = Field(description="Memory that the tensors of this process use.")
    busy: float | None = Field(description="Fraction of the last sample period in which the card computed.")


class Live(AnswerBody):
    """The models that the key may use, and the graphics cards."""

    object: Literal["live"] = "live"
    data: list[LiveModel]
    cards: list[LiveCard]


class ShadowCard(BaseModel):
    """A copy of some traffic to a second model."""

    of: str
    to: str
    sample: float
    waiting: int
    outcomes: Mapping[str, int] = Field(
        description="Number of copies since the start, by `ok`, `dropped` or the error code."
    )


class ShadowList(AnswerBody):
    """Every shadow between two names that the key may use."""

    object: Literal["list"] = "list"
    data: list[ShadowCard]


class ErrorCard(BaseModel):
    """Failures with the same status, code, path, model and client."""

    status: int
    code: str
    message: str | None = Field(description="The message of the last one, without quotations of texts.")
    param: str | None
    path: str
    model: str | None = Field(description="The name that the client sent.")
    client: str = Field(description="The name of the key, or the network address.")
    number: int
    first: str
    last: str
    request_id: str = Field(description="The request id of the last one, which is also in the log.")


class ErrorList(AnswerBody):
    """The last errors, the latest first."""

    object: Literal["list"] = "list"
    data: list[ErrorCard]


class LiveHandlers:
    """The handlers."""

    def __init__(self, deployment: Deployment, *, has_keys: bool) -> None:
        self._deployment = deployment
        self._has_keys = has_keys

    async def live(self, request: Request) -> Live:
        """Show the queue, the rate and the latency of each model now, and the memory of the graphics cards."""
        return live(self._deployment, RequestContext.of(request).client)

    async def shadows(self, request: Request) -> ShadowList:
        """List the shadows, with the outcomes of their copies."""
        return ShadowList(data=shadow_cards(self._deployment, RequestContext.of(request).client))

    async def errors(self, request: Request) -> ErrorList:
        """List the last errors: if API keys are set, only the errors of the key."""
        client = RequestContext.of(request).client
        errors = (error for error in self._deployment.errors if not self._has_keys or error.facts.client == client.name)
        return error_list(errors)


def live_router(deployment: Deployment, *, has_keys: bool) -> APIRouter:
    """Return the routes, with and without ``/v1``.

    Args:
        has_keys: whether clients need API keys.
    """
    router = APIRouter(tags=["Live"])
    handlers = LiveHandlers(deployment, has_keys=has_keys)
    add(router, "/live", handlers.live, responses(Live))
    add(router, "/shadows", handlers.shadows, responses(ShadowList))
    add(router, "/errors", handlers.errors, responses(ErrorList))
    return router


def live(deployment: Deployment, client: Client) -> Live:
    """Return the live figures of the models that a client may use."""
    gauges = {
        name: metrics.values(gauge)
        for name, gauge in {
            "waiting_texts": metrics.QUEUE_TEXTS,
            "waiting_tokens": metrics.QUEUE_TOKENS,
            "oldest_s": metrics.QUEUE_OLDEST_SECONDS,
            "golden_cosine": metrics.GOLDEN_COSINE,
            "golden_limit": metrics.GOLDEN_LIMIT,
        }.items()
    }
    names = deployment.router.names
    models = [
        _live_model(model, deployment.traffic, {name: values.get((model.id,)) for name, values in gauges.items()})
        for model in deployment.fleet
        if names.allows(client, model.id)
    ]
    return Live(data=models, cards=live_cards())


def _live_model(model: Model, traffic: RecentTraffic, gauges: Mapping[str, float | None]) -> LiveModel:
    info, counted = model.info, traffic.of(model.id)
    return LiveModel(
        id=model.id,
        state=model.state.value,
        reason=model.reason or None,
        device=info.device if info else None,
        dtype=info.dtype if info else None,
        memory_bytes=info.memory_bytes if info else None,
        waiting_texts=int(gauges["waiting_texts"] or 0),
        waiting_tokens=int(gauges["waiting_tokens"] or 0),
        oldest_s=gauges["oldest_s"] or 0.0,
        requests_per_s=round(counted.requests_per_s, 3),
        requests=counted.requests,
        errors=counted.errors,
        requests_by_minute=counted.by_minute,
        p50_s=counted.p50_s,
        p99_s=counted.p99_s,
        golden_cosine=gauges["golden_cosine"],
        golden_limit=gauges["golden_limit"],
        cache_hit_rate=model.cache.hit_rate if model.cache else None,
    )


def live_cards() -> list[LiveCard]:
    """Return the graphics cards that this process uses."""
    metrics.refresh()
    memory, busy = metrics.values(metrics.GPU_MEMORY), metrics.values(metrics.GPU_UTILIZATION)

    def of(device: str, kind: str) -> int | None:
        value = memory.get((device, kind))
        return None if value is None else int(value)

    return [
        LiveCard(
            device=device,
            total_bytes=of(device, "total"),
            used_bytes=of(device, "used"),
            allocated_bytes=of(device, "allocated"),
            busy=busy.get((device,)),
        )
        for device in sorted({device for device, _kind in memory})
    ]


def shadow_cards(deployment: Deployment, client: Client) -> list[ShadowCard]:
    """Return the shadows between names that a client may use."""
    counts, waiting = metrics.values(metrics.SHADOW_REQUESTS), metrics.values(metrics.SHADOW_QUEUE)
    names = deployment.router.names
    return [
        ShadowCard(
            of=shadow.of,
            to=shadow.to,
            sample=shadow.sample,
            waiting=int(waiting.get((shadow.of, shadow.to), 0)),
            outcomes={
                outcome: int(number)
                for (of, to, outcome), number in counts.items()
                if (of, to) == (shadow.of, shadow.to)
            },
        )
        for shadow in deployment.registry.shadows
        if names.allows(client, shadow.of) and names.allows(client, shadow.to)
    ]


def error_list(errors: Iterable[RecentError]) -> ErrorList:
    """Return the wire form of errors."""
    return ErrorList(data=[_error_card(error) for error in errors][:MAX_ERRORS])


def _error_card(error: RecentError) -> ErrorCard:
    facts = error.facts
    return ErrorCard(
        status=facts.status,
        code=facts.code,
        message=error.reason,
        param=facts.param,
        path=facts.path,
        model=facts.asked,
        client=facts.client,
        number=error.number,
        first=f"{error.first:{_UTC}}",
        last=f"{error.last:{_UTC}}",
        request_id=error.request_id,
    )
