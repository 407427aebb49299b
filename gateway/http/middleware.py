"""Around every request: its id, its caller, its size, its time, and the one exit for errors. Plain ASGI."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import orjson
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access.keyring import Client, Keyring
from gateway.access.memory import MemoryBudget, Reservation
from gateway.config.settings import PREFIX, Settings
from gateway.errors import (
    BodyTooSlow,
    ClientDisconnected,
    HeadersTooLarge,
    InternalError,
    MethodNotAllowed,
    RequestError,
    ShuttingDown,
    Unauthorized,
)
from gateway.http.body import Body
from gateway.http.error_forms import ErrorForm, error_form, is_tei_probe, render_error
from gateway.http.pace import Pace
from gateway.http.protocol import MAX_HEADERS, REFUSED
from gateway.telemetry import metrics, tracing
from gateway.types import Timings

log = structlog.get_logger("gateway.access")

_CONTEXT = "gateway.context"
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
# What a message quotes of a request may be a text, which no log line has.
_QUOTED = re.compile(r"(the string|an object with|refuses the request:) .*", re.DOTALL)
_MAX_REASON, _MAX_NAME = 300, 100
_SLASHES = re.compile(r"//+")
# Answered without a key: probes carry none, and the documentation tells nothing that is not public.
_OPEN_PATHS = ("/health", "/docs", "/openapi.json", "/static-offline-docs")

# For the operator alone: `api/admin` asks for a key of their own.
_OPERATOR_PATHS = ("/admin", "/metrics")

_MAX_PREFIX = 200
# What is left for the answer of a request that is ended as the process stops.
_LAST_ANSWER_S = 1.0

# What clients send that were given an empty key.
_NO_KEY = ("", '""')

# Asked every few seconds by probes and scrapers: no line at the usual level of the log, and no span.
_QUIET_PATHS = ("/health", "/health/live", "/health/ready", "/metrics")


@dataclass(slots=True)
class RequestContext:
    """What is known about a request beside its content: for the log line, the metrics and the answer's headers.

    Attributes:
        client: whom the request is from.
        path: without doubled slashes, and without the prefix that a proxy serves the gateway under.
        headers: further headers of the answer, whatever it will be.
        reason: why the request was refused, without what it quotes of the client's texts; `param` is the field at fault.
        asked: the model as the client named it, for the log of a request that no model answered.
        api_key: hex sha256 of the key that the request carries, also where none is asked for.
        key_owner: whose key that is: the client's name where keys are known, else the key's hash.
        trace_ids: what joins a log line to the request's trace, if that is recorded.
        error_form: what an error looks like: as the path says, unless the body tells that another API's client asks.
        memory: what the request holds of the budget; released when it ends, however that is.
    """

    request_id: str
    client: Client
    memory: Reservation
    method: str = "GET"
    path: str = "/"
    headers: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    error_code: str | None = None
    reason: str | None = None
    param: str | None = None
    asked: str | None = None
    model: str | None = None
    task: str | None = None
    num_texts: int | None = None
    num_tokens: int | None = None
    timings: Timings | None = None
    api_key: str | None = None
    key_owner: str | None = None
    experiment: str | None = None
    arm: str | None = None
    trace_ids: Mapping[str, str] = field(default_factory=dict)
    error_form: ErrorForm = ErrorForm.OPENAI

    @classmethod
    def of(cls, request: Request) -> RequestContext:
        context: RequestContext = request.scope[_CONTEXT]
        return context

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def caller(self) -> str:
        """Whom the work is for, in logs and where several share a queue."""
        return self.client.name

    def refuse(self, error: RequestError) -> None:
        """Add why the request is refused."""
        self.error_code, self.param = error.code, error.param
        self.reason = _QUOTED.sub(r"\1 …", error.message)[:_MAX_REASON]

    def describe(self, model: str, task: str | None, num_texts: int, num_tokens: int, timings: Timings) -> None:
        """Add what was embedded."""
        self.model, self.task, self.num_texts, self.num_tokens = model, task, num_texts, num_tokens
        self.timings = timings


def _sent_key(headers: Headers) -> str | None:
    """Return the hex sha256 of the key that a request carries, if it has one.

    The key is what follows `Bearer`, or all of `Authorization` where that is one word, or in `x-api-key` (Anthropic's,
    and many proxies') or `api-key` (Azure's), or the password or, without one, the user of `Basic`: the first that is there.
    """
    scheme, _, credentials = headers.get("authorization", "").strip().partition(" ")
    scheme_name = scheme.lower()
    is_bare = not credentials and scheme_name not in ("bearer", "basic")
    given = (
        credentials if scheme_name == "bearer" else scheme if is_bare else "",
        headers.get("x-api-key", ""),
        headers.get("api-key", ""),
        _basic_key(credentials) if scheme_name == "basic" else "",
    )
    key = next((key for one in given if (key := one.strip()) not in _NO_KEY), None)
    # As the bytes that were sent, which the framework has read as Latin-1.
    return None if key is None else hashlib.sha256(key.encode("latin-1")).hexdigest()


def _basic_key(credentials: str) -> str:
    try:
        user, _, password = base64.b64decode(credentials.strip(), validate=True).decode("latin-1").partition(":")
    except (binascii.Error, ValueError):
        return ""
    return password or user


class GatewayMiddleware:
    """Wraps the application: everything that is the same for all paths."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        keyring: Keyring,
        is_draining: Callable[[], bool],
        memory: MemoryBudget,
    ) -> None:
        self._app = app
        self._memory = memory
        self._pace = Pace()
        self._settings = settings
        self._keyring = keyring
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client = Client(scope["client"][0] if scope.get("client") else "unknown")
        context = RequestContext(_request_id(headers), client, self._memory.open(client.name), scope["method"])
        if context.method == "HEAD":  # answered as GET; in a copy, as the server must know to leave the body out
            scope = {**scope, "method": "GET"}
        scope[_CONTEXT] = context
        context.path = _place(scope, headers, self._settings.root_path)
        context.error_form = error_form(context.path, context.method)
        untraced = (scope["path"],) if context.path in _QUIET_PATHS else ()
        body = Body(
            receive,
            headers,
            context.memory,
            self._pace,
            self._settings.max_body_bytes,
            self._settings.body_timeout_s,
        )
        with (
            metrics.IN_FLIGHT.track_inprogress(),
            tracing.request_span(scope, headers, context.request_id, untraced=untraced) as span,
        ):
            if span is not None:
                context.trace_ids = span.log_ids

            async def send_with_id(message: Message) -> None:
                if message["type"] == "http.response.start":
                    context.status = message["status"]
                    if span is not None:
                        span.describe(scope, context.status, context.error_code)
                    self._complete(message, context)
                await send(message)

            try:
                await self._answer_or_fail(scope, headers, context, body, send_with_id)
            finally:
                context.memory.release()
                _record(scope, context)

    def _complete(self, message: Message, context: RequestContext) -> None:
        """Add the headers that every answer has."""
        sent = MutableHeaders(scope=message)
        sent["x-request-id"] = context.request_id
        sent.update(context.headers)
        if self._is_draining():
            sent["connection"] = "close"  # so that the client's next request goes to another replica

    async def _answer_or_fail(
        self, scope: Scope, headers: Headers, context: RequestContext, body: Body, send: Send
    ) -> None:
        """Have a request answered; whatever goes wrong, its client gets an answer, and the context says what it was."""
        try:
            await self._answer(scope, headers, context, body, send)
        except RequestError as error:
            await _refuse(error, context, send, body.drain)
        except asyncio.CancelledError:
            if not self._is_draining():
                raise
            # The request has had its time. It ends here: the server would log a traceback of where it was.
            stopping = ShuttingDown("the gateway is stopping, and this request took too long", retry_after_s=5)
            context.refuse(stopping)
            if not context.status:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_ANSWER_S):
                        await send_error(stopping, context.error_form, send, _at_once)
        except Exception:  # the last resort
            log.exception("unexpected_error", request_id=context.request_id, **context.trace_ids)
            context.error_code = InternalError.code
            if context.status:
                raise  # the answer has begun: all that is left is to cut the connection
            message = f"internal error; the log has more under request id {context.request_id}"
            await send_error(InternalError(message), context.error_form, send, body.drain)

    async def _answer(self, scope: Scope, headers: Headers, context: RequestContext, body: Body, send: Send) -> None:
        if (refused := scope.get(REFUSED)) is not None:
            raise refused
        self._check_headers(headers)
        if not context.path.startswith(_OPEN_PATHS) and not is_tei_probe(context.path):
            context.api_key = _sent_key(headers)
            if not context.path.startswith(_OPERATOR_PATHS):
                context.client = await self._keyring.identify(context.api_key, context.client.name)
                # A client stays the same unit of an experiment when its key is exchanged.
                context.key_owner = context.client.name if self._keyring else context.api_key
        context.memory.caller = context.caller
        body.admit()
        await self._app(scope, body.receive, send)

    def _check_headers(self, headers: Headers) -> None:
        if len(headers.raw) > MAX_HEADERS:
            raise HeadersTooLarge(f"the request has {len(headers.raw)} headers, the limit is {MAX_HEADERS}")
        num_bytes = sum(len(name) + len(value) for name, value in headers.raw)
        if num_bytes > self._settings.max_header_bytes:
            raise HeadersTooLarge(
                f"the request's headers have {num_bytes} bytes, the limit is {self._settings.max_header_bytes}"
            )


