"""The layers around every request, the outermost first: identification, record, error exit, admission. Plain ASGI.

Events that are not requests, such as a server's lifespan, pass through.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from contextlib import suppress

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access.keyring import Client, Keyring
from gateway.access.memory import MemoryBudget
from gateway.batches.values import MAX_UPLOAD_BYTES
from gateway.config.setting_values import PREFIX
from gateway.config.settings import Settings
from gateway.errors import (
    ClientDisconnected,
    HeadersTooLarge,
    InternalError,
    RequestError,
    ShuttingDown,
)
from gateway.http.body import Body
from gateway.http.context import RequestContext
from gateway.http.error_forms import error_form, is_tei_probe, send_error
from gateway.http.head import address_of, sent_key, sent_priority
from gateway.http.pace import Pace
from gateway.http.protocol import MAX_HEADERS, REFUSED
from gateway.recent import ErrorFacts, RecentErrors
from gateway.telemetry import metrics, tracing
from gateway.types import Priority

log = structlog.get_logger("gateway.access")

# A request's id is not a secret, and a system call for each gives up the interpreter lock.
_ids = random.Random()  # noqa: S311
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_MAX_NAME = 100
_SLASHES = re.compile(r"//+")
# Answered without a key: probes have no key, the documentation is public, and the console asks for a key itself.
_OPEN_PATHS = ("/health", "/docs", "/openapi.json", "/static-offline-docs", "/console")

# Uploads of files, which are larger than other bodies and are written to the disk as they arrive.
_UPLOADS = (("POST", "/v1/files"), ("POST", "/files"))

# Forms with the files of a data set, which are in memory as a whole.
_DATA_SETS = (("POST", "/admin/data-sets"), ("POST", "/console/data-sets"))
_TOO_LARGE_DATA_SET = "copy a larger data set into GATEWAY_RUNS_DIR/data, or raise GATEWAY_MAX_BODY_BYTES"

# For the operator only; `api/admin` asks for the operator's key.
_OPERATOR_PATHS = ("/admin", "/metrics")

_MAX_PREFIX = 200
# Seconds for sending the answer to a request that is ended because the process stops.
_LAST_ANSWER_S = 1.0

# Probes and scrapers request these every few seconds, so they get no log line at the usual level, and no span.
_QUIET_PATHS = ("/health", "/health/live", "/health/ready", "/metrics", "/metrics/replicas")


class Identification:
    """Gives each request an id, a path and a context, and each answer the headers common to all answers.

    This is the outermost layer: the other layers read the :class:`RequestContext` that it creates.
    """

    def __init__(self, app: ASGIApp, settings: Settings, memory: MemoryBudget, is_draining: Callable[[], bool]) -> None:
        self._app = app
        self._settings = settings
        self._memory = memory
        self._is_draining = is_draining
        self._pace = Pace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client = Client(address_of(scope.get("client")))
        memory = self._memory.open(client.name)
        limits = self._settings
        body = Body(receive, headers, memory, self._pace, limits.max_body_bytes, limits.body_timeout_s)
        context = RequestContext(_request_id(headers), client, memory, body, headers, scope["method"])
        if context.method == "HEAD":  # answered like GET; a copy, because the server must see HEAD to omit the body
            scope = {**scope, "method": "GET"}
        context.enter(scope)
        context.path = _place(scope, headers, self._settings.root_path)
        context.error_form = error_form(context.path, context.method)

        async def send_completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = context.request_id
                sent.update(context.headers)
                if self._is_draining():
                    sent["connection"] = "close"  # so that the client's next request goes to another replica
            await send(message)

        await self._app(scope, body.receive, send_completed)


class Record:
    """Records each request in metrics, span and log when it ends, for any reason, and releases its memory."""

    def __init__(self, app: ASGIApp, errors: RecentErrors) -> None:
        self._app = app
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext.in_scope(scope)
        untraced = (scope["path"],) if context.path in _QUIET_PATHS else ()
        with (
            metrics.IN_FLIGHT.track_inprogress(),
            tracing.request_span(scope, context.sent, context.request_id, untraced=untraced) as span,
        ):
            if span is not None:
                context.trace_ids = span.log_ids

            async def send_noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    context.status = message["status"]
                    if span is not None:
                        span.describe(scope, context.status, context.error_code)
                await send(message)

            try:
                await self._app(scope, receive, send_noted)
            finally:
                context.memory.release()
                _record(scope, context, self._errors)


class ErrorExit:
    """Answers every request that fails, for any cause, and notes the error in the context."""

    def __init__(self, app: ASGIApp, is_draining: Callable[[], bool]) -> None:
        self._app = app
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext.in_scope(scope)
        try:
            await self._app(scope, receive, send)
        except RequestError as error:
            await _refuse(error, context, send)
        except asyncio.CancelledError:
            if not self._is_draining():
                raise
            # The request's time is over. Catch the cancellation here, or the server would log a traceback.
            stopping = ShuttingDown("the gateway is stopping, and this request took too long", retry_after_s=5)
            context.refuse(stopping)
            if not context.status:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_ANSWER_S):
                        await send_error(stopping, context.error_form, send, _no_wait)
        except Exception:  # the last resort
            log.exception("unexpected_error", request_id=context.request_id, **context.trace_ids)
            context.error_code = InternalError.code
            if context.status:
                raise  # the answer has begun, so only cutting the connection is left
            message = f"internal error; the log has more under request id {context.request_id}"
            await send_error(InternalError(message), context.error_form, send, context.body.drain)


class Admission:
    """Identifies the client of each request, and refuses requests beyond the limits before their bodies are read."""

    def __init__(self, app: ASGIApp, settings: Settings, keyring: Keyring) -> None:
        self._app = app
        self._settings = settings
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (refused := scope.get(REFUSED)) is not None:
            raise refused
        context = RequestContext.in_scope(scope)
        self._check_headers(context.sent)
        context.priority = sent_priority(context.sent)
        if not _is_open(context):
            context.api_key = sent_key(context.sent)
            if not context.path.startswith(_OPERATOR_PATHS):
                context.client = await self._keyring.identify(context.api_key, context.client.name)
                # A client remains the same unit of an experiment when its key is replaced.
                context.key_owner = context.client.name if self._keyring else context.api_key
        context.memory.caller = context.caller
        if self._settings.batch_dir is not None and (context.method, context.path) in _UPLOADS:
            context.body.stream(MAX_UPLOAD_BYTES)
        elif (context.method, context.path) in _DATA_SETS:
            context.body.refuse_late(_TOO_LARGE_DATA_SET)
        context.body.admit()
        await self._app(scope, receive, send)

    def _check_headers(self, headers: Headers) -> None:
        if len(headers.raw) > MAX_HEADERS:
            raise HeadersTooLarge(f"the request has {len(headers.raw)} headers; the limit is {MAX_HEADERS}")
        num_bytes = sum(len(name) + len(value) for name, value in headers.raw)
        if num_bytes > self._settings.max_header_bytes:
            raise HeadersTooLarge(
                f"the request's headers have {num_bytes} bytes; the limit is {self._settings.max_header_bytes}"
            )


def _is_open(context: RequestContext) -> bool:
    """Return whether a request needs no key."""
    is_reader = (
        context.path == "/" and context.method in ("GET", "HEAD") and "text/html" in context.sent.get("accept", "")
    )
    return is_reader or context.path.startswith(_OPEN_PATHS) or is_tei_probe(context.method, context.path)


def _request_id(headers: Headers) -> str:
    """Return the client's request id if it is fit for a log line and a header, else a new one."""
    sent = headers.get("x-request-id", "")
    return sent if _REQUEST_ID.fullmatch(sent) else f"req-{_ids.getrandbits(96):024x}"


