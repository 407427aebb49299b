"""What every endpoint that computes does around the one service call: patience, clients that leave, headers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request, Response

from gateway.access.quotas import Quotas, Ticket
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.embedding import Timings
from gateway.errors import ClientDisconnected
from gateway.middleware import RequestContext
from gateway.reranking import RerankAnswer, RerankRequest
from gateway.routing.experiments import Attribute
from gateway.service import EmbedAnswer, EmbeddingService, EmbedRequest
from gateway.telemetry import metrics

# A header that lists more truncated inputs than this says how many more there are: proxies limit headers to 8 KiB.
_MAX_LISTED_INDICES = 100
T = TypeVar("T")

DescribeTimes = Callable[[Timings, float], Mapping[str, str]]
"""Makes a dialect's own headers of the stages' times and the seconds since the request came."""


class Exchange:
    """The steps from a request to its answer that are the same in every dialect."""

    def __init__(self, service: EmbeddingService, deployment: Deployment, settings: Settings, quotas: Quotas) -> None:
        self.service = service
        self.deployment = deployment
        self.settings = settings
        self._quotas = quotas

    async def admit(self, request: Request) -> Ticket:
        """Count a request, before its body is read.

        Raises:
            RateLimited: the client has no request or no token left in this minute.
        """
        context = RequestContext.of(request)
        return await self._quotas.admit(context.client, context.headers)

    def begin(self, request: Request, texts: Sequence[str], model: str | None, user: object = None) -> EmbedRequest:
        """Say what a request asks for, as far as that does not depend on the dialect.

        Args:
            model: public name, or ``None`` for the registry's default.
            user: whom the request is for, by its body.
        """
        context = RequestContext.of(request)
        return EmbedRequest(
            texts=texts,
            model=model,
            timeout_s=timeout_s(request, self.settings.request_timeout_s),
            caller=context.caller,
            may_use=context.client.may_use,
            expect_space=request.headers.get("x-gateway-expect-space"),
            attribute=unit_attribute(request, user),
            max_token_vectors=self.settings.max_token_vectors,
        )

    async def embed(self, request: Request, ticket: Ticket, wanted: EmbedRequest) -> EmbedAnswer:
        """Embed the texts, and charge the client for their tokens.

        Raises:
            RequestError: one of those of :meth:`EmbeddingService.embed`.
            ClientDisconnected: the client went away first.
        """
        RequestContext.of(request).asked = wanted.model
        async with self._quotas.reserve(ticket, wanted.texts, self.deployment.fleet.max_tokens):
            answer = await unless_disconnected(request, self.service.embed(wanted))
            await self._quotas.charge(ticket, answer.num_tokens)
        return answer

    async def rerank(self, request: Request, ticket: Ticket, wanted: RerankRequest) -> RerankAnswer:
        """Score the texts against the query, and charge the client for the tokens of all pairs.

        Raises:
            RequestError: one of those of :meth:`EmbeddingService.rerank`.
            ClientDisconnected: the client went away first.
        """
        RequestContext.of(request).asked = wanted.model
        longest = self.deployment.fleet.max_tokens
        async with self._quotas.reserve(ticket, wanted.texts, longest, beside=wanted.query):
            answer = await unless_disconnected(request, self.service.rerank(wanted))
            await self._quotas.charge(ticket, answer.num_tokens)
        return answer

    def respond(
        self,
        request: Request,
        answer: EmbedAnswer | RerankAnswer,
        render: Callable[[], bytes],
        describe_times: DescribeTimes | None = None,
    ) -> Response:
        """Write an answer, note what it was for the log and the metrics, and say so in its headers.

        Args:
            render: writes the answer as JSON.
            describe_times: makes headers that only this dialect has.
        """
        context = RequestContext.of(request)
        started = time.monotonic()
        content = render()
        timings = replace(answer.timings, serialise_s=time.monotonic() - started)
        note_answer(context, answer, timings)
        headers = answer_headers(answer, timings, context.elapsed_s)
        if describe_times is not None:
            headers |= describe_times(timings, context.elapsed_s)
        return Response(content, media_type="application/json", headers=headers)


def unit_attribute(request: Request, user: object) -> Attribute:
    """Return what looks up the things in a request that the unit of an experiment can be made from.

    Args:
        user: the body's field of that name.
    """

    def attribute(source: str) -> str | None:
        match source.partition(":"):
            case ("header", _, name):
                value = request.headers.get(name)
            case ("body", _, "user"):
                value = str(user) if isinstance(user, str | int) else None
            case _:
                value = RequestContext.of(request).key_owner
        return value or None

    return attribute


def timeout_s(request: Request, limit_s: float) -> float:
    """Return how long the answer is of use: OpenAI's clients say how long they wait."""
    try:
        patience_s = float(request.headers["x-stainless-read-timeout"])
    except (KeyError, ValueError):
        return limit_s
    return min(limit_s, patience_s) if patience_s > 0 else limit_s


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, and cancel it when the client goes away, so that nothing is computed for nobody.

    Raises:
        ClientDisconnected: the client went away first.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected("the client closed the connection before the answer")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def note_answer(context: RequestContext, answer: EmbedAnswer | RerankAnswer, timings: Timings) -> None:
    """Add what was computed to the log line, and the time of writing it to the metrics."""
    context.describe(answer.model, answer.task, answer.num_texts, answer.num_tokens, timings)
    if answer.assignment is not None:
        context.experiment, context.arm = answer.assignment.experiment, answer.assignment.arm.label
    metrics.meters(answer.model, answer.task, context.experiment, context.arm).serialise_s.observe(timings.serialise_s)


def answer_headers(answer: EmbedAnswer | RerankAnswer, timings: Timings, elapsed_s: float) -> dict[str, str]:
    """Return the headers that say what answered, and how long each stage took.

    Args:
        elapsed_s: seconds since the request began.
    """
    stages = {**timings.stages, "total": elapsed_s}
    headers = {
        "x-gateway-model": answer.model,
        "server-timing": ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items()),
    }
    if answer.space is not None:
        headers["x-gateway-space"] = answer.space
    if answer.task is not None:
        headers["x-gateway-task"] = quote(answer.task)  # the registry may call a task anything
    if answer.assignment is not None:
        headers["x-gateway-experiment"] = answer.assignment.experiment
        headers["x-gateway-arm"] = answer.assignment.arm.label
        headers["x-gateway-assignment"] = answer.assignment.reason.value
    if answer.truncated:
        headers["x-gateway-truncated"] = _list_indices(answer.truncated)
    return headers


def _list_indices(indices: Sequence[int]) -> str:
    listed = ",".join(str(i) for i in indices[:_MAX_LISTED_INDICES])
    more = len(indices) - _MAX_LISTED_INDICES
    return f"{listed},+{more}" if more > 0 else listed