def _request_id(headers: Headers) -> str:
    """Return the client's request id if it is fit for a log line and a header, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _place(scope: Scope, headers: Headers, root_path: str) -> str:
    """Tell the framework under which prefix a proxy serves the gateway, and return the path without it.

    A proxy may have taken the prefix off the path, or not: both are routed alike.
    """
    path = _normalize_path(scope["path"])
    prefix = root_path or scope.get("root_path", "").rstrip("/") or _forwarded_prefix(headers)
    if prefix and (path == prefix or path.startswith(f"{prefix}/")):
        path = path[len(prefix) :] or "/"
    scope["root_path"], scope["path"] = prefix, prefix + path
    return path


def _forwarded_prefix(headers: Headers) -> str:
    given = headers.get("x-forwarded-prefix", "").rstrip("/")
    return given if len(given) <= _MAX_PREFIX and PREFIX.fullmatch(given) else ""


def _normalize_path(path: str) -> str:
    """Drop doubled and trailing slashes: clients put a base URL and a path together in every way."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"


async def _refuse(
    error: RequestError, context: RequestContext, send: Send, drain: Callable[[], Awaitable[None]]
) -> None:
    """Answer with an error, unless an answer has begun: all that is left then is to cut the connection."""
    context.refuse(error)
    # The frames of its traceback hold the body, and the rest of that may take a while to come.
    error.__traceback__ = error.__context__ = None
    context.memory.release()
    if not context.status:
        await send_error(error, context.error_form, send, drain)
    elif not isinstance(error, ClientDisconnected):
        raise error