def _place(scope: Scope, headers: Headers, root_path: str) -> str:
    """Tell the framework the prefix under which a proxy serves the gateway, and return the path without it.

    The proxy may or may not have removed the prefix from the path; both cases are routed alike.
    """
    path = _normalize_path(scope["path"])
    prefix = root_path or scope.get("root_path", "").rstrip("/") or _forwarded_prefix(headers)
    if prefix and (path == prefix or path.startswith(f"{prefix}/")):
        path = path[len(prefix) :] or "/"
    scope["root_path"], scope["path"] = prefix, prefix + path
    return path


def _forwarded_prefix(headers: Headers) -> str:
    prefix = headers.get("x-forwarded-prefix", "").rstrip("/")
    return prefix if len(prefix) <= _MAX_PREFIX and PREFIX.fullmatch(prefix) else ""


def _normalize_path(path: str) -> str:
    """Drop doubled and trailing slashes, because clients join base URLs and paths in many ways."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"


async def _refuse(error: RequestError, context: RequestContext, send: Send) -> None:
    """Answer with an error; if an answer has already begun, raise the error to cut the connection."""
    context.refuse(error)
    # The frames of the traceback hold the body in memory, and the rest of the body may take a while to arrive.
    error.__traceback__ = error.__context__ = None
    context.memory.release()
    if not context.status:
        await send_error(error, context.error_form, send, context.body.drain)
    elif not isinstance(error, ClientDisconnected):
        raise error


async def _no_wait() -> None:
    """Do not wait for the rest of a request."""


def _record(scope: Scope, context: RequestContext, errors: RecentErrors) -> None:
    if not context.status:  # nothing was sent: the client is gone
        context.status, context.error_code = ClientDisconnected.status, ClientDisconnected.code
    route = scope.get("route")
    path = getattr(route, "path", "other")  # never the path itself, which a client can make up
    metrics.REQUESTS.labels(path, context.status).inc()
    metrics.REQUEST_SECONDS.labels(path).observe(context.elapsed_s)
    model = context.model or context.asked
    name = None if model is None else model[:_MAX_NAME]
    if context.error_code is not None:
        metrics.ERRORS.labels(context.error_code).inc()
        facts = ErrorFacts(context.status, context.error_code, path, name, context.caller, context.param)
        errors.add(facts, context.reason, context.request_id)
    write = log.debug if path in _QUIET_PATHS else log.info
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
        **({} if name is None else {"model": name}),
        **({} if context.priority is Priority.NORMAL else {"priority": context.priority}),
        **stages,
        **{
            name: value
            for name in ("task", "experiment", "arm", "num_texts", "num_tokens", "error_code", "param", "reason")
            if (value := getattr(context, name)) is not None
        },
    )
