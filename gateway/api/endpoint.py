"""What every endpoint that computes does around the one service call: bodies, patience, clients that leave, answers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from email.message import Message
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.access.quotas import Quotas, Ticket
from gateway.api.json_body import SMALL_BYTES, Json, parse_object
from gateway.api.pieces import PIECE_BYTES, in_pieces
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import ClientDisconnected, DeadlineExceeded
from gateway.experiments.split import UnitSource
from gateway.http.middleware import RequestContext
from gateway.http.turns import Turns
from gateway.requests import Answer, EmbedAnswer, EmbedRequest, RerankAnswer, RerankRequest
from gateway.service import EmbeddingService
from gateway.telemetry import metrics
from gateway.types import Timings

# A header that lists more truncated inputs than this says how many more there are: proxies limit headers to 8 KiB.
_MAX_LISTED_INDICES = 100
# Numbers of an answer that are written at once, on the event loop: in less than a millisecond.
_SMALL_ANSWER_BYTES = 64 * 1024
_MAX_SHOWN_CHARSET = 40
# How much of a content type is looked at: its parser takes 20 ms for 60 KB.
_MAX_CONTENT_TYPE = 1_000
T = TypeVar("T")

Parts = Callable[[], Iterator[bytes]]
"""Writes an answer as JSON, part by part. May be called several times."""

DescribeTimes = Callable[[Timings, float], Mapping[str, str]]
"""Makes a dialect's own headers of the stages' times and the seconds since the request came."""


class Endpoint:
    """The steps from a request to its answer that are the same in every dialect."""

    def __init__(self, service: EmbeddingService, deployment: Deployment, settings: Settings, quotas: Quotas) -> None:
        self.service = service
        self.deployment = deployment
        self.settings = settings
        self._quotas = quotas
        self._turns = Turns("json")

    async def admit(self, request: Request) -> Ticket:
        """Count a request, before its body is read.

        Raises:
            RateLimited: the client has no request or no token left in this minute.
        """
        context = RequestContext.of(request)
        return await self._quotas.admit(context.client, context.headers)

    async def read(self, request: Request, parse: Callable[[dict[str, Json]], T]) -> T:
        """Read a request's body; a large one is parsed in a thread.

        Args:
            parse: makes of its JSON what the dialect needs.

        Raises:
            BadInput: it is no JSON object, or ``parse`` does not accept it.
            RequestError: one of those of :meth:`gateway.http.body.Body.receive`.
        """
        charset = _charset(request)
        received = [await _receive_all(request)]
        num_bytes = len(received[0])
        if num_bytes <= SMALL_BYTES:
            return parse(parse_object(received.pop(), charset))
        return await self.in_turn(request, num_bytes, lambda: parse(parse_object(received.pop(), charset)))

    async def in_turn(self, request: Request, cost: int, work: Callable[[], T], turns: Turns | None = None) -> T:
        """Do what would hold up the event loop in a thread, when its client's turn comes.

        Args:
            cost: about how many bytes are read or written.
            turns: the thread; by default the one that reads and writes JSON.

        Raises:
            DeadlineExceeded: its turn did not come in time.
            ClientDisconnected: the client went away first.
        """
        limit_s = self.settings.request_timeout_s
        caller = RequestContext.of(request).caller
        try:
            async with asyncio.timeout(limit_s):
                return await unless_disconnected(request, (turns or self._turns).run(caller, cost, work))
        except TimeoutError:
            raise DeadlineExceeded(
                f"the request was not done in {limit_s:g} s: other requests were ahead of it"
            ) from None

    def begin(self, request: Request, texts: Sequence[str], model: str | None, user: object = None) -> EmbedRequest:
        """Say what a request asks for, as far as that does not depend on the dialect.

        Args:
            model: public name, or ``None`` for the registry's default.
            user: whom the request is for, by its body.

        Raises:
            MemoryFull: there is no room for the texts, which can be larger in memory than they were in the body.
        """
        context = RequestContext.of(request)
        return EmbedRequest(
            texts=texts,
            model=model,
            timeout_s=timeout_s(request, self.settings.request_timeout_s),
            caller=context.caller,
            client=context.client,
            expect_space=request.headers.get("x-gateway-expect-space"),
            unit_source=unit_source(request, user),
            max_token_vectors=self.settings.max_token_vectors,
            reserve=reserve_beside(request, texts),
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
        async with self._quotas.reserve(ticket, wanted.texts, longest, query=wanted.query):
            answer = await unless_disconnected(request, self.service.rerank(wanted))
            await self._quotas.charge(ticket, answer.num_tokens)
        return answer

    async def respond(
        self,
        request: Request,
        answer: Answer,
        parts: Parts,
        describe_times: DescribeTimes | None = None,
        *,
        num_bytes: int | None = None,
        has_length: bool = False,
    ) -> Response:
        """Write an answer, note what it was for the log and the metrics, and say so in its headers.

        Args:
            describe_times: makes headers that only this dialect has.
            num_bytes: how much memory the answer holds, if that is not just its arrays.
            has_length: tell the length beforehand also of a long answer; it is written twice then.
        """
        context = RequestContext.of(request)
        num_bytes = answer.num_bytes if num_bytes is None else num_bytes
        content = None
        timings = answer.timings
        if num_bytes <= _SMALL_ANSWER_BYTES:
            started = time.monotonic()
            content = b"".join(parts())
            written_s = time.monotonic() - started
            timings = replace(timings, serialize_s=written_s)
        headers = answer_headers(answer, timings, context.elapsed_s)
        if describe_times is not None:
            headers |= describe_times(timings, context.elapsed_s)
        if content is not None:
            note_answer(context, answer, written_s)
            context.memory.shrink(len(content))
            return Response(content, media_type="application/json", headers=headers)

        def note(serialize_s: float) -> None:
            note_answer(context, answer, serialize_s)

        return await self.stream(request, parts, num_bytes, headers, note, has_length=has_length)

    async def stream(
        self,
        request: Request,
        parts: Parts,
        num_bytes: int,
        headers: Mapping[str, str],
        note: Callable[[float], None] = lambda _seconds: None,
        *,
        has_length: bool = False,
    ) -> Response:
        """Answer with what is written piece by piece, each when the client has taken the one before.

        Args:
            num_bytes: how much memory ``parts`` holds.
            note: told at the end, however that comes, how many seconds it took to write.
            has_length: tell the length beforehand, for which everything is written once more.
        """
        RequestContext.of(request).memory.shrink(num_bytes + 3 * PIECE_BYTES)
        answer = _Streamed(request, self._turns, parts, headers, note)
        if has_length or request.scope["http_version"] == "1.0":  # which has no chunks
            answer.headers["content-length"] = str(sum([len(piece) async for piece in answer.pieces()]))
        return answer


class _Streamed(StreamingResponse):
    """An answer that is written while it is sent, in turns with other clients' work, until its client goes away."""

    def __init__(
        self,
        request: Request,
        turns: Turns,
        parts: Parts,
        headers: Mapping[str, str],
        note: Callable[[float], None],
    ) -> None:
        super().__init__(self.pieces(), media_type="application/json", headers=headers)
        self._request = request
        self._turns = turns
        self._parts = parts
        self._note = note
        self._written_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(self._request, self.stream_response(send))
        finally:
            self._note(self._written_s)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the answer, written in the thread."""
        caller = RequestContext.of(self._request).caller
        pieces = in_pieces(self._parts())

        def write() -> bytes:
            started = time.monotonic()
            piece = next(pieces, b"")
            self._written_s += time.monotonic() - started
            return piece

        while piece := await self._turns.run(caller, PIECE_BYTES, write):
            yield piece


async def _receive_all(request: Request) -> bytearray:
    """Receive a body, without the framework, which would keep it as long as the request."""
    body = bytearray()
    has_more = True
    while has_more:
        message = await request.receive()
        body += message.get("body", b"")
        has_more = message.get("more_body", False)
    return body


def _charset(request: Request) -> str | None:
    """Return the charset that a request's content type names, if it names one."""
    content_type = request.headers.get("content-type", "")[:_MAX_CONTENT_TYPE]
    if "charset" not in content_type.lower():
        return None
    header = Message()
    header["content-type"] = content_type
    found = header.get_param("charset")
    return found[:_MAX_SHOWN_CHARSET] if isinstance(found, str) else None


