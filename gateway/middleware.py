"""Around every request: its id, its caller, its size, its time, and the one exit for errors. Plain ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import orjson
import structlog
from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.config.settings import Settings
from gateway.errors import (
    BodyTooLarge,
    ClientDisconnected,
    InternalError,
    MethodNotAllowed,
    RequestError,
    Unauthorized,
)
from gateway.telemetry import metrics

log = structlog.get_logger("gateway.access")

_CONTEXT = "gateway.context"
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_SLASHES = re.compile(r"//+")
# How much of a body is read that nobody wants: enough for an honest mistake.
_MAX_DRAINED_BYTES = 64 * 1024 * 1024
_MAX_DRAIN_S = 30.0
# Answered without a key: probes carry none, and the documentation tells nothing that is not public.
_OPEN_PATHS = ("/health", "/docs", "/openapi.json", "/static-offline-docs")

# For the operator alone: `api/admin` asks for a key of their own.
_OPERATOR_PATHS = ("/admin",)

# Asked every few seconds by probes and scrapers.
_QUIET_PATHS = ("/health", "/health/live", "/health/ready", "/metrics")


@dataclass(slots=True)
class RequestContext:
    """What is known about a request beside its content: for the log line, the metrics and the answer's headers.

    Attributes:
        caller: whom the request is from: a part of the key's hash, or the network address where none is asked for.
        api_key: hex sha256 of the key that the request carries, also where none is asked for.
    """

    request_id: str
    caller: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    error_code: str | None = None
    model: str | None = None
    task: str | None = None
    num_texts: int | None = None
    num_tokens: int | None = None
    api_key: str | None = None
    experiment: str | None = None
    arm: str | None = None

    @classmethod
    def of(cls, request: Request) -> RequestContext:
        context: RequestContext = request.scope[_CONTEXT]
        return context

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def describe(self, model: str, task: str | None, num_texts: int, num_tokens: int) -> None:
        """Add what was embedded."""
        self.model, self.task, self.num_texts, self.num_tokens = model, task, num_texts, num_tokens


class ApiKeys:
    """The keys that may be used; none means that no key is asked for."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [key_digest(key.get_secret_value()) for key in keys]

    def check(self, key: str | None) -> None:
        """Let a request pass if no keys are configured, or if it has one of them.

        Args:
            key: hex sha256 of the key that the request carries.

        Raises:
            Unauthorized: keys are configured, and the request has none of them.
        """
        if not self._digests:
            return
        if key is None:
            raise Unauthorized("an API key is required: send `Authorization: Bearer KEY`")
        # All are compared, each in constant time: the time taken tells nothing about a key.
        if sum(hmac.compare_digest(key, known) for known in self._digests) == 0:
            raise Unauthorized("the API key is not known here")

    def __bool__(self) -> bool:
        return bool(self._digests)


def _sent_key(headers: Headers) -> str | None:
    """Return the hex sha256 of the key that a request carries, if it has one."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = key.strip() if scheme.lower() == "bearer" else ""
    # What clients send that were given an empty key counts as none.
    # As the bytes that were sent, which the framework has read as Latin-1.
    return None if given in ("", '""') else _hex_sha256(given.encode("latin-1"))


def key_digest(key: str) -> str:
    """Return the hex sha256 of a key, in UTF-8: the form that keys are kept, compared and named in."""
    return _hex_sha256(key.encode())


def _hex_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class GatewayMiddleware:
    """Wraps the application: everything that is the same for all paths."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = ApiKeys(settings.api_keys)
        self._max_body_bytes = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        context = RequestContext(_request_id(headers), caller="")
        scope[_CONTEXT] = context
        scope["path"] = _normalise_path(scope["path"])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = context.request_id
            await send(message)

        body = _Body(receive, headers, self._max_body_bytes)
        with metrics.IN_FLIGHT.track_inprogress():
            try:
                await self._answer(scope, headers, context, body, send_with_id)
            except RequestError as error:
                context.error_code = error.code
                await send_error(error, send_with_id, body.drain)
            except Exception:  # the last resort: whatever went wrong, the client gets an answer
                log.exception("unexpected_error", request_id=context.request_id)
                context.error_code = InternalError.code
                if context.status:
                    raise  # the answer has begun: all that is left is to cut the connection
                message = f"internal error; the log has more under request id {context.request_id}"
                await send_error(InternalError(message), send_with_id, body.drain)
        _record(scope, context)

    async def _answer(self, scope: Scope, headers: Headers, context: RequestContext, body: _Body, send: Send) -> None:
        address = scope["client"][0] if scope.get("client") else "unknown"
        context.caller = address
        if not scope["path"].startswith(_OPEN_PATHS):
            context.api_key = _sent_key(headers)
            if not scope["path"].startswith(_OPERATOR_PATHS):
                self._keys.check(context.api_key)
            if self._keys and context.api_key is not None:
                context.caller = f"key-{context.api_key[:8]}"
        body.check_declared_size()
        await self._app(scope, body.receive, send)


