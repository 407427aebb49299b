"""The steps from a request to its answer that all dialects share."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

from fastapi import APIRouter, Request, Response

from gateway.access.quotas import Quotas
from gateway.api.answer_headers import answer_headers, tei_headers
from gateway.api.json_body import SMALL_BYTES, Json, charset_of, integral, parse_object
from gateway.api.pieces import PIECE_BYTES, Parts, Streamed, unless_disconnected
from gateway.api.wire import Responses
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import BadInput, DeadlineExceeded
from gateway.experiments.split import UnitSource
from gateway.http.context import RequestContext
from gateway.http.error_forms import ErrorForm
from gateway.http.turns import Turns
from gateway.precision import Precision
from gateway.requests import Answer, EmbedAnswer, EmbedRequest
from gateway.requests import Request as ServiceRequest
from gateway.service import EmbeddingService
from gateway.telemetry import metrics

# Answers of up to this size are written directly on the event loop, which waits for the writer anyway, because it holds
# the interpreter: 2.5 ms for this many bytes of numbers, 0.3 ms of base64. Switching to a thread and back costs more.
_SMALL_ANSWER_BYTES = 256 * 1024
EXPECT_SPACE = "x-gateway-expect-space"
"""The header with the space that a client expects."""
CAPTURE = "x-gateway-capture"
"""The header by which a client forbids the gateway to keep its texts."""

T = TypeVar("T")
B = TypeVar("B")
R = TypeVar("R", bound=ServiceRequest)
A = TypeVar("A", bound=Answer)

Parse: TypeAlias = Callable[[dict[str, Json]], B]
"""Parses the JSON of a body into a dialect's values, in a thread if the body is large."""

Ask: TypeAlias = Callable[[Request, B], Awaitable[R]]
"""Turns a request and its parsed body into a request to the service."""

Run: TypeAlias = Callable[[R], Coroutine[Any, Any, A]]
"""Answers a request to the service: :meth:`EmbeddingService.embed`, for example."""

Write: TypeAlias = Callable[[Request, B, A], Parts]
"""Returns the writer of an answer in a dialect's form."""