def reserve_beside(request: Request, texts: Sequence[str]) -> Callable[[int], None]:
    """Set aside the memory of the texts, and return what sets aside as many bytes as it is told beside them.

    Raises:
        MemoryFull: there is no room.
    """
    memory = RequestContext.of(request).memory
    num_bytes = sum(map(sys.getsizeof, texts))
    memory.resize(num_bytes)
    return lambda more: memory.resize(num_bytes + more)


def unit_source(request: Request, user: object) -> UnitSource:
    """Return the lookup of a request's values that an experiment can make a unit from.

    Args:
        user: the body's field of that name.
    """

    def look_up(source: str) -> str | None:
        match source.partition(":"):
            case ("header", _, name):
                value = request.headers.get(name)
            case ("body", _, "user"):
                value = str(user) if isinstance(user, str | int) else None
            case _:
                value = RequestContext.of(request).key_owner
        return value or None

    return look_up


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


def note_answer(context: RequestContext, answer: Answer, serialize_s: float) -> None:
    """Add what was computed to the log line, and the time of writing it to the metrics."""
    timings = replace(answer.timings, serialize_s=serialize_s)
    context.describe(answer.model, answer.task, answer.num_texts, answer.num_tokens, timings)
    if answer.assignment is not None:
        context.experiment, context.arm = answer.assignment.experiment, answer.assignment.arm.label
    metrics.target_metrics(answer.model, answer.task, context.experiment, context.arm).serialize_s.observe(serialize_s)


def answer_headers(answer: Answer, timings: Timings, elapsed_s: float) -> dict[str, str]:
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