async def _at_once() -> None:
    """Wait for nothing more of a request."""


async def send_error(error: RequestError, form: ErrorForm, send: Send, drain: Callable[[], Awaitable[None]]) -> None:
    """Render an error: in the form that its client looks for, with the headers that steer retries.

    Args:
        drain: awaited after the answer has been sent and before it is ended, which may close the connection.
    """
    status, content = render_error(error, form)
    body = orjson.dumps(content)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.is_permanent:
        headers.append((b"x-should-retry", b"false"))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allow.encode()))
    if isinstance(error, BodyTooSlow):
        headers.append((b"connection", b"close"))  # what is still coming is not waited for
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await drain()
    await send({"type": "http.response.body", "body": b""})


def _record(scope: Scope, context: RequestContext) -> None:
    if not context.status:  # nothing was sent, as there is nobody to send it to
        context.status = ClientDisconnected.status
        context.error_code = context.error_code or ClientDisconnected.code
    route = scope.get("route")
    path = getattr(route, "path", "other")  # never the path itself: clients make those up
    metrics.REQUESTS.labels(path, context.status).inc()
    metrics.REQUEST_SECONDS.labels(path).observe(context.elapsed_s)
    if context.error_code is not None:
        metrics.ERRORS.labels(context.error_code).inc()
    write = log.debug if path in _QUIET_PATHS else log.info
    model = context.model or context.asked or scope.get("path_params", {}).get("model")
    timings = context.timings
    stages = {} if timings is None else {f"{name}_ms": round(s * 1000, 2) for name, s in timings.stages.items()}
    write(
        "request",
        request_id=context.request_id,
        caller=context.caller,
        method=context.method,
        path=path,
        status=context.status,
        ms=round(context.elapsed_s * 1000, 2),
        **context.trace_ids,
        **({} if model is None else {"model": model[:_MAX_NAME]}),
        **stages,
        **{
            name: value
            for name in ("task", "experiment", "arm", "num_texts", "num_tokens", "error_code", "param", "reason")
            if (value := getattr(context, name)) is not None
        },
    )
