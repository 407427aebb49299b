"""The requests of a batch: read as lines, and answered by the same handlers as requests that come over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

import orjson
import structlog
from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.types import Message, Scope

from gateway.access.keyring import Client, Keyring
from gateway.access.memory import MemoryBudget
from gateway.api.endpoint import Endpoint
from gateway.api.json_body import NO_MODEL, Json, describe, parse_object
from gateway.api.openai import OpenAIDialect
from gateway.api.openai_schema import EmbeddingsBody
from gateway.api.rerank import PATHS, Reranker
from gateway.batches.lines import Answered, Line, WrongLine
from gateway.batches.values import Batch, LineError
from gateway.config.wording import cut
from gateway.errors import DeadlineExceeded, InternalError, ModelNotReady, Overloaded, RequestError
from gateway.http.body import Body
from gateway.http.context import RequestContext
from gateway.http.error_forms import ErrorForm, render_error
from gateway.http.pace import Pace
from gateway.types import ModelKind, Output, Priority

log = structlog.get_logger(__name__)

_KINDS = {"/v1/embeddings": ModelKind.EMBED, "/v1/rerank": ModelKind.RERANK}
ENDPOINTS = tuple(_KINDS)
"""The paths of requests that a batch may contain."""

_MAX_ID_CHARACTERS = 512
# The length of a line besides its body: its id, its path, and blanks.
_AROUND_BYTES = 64 * 1024
# An estimate of the vectors of a text with one vector per token: the tokens of a typical long text.
_WEIGHT_OF_TOKENS = 1024
# The fields of embeddings requests that may change the space: all except those that cannot.
_OPTIONS = sorted(
    EmbeddingsBody.model_fields.keys()
    - {"input", "model", "user", "truncate", "truncation", "truncation_direction", "late_chunking"}
)
_MAX_OPTIONS_BYTES = 200
_HEADERS: Mapping[str, str] = {"content-type": "application/json", "x-gateway-priority": "low"}


class LineRequests:
    """Reads and answers requests; implements :class:`gateway.batches.lines.Requests`."""

    def __init__(self, endpoint: Endpoint, keyring: Keyring, memory: MemoryBudget) -> None:
        self._endpoint = endpoint
        self._keyring = keyring
        self._memory = memory
        self._pace = Pace()
        rerank_path = next(path for path in PATHS if path.path == "/v1/rerank")
        self._handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/embeddings": OpenAIDialect(endpoint).embeddings,
            "/v1/rerank": Reranker(endpoint, rerank_path).rerank,
        }

    @property
    def max_line_bytes(self) -> int:
        return self._endpoint.settings.max_body_bytes + _AROUND_BYTES

    @property
    def is_paused(self) -> bool:
        return self._endpoint.deployment.is_draining

    def read(self, endpoint: str, line: bytes) -> Line:
        try:
            content = parse_object(line)
        except RequestError as error:
            reason = error.message.replace("the request body", "it", 1)
            raise WrongLine("invalid_json_line", f"This line is not parseable as valid JSON: {reason}") from None
        custom_id = content.get("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_CHARACTERS:
            what = f"a string of 1 to {_MAX_ID_CHARACTERS} characters"
            raise WrongLine("invalid_custom_id", f"`custom_id` must be {what}, got {describe(custom_id)}.", "custom_id")
        try:
            return self._request_of(endpoint, custom_id, content)
        except WrongLine as error:
            error.custom_id = custom_id
            raise

    def _request_of(self, endpoint: str, custom_id: str, content: Mapping[str, Json]) -> Line:
        method = content.get("method")
        if not isinstance(method, str) or method.upper() != "POST":
            raise WrongLine("invalid_method", f"`method` must be POST, got {_shown(method)}.", "method")
        if content.get("url") != endpoint:
            raise WrongLine(
                "invalid_url",
                f"`url` must be the endpoint of the batch, {endpoint}, got {_shown(content.get('url'))}.",
                "url",
            )
        body = content.get("body")
        if not isinstance(body, dict):
            raise WrongLine("invalid_request", f"`body` must be an object, got {describe(body)}.", "body")
        model = body.get("model")
        try:
            written = orjson.dumps(body)
        except orjson.JSONEncodeError as error:  # orjson can read deeper nesting than it can write
            raise WrongLine("invalid_request", f"`body` cannot be passed on: {error}.", "body") from None
        limit = self._endpoint.settings.max_body_bytes
        if len(written) > limit:
            raise WrongLine("line_too_long", f"`body` has {len(written)} bytes; the limit is {limit}.", "body")
        name = model if isinstance(model, str) and model not in NO_MODEL else None
        return Line(custom_id, name, written, _weight(body), _options_of(body))

    def refusal(self, batch: Batch) -> LineError | None:
        client = self._client(batch)
        if client is None:
            message = "This batch was made without a key, and now keys are required."
            if batch.owner:
                message = f"{batch.owner}, the key that made this batch, is no longer valid here."
            return LineError("invalid_api_key", message)
        if batch.model is None:
            return None
        try:
            self._endpoint.deployment.router.choose_for(_KINDS[batch.endpoint], batch.model, client)
        except RequestError as error:
            return LineError(error.code, error.message, param="body.model")
        return None

    def _client(self, batch: Batch) -> Client | None:
        if not batch.owner and self._keyring:  # a key may have any name, but it did not make this batch
            return None
        return self._keyring.named(batch.owner or "batches")

    async def answer(self, batch: Batch, line: Line) -> Answered:
        request_id = f"req-{secrets.token_hex(12)}"
        client = self._client(batch)
        if client is None:  # between two checks of the key
            error = InternalError(f"the key of {batch.owner} is no longer valid")
            return _failed(error, request_id, ErrorForm.OPENAI)
        context, request = self._request(batch, line, client, request_id)
        try:
            response = await self._handlers[batch.endpoint](request)
            sent = _Sent()
            await response(request.scope, request.receive, sent.send)
        except RequestError as error:
            return _failed(error, request_id, context.error_form)
        except Exception:  # as over HTTP, a fault in the gateway fails only the request that causes it, not the batch
            log.exception("unexpected_error", request_id=request_id, batch=batch.id)
            problem = InternalError(f"internal error; the log has more under request id {request_id}")
            return _failed(problem, request_id, context.error_form)
        finally:
            context.memory.release()
        return Answered(
            sent.status, request_id, bytes(sent.body), context.num_tokens or 0, space=_space_of(sent.headers)
        )

    def _request(self, batch: Batch, line: Line, client: Client, request_id: str) -> tuple[RequestContext, Request]:
        """Build a request in the form that the layers around the handlers give to HTTP requests."""
        known = {"x-gateway-expect-space": space} if (space := batch.spaces.get(line.options)) is not None else {}
        headers = Headers({**_HEADERS, **batch.headers, **known, "content-length": str(len(line.body))})
        memory = self._memory.open(client.name)
        messages: list[Message] = [{"type": "http.request", "body": line.body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.get_running_loop().create_future()  # it never disconnects
            raise AssertionError("unreachable")

        limits = self._endpoint.settings
        body = Body(receive, headers, memory, self._pace, limits.max_body_bytes, limits.body_timeout_s)
        context = RequestContext(
            request_id,
            client,
            memory,
            body,
            headers,
            "POST",
            batch.endpoint,
            key_owner=client.name,
            priority=Priority.LOW,
            time_limit_s=max(1.0, batch.expires_at - time.time()),
        )
        scope: Scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": batch.endpoint,
            "raw_path": batch.endpoint.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers.raw,
            "path_params": {},
        }
        context.enter(scope)
        return context, Request(scope, body.receive)


class _Sent:
    """Keeps a response."""

    def __init__(self) -> None:
        self.status = 0
        self.headers = Headers()
        self.body = bytearray()

    async def send(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.headers = Headers(raw=message["headers"]) if "headers" in message else self.headers
        self.body += message.get("body", b"")


def _space_of(headers: Headers) -> str | None:
    """Return the space of an answer's vectors; those of an experiment's arms may be in several."""
    return None if "x-gateway-experiment" in headers else headers.get("x-gateway-space")


def _options_of(body: Mapping[str, Json]) -> str:
    """Return the fields of a body on which the space of its vectors depends, as JSON."""
    options = {name: body[name] for name in _OPTIONS if body.get(name) is not None}
    if not options:
        return ""
    written = orjson.dumps(options, option=orjson.OPT_SORT_KEYS)
    # Values that no request may have can be long.
    return written.decode() if len(written) <= _MAX_OPTIONS_BYTES else hashlib.sha256(written).hexdigest()


def _weight(body: dict[str, Json]) -> int:
    """Return the maximum number of vectors in the answer to a request; a text may have one per token."""
    texts = body.get("input") or body.get("documents")
    num_texts = len(texts) if isinstance(texts, list) else 1
    outputs = body.get("outputs")
    names = outputs if isinstance(outputs, list) else [outputs]
    has_tokens = any(isinstance(name, str) and name.strip().lower() == Output.MULTIVECTOR for name in names)
    return num_texts * (_WEIGHT_OF_TOKENS if has_tokens else 1)


def _failed(error: RequestError, request_id: str, form: ErrorForm) -> Answered:
    status, content = render_error(error, form)
    is_passing = isinstance(error, Overloaded | ModelNotReady | DeadlineExceeded | InternalError)
    return Answered(
        status,
        request_id,
        orjson.dumps(content),
        is_passing=is_passing and (isinstance(error, ModelNotReady) or not error.is_permanent),
        retry_after_s=error.retry_after_s,
    )


def _shown(value: Json) -> str:
    return cut(repr(value), 100) if isinstance(value, str) else describe(value)