class Endpoint:
    """Answers requests in any dialect: admit, parse, run, respond.

    A dialect passes four functions, see :data:`Parse`, :data:`Ask`, :data:`Run` and :data:`Write`.

    Attributes:
        tokenizing: the thread that tokenizes texts for requests that show tokens.
        on_start: called when the server begins, on its event loop.
    """

    def __init__(self, service: EmbeddingService, deployment: Deployment, settings: Settings, quotas: Quotas) -> None:
        self.service = service
        self.deployment = deployment
        self.settings = settings
        self._quotas = quotas
        self._turns = Turns("json")
        # One at a time, because it takes a core that the models need more.
        self.tokenizing = Turns("tokens")
        self.on_start: list[Callable[[], None]] = []

    async def answer(
        self,
        request: Request,
        parse: Parse[B],
        ask: Ask[B, R],
        run: Run[R, A],
        write: Write[B, A],
        held_bytes: Callable[[B], int] = lambda _body: 0,
    ) -> Response:
        """Answer a request in the form of a dialect.

        Args:
            held_bytes: the memory of the parts of the body that the answer repeats.

        Raises:
            RequestError: the request is rejected or fails, in ``parse``, ``ask`` or ``run``.
            ClientDisconnected: the client went away first.
        """
        body = await self.receive(request, parse)
        service_request = await ask(request, body)
        answer = await self._run(request, service_request, run)
        num_bytes = answer.num_bytes + held_bytes(body)
        return await self._respond(request, service_request, answer, write(request, body, answer), num_bytes)

    async def receive(self, request: Request, parse: Parse[B], rows: str | None = None) -> B:
        """Count a request, then read its body; a large one is parsed in a thread.

        Raises:
            RateLimited: the client has no request or no token left in this minute.
            BadInput: the body is not a JSON object, or ``parse`` does not accept it.
            RequestError: one of those of :meth:`read`.
        """
        context = RequestContext.of(request)
        self.note_name(request, request.path_params.get("model"))
        await self._quotas.admit(context.client, context.headers)
        return await self.read(request, parse, rows)

    def note_name(self, request: Request, name: str | None) -> None:
        """Record the requested name for the log line, without a unit that it may contain."""
        if name is not None:
            RequestContext.of(request).asked = self.deployment.router.names.shown(name)

    async def read(self, request: Request, parse: Parse[B], rows: str | None = None) -> B:
        """Read the body of a request; a large one is parsed in a thread.

        Args:
            rows: see :func:`gateway.api.json_body.parse_object`.

        Raises:
            BadInput: the body is not a JSON object, or ``parse`` does not accept it.
            RequestError: one of those of :meth:`gateway.http.body.Body.receive`.
        """
        charset = charset_of(request.headers.get("content-type", ""))
        received = [await _receive_all(request)]
        num_bytes = len(received[0])
        if num_bytes <= SMALL_BYTES:
            return parse(parse_object(received.pop(), charset, rows))
        # The list hands over the only reference, so that the bytes are freed as soon as they are parsed.
        return await self.in_turn(request, num_bytes, lambda: parse(parse_object(received.pop(), charset, rows)))

    async def in_turn(self, request: Request, cost: int, work: Callable[[], T], turns: Turns | None = None) -> T:
        """Run work that would block the event loop in a thread, when its client's turn comes.

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
                f"the request did not finish in {limit_s:g} s, because other requests were ahead of it"
            ) from None

    def embed_request(
        self, request: Request, texts: Sequence[str], model: str | None, user: Json = None
    ) -> EmbedRequest:
        """Return a request to the service, with the parts that do not depend on the dialect.

        Args:
            model: public name, or ``None`` for the registry's default.
            user: the end user that the body names.

        Raises:
            MemoryFull: there is no room for the texts.
        """
        context = RequestContext.of(request)
        return EmbedRequest(
            texts=texts,
            model=model,
            timeout_s=timeout_s(request, self.settings.request_timeout_s),
            caller=context.caller,
            client=context.client,
            priority=context.priority,
            may_be_captured=may_be_captured(request),
            expect_space=_expected_space(request),
            unit_source=unit_source(request, user),
            max_token_vectors=self.settings.max_token_vectors,
            reserve=reserve_texts(request, texts),
        )

    async def embed(self, request: Request, service_request: EmbedRequest) -> EmbedAnswer:
        """Have the service answer a request that comes from a page, counted like one of the API.

        Raises:
            RequestError: the request is rejected or fails.
            ClientDisconnected: the reader went away first.
        """
        context = RequestContext.of(request)
        await self._quotas.admit(context.client, context.headers)
        return await self._run(request, service_request, self.service.embed)

    async def _run(self, request: Request, service_request: R, run: Run[R, A]) -> A:
        """Have the service answer, and charge the client for the tokens."""
        context = RequestContext.of(request)
        self.note_name(request, service_request.model)
        longest = self.deployment.fleet.max_tokens
        async with self._quotas.reserve(context.client, context.headers, service_request.lengths, longest):
            answer = await unless_disconnected(request, run(service_request))
            await self._quotas.charge(context.client, context.headers, answer.num_tokens)
        return answer

    async def _respond(
        self, request: Request, service_request: ServiceRequest, answer: Answer, parts: Parts, num_bytes: int
    ) -> Response:
        """Write an answer, and note it for the log, the metrics and the headers.

        Args:
            num_bytes: the memory that the answer holds.
        """
        context = RequestContext.of(request)
        content = None
        timings = answer.timings
        if num_bytes <= _SMALL_ANSWER_BYTES:
            started = time.monotonic()
            content = b"".join(parts())
            written_s = time.monotonic() - started
            timings = replace(timings, serialize_s=written_s)
        headers = answer_headers(answer, timings, context.elapsed_s)
        if context.error_form is ErrorForm.TEI:
            headers |= tei_headers(sum(service_request.lengths), answer.num_tokens, timings, context.elapsed_s)
        if content is not None:
            note_answer(context, answer, written_s)
            context.memory.shrink(len(content))
            return Response(content, media_type="application/json", headers=headers)

        def note(serialize_s: float) -> None:
            note_answer(context, answer, serialize_s)

        has_length = isinstance(service_request, EmbedRequest) and service_request.encoding not in (
            None,
            Precision.FLOAT,
        )
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
        """Answer piece by piece: each is written when the client has taken the one before.

        Args:
            num_bytes: how much memory ``parts`` holds.
            note: called at the end, successful or not, with the seconds that writing took.
            has_length: send the length first, which requires writing everything twice.
        """
        RequestContext.of(request).memory.shrink(num_bytes + 3 * PIECE_BYTES)
        answer = Streamed(request, self._turns, parts, headers, note)
        if has_length or request.scope["http_version"] == "1.0":  # HTTP/1.0 has no chunks
            answer.headers["content-length"] = str(sum([len(piece) async for piece in answer.pieces()]))
        return answer


def add(
    router: APIRouter,
    path: str,
    handler: Callable[..., Awaitable[object]],
    answers: Responses,
    *,
    method: str = "GET",
    request: dict[str, Any] | None = None,
    status: int = 200,
) -> None:
    """Serve a path under ``/v1``, and without it, where the documentation does not show it.

    Args:
        request: describes parameters and body, where the handler's signature does not.
    """
    # The framework builds a validator for each described answer, shown or not: most of the time that an application takes.
    router.add_api_route(
        "/v1" + path, handler, methods=[method], responses=answers, openapi_extra=request, status_code=status
    )
    router.add_api_route(path, handler, methods=[method], include_in_schema=False, status_code=status)


async def _receive_all(request: Request) -> bytearray:
    """Receive a body without the framework, which would keep the body for as long as the request."""
    body = bytearray()
    has_more = True
    while has_more:
        message = await request.receive()
        body += message.get("body", b"")
        has_more = message.get("more_body", False)
    return body


def _expected_space(request: Request) -> str | None:
    """Return the space that the header expects; ``None`` without one.

    Raises:
        BadInput: the header is repeated with another value, so no vectors could meet it.
    """
    sent = list(dict.fromkeys(value for text in request.headers.getlist(EXPECT_SPACE) if (value := text.strip())))
    if len(sent) > 1:
        raise BadInput(
            f"`{EXPECT_SPACE}` is sent {len(sent)} times with different spaces: send the one of your stored vectors",
            param=EXPECT_SPACE,
        )
    return sent[0] if sent else None


def headers_of_texts(request: Request) -> dict[str, str]:
    """Return the headers that say what may become of a request's texts, for requests that are made of it later.

    Raises:
        BadInput: as for a request that is answered now.
    """
    space = _expected_space(request)
    expected = {} if space is None else {EXPECT_SPACE: space}
    return expected if may_be_captured(request) else {**expected, CAPTURE: "off"}


def reserve_texts(request: Request, texts: Sequence[str]) -> Callable[[int], None]:
    """Reserve the memory of the texts, and return the function that reserves more for the work on them.

    Raises:
        MemoryFull: there is no room for the texts, which can be larger in memory than they were in the body.
    """
    memory = RequestContext.of(request).memory
    num_bytes = sum(map(sys.getsizeof, texts))
    memory.resize(num_bytes)
    return lambda more: memory.resize(num_bytes + more)


def may_be_captured(request: Request) -> bool:
    """Return whether the client lets the gateway keep its texts: any value of a header but ``on`` forbids it."""
    return all(sent.strip().lower() == "on" for sent in request.headers.getlist(CAPTURE))


def unit_source(request: Request, user: Json) -> UnitSource:
    """Return the lookup of a request's values that an experiment can make a unit from.

    Args:
        user: the body's field ``user``.

    The lookup raises `BadInput` if a header occurs several times with different values: none of them is more right.
    """

    def look_up(source: str) -> str | bytes | None:
        match source.partition(":"):
            case ("header", _, name):
                values = set(request.headers.getlist(name))
                if len(values) > 1:
                    raise BadInput(f"the header {name} occurs {len(values)} times with different values; send it once")
                return values.pop().encode("latin-1") if values else None  # its bytes, as the framework decoded them
            case ("model", _, _):
                return None  # the router finds it in the name
            case ("body", _, "user"):
                given = integral(user)
                return str(given) if isinstance(given, str | int) and not isinstance(given, bool) else None
            case _:
                return RequestContext.of(request).key_owner

    return look_up


def timeout_s(request: Request, limit_s: float) -> float:
    """Return the seconds that the client waits for its answer: OpenAI's clients send their timeout."""
    limit_s = RequestContext.of(request).time_limit_s or limit_s
    try:
        patience_s = float(request.headers["x-stainless-read-timeout"])
    except (KeyError, ValueError):
        return limit_s
    return min(limit_s, patience_s) if patience_s > 0 else limit_s


def note_answer(context: RequestContext, answer: Answer, serialize_s: float) -> None:
    """Add the answer to the log line, and the time of writing it to the metrics."""
    timings = replace(answer.timings, serialize_s=serialize_s)
    context.describe(answer.model, answer.task, answer.num_texts, answer.num_tokens, timings)
    if answer.assignment is not None:
        context.experiment, context.arm = answer.assignment.experiment, answer.assignment.arm.label
    metrics.target_metrics(answer.model, answer.task, context.experiment, context.arm).serialize_s.observe(serialize_s)
