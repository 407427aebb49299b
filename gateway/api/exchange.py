"""What every endpoint that computes does around the one service call: patience, clients that leave, headers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request

from gateway.embedding import Timings
from gateway.errors import ClientDisconnected
from gateway.middleware import RequestContext
from gateway.reranking import RerankAnswer
from gateway.routing.experiments import Attribute
from gateway.service import EmbedAnswer
from gateway.telemetry import metrics

# A header that lists more truncated inputs than this says how many more there are: proxies limit headers to 8 KiB.
_MAX_LISTED_INDICES = 100
T = TypeVar("T")


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