class _Body:
    """A request's body on its way in: not larger than allowed, and read to its end also when nobody wants it."""

    def __init__(self, receive: Receive, headers: Headers, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._has_ended = False
        declared = headers.get("content-length", "0")
        self._declared_bytes = int(declared) if declared.isdecimal() else 0
        # uvicorn says "100 Continue" when a body is first asked for; until then such a client sends nothing.
        self._is_coming = "expect" not in headers

    def check_declared_size(self) -> None:
        self._check_size(self._declared_bytes)

    async def receive(self) -> Message:
        """Pass a message on to the application.

        Raises:
            BodyTooLarge: more bytes have come than are allowed.
            ClientDisconnected: the client has gone before its request was complete.
        """
        self._is_coming = True
        had_ended = self._has_ended
        message = await self._next()
        if message["type"] == "http.disconnect" and not had_ended:
            raise ClientDisconnected("the client closed the connection before its request was complete")
        self._check_size(self._num_bytes)
        return message

    async def drain(self) -> None:
        """Read what is still coming, within bounds, so that the client gets to read its answer.

        Many clients send everything before they read, and closing a connection with unread bytes resets it: they would
        see a broken pipe in place of the 413.
        """
        if not self._is_coming:
            return
        most = self._num_bytes + _MAX_DRAINED_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MAX_DRAIN_S):
                while not self._has_ended and self._num_bytes < most:
                    await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        self._has_ended = not message.get("more_body", False)
        return message

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise BodyTooLarge(
                f"the request body has {num_bytes} bytes or more, the limit is {self._max_bytes}: send fewer texts "
                "in a request"
            )


def _request_id(headers: Headers) -> str:
    """Return the client's request id if it is fit for a log line and a header, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _normalise_path(path: str) -> str:
    """Drop doubled and trailing slashes: clients put a base URL and a path together in every way."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"


async def send_error(error: RequestError, send: Send, drain: Callable[[], Awaitable[None]]) -> None:
    """Render an error: one message in the three forms that clients look for, and the headers that steer retries.

    Args:
        drain: awaited after the answer has been sent and before it is ended, which may close the connection.
    """
    body = orjson.dumps(
        {
            "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
            "detail": error.message,
            "message": error.message,
        }
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.is_permanent:
        headers.append((b"x-should-retry", b"false"))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allow.encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await drain()
    await send({"type": "http.response.body", "body": b""})


def _record(scope: Scope, context: RequestContext) -> None:
    route = scope.get("route")
    path = getattr(route, "path", "other")  # never the path itself: clients make those up
    metrics.REQUESTS.labels(path, context.status).inc()
    metrics.REQUEST_SECONDS.labels(path).observe(context.elapsed_s)
    if context.error_code is not None:
        metrics.ERRORS.labels(context.error_code).inc()
    write = log.debug if path in _QUIET_PATHS else log.info
    write(
        "request",
        request_id=context.request_id,
        caller=context.caller,
        method=scope["method"],
        path=path,
        status=context.status,
        ms=round(context.elapsed_s * 1000, 2),
        **{
            name: value
            for name in ("model", "task", "experiment", "arm", "num_texts", "num_tokens", "error_code")
            if (value := getattr(context, name)) is not None
        },
    )
