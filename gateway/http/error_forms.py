"""The answers to requests that failed, in the form of the API whose path was requested."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from enum import Enum
from http import HTTPStatus

import orjson
from starlette.types import Send

from gateway.errors import (
    BadInput,
    BodyTooSlow,
    EmptyInput,
    InferenceFailed,
    InternalError,
    InvalidVectors,
    MemoryFull,
    MethodNotAllowed,
    ModelNotReady,
    OutOfMemory,
    Overloaded,
    RequestError,
    Unauthorized,
    UnsupportedOutput,
)


class ErrorForm(Enum):
    """The form of an error answer. Clients of one API do not understand another API's form."""

    OPENAI = "openai"
    TEI = "tei"
    OLLAMA = "ollama"


_TEI_ROOT_PATHS = frozenset(
    (
        "/embed",
        "/embed_all",
        "/embed_sparse",
        "/similarity",
        "/predict",
        "/tokenize",
        "/decode",
        "/info",
        "/invocations",
    )
)
# Two paths below /tei/ have OpenAI's form, for clients of TEI that use OpenAI's API.
_TEI_MODEL_PATH = re.compile(r"/tei/(?!.*/embeddings$)")
_TEI_PROBE = re.compile(r"/tei/.+/health")
# Includes unknown paths: Ollama's clients request /api/pull, for example, and print `error` as text.
_OLLAMA_PREFIX = "/api/"

# From the most specific class to the most general; the first match counts. ``None`` keeps the error's own status.
_TEI_ERRORS: tuple[tuple[type[RequestError], int | None, str], ...] = (
    (EmptyInput, 400, "Empty"),
    (UnsupportedOutput, 424, "Backend"),
    (BadInput, 422, "Validation"),
    (MemoryFull, None, "Overloaded"),
    (Overloaded, 429, "Overloaded"),
    (InferenceFailed, 424, "Backend"),
    (OutOfMemory, 424, "Backend"),
    (InvalidVectors, 424, "Backend"),
    (InternalError, None, "Backend"),
    (ModelNotReady, None, "Unhealthy"),
)


def is_tei_probe(method: str, path: str) -> bool:
    """Return whether a request is the health check of one model, which TEI's clients send without a key.

    A POST to such a path computes something: the name of a model, or the unit of an experiment, may be `health`.
    """
    return method in ("GET", "HEAD") and _TEI_PROBE.fullmatch(path) is not None


def error_form(path: str, method: str = "POST") -> ErrorForm:
    """Return the form that clients of a path expect. TEI's clients POST to the root; browsers GET it."""
    if (path == "/" and method == "POST") or path in _TEI_ROOT_PATHS or _TEI_MODEL_PATH.match(path):
        return ErrorForm.TEI
    return ErrorForm.OLLAMA if path.startswith(_OLLAMA_PREFIX) else ErrorForm.OPENAI


def render_error(error: RequestError, form: ErrorForm) -> tuple[int, dict[str, object]]:
    """Return the status and the body of an error.

    TEI's form has our own ``message`` and ``detail`` as well as TEI's two fields; TEI's clients ignore unknown fields.
    """
    if form is ErrorForm.TEI:
        status, error_type = _tei_error(error)
        return status, {
            "error": error.message,
            "error_type": error_type,
            "message": error.message,
            "detail": error.message,
        }
    if form is ErrorForm.OLLAMA:
        return error.status, {"error": error.message}
    # The same message in the three places where clients look for it.
    return error.status, {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
        "detail": error.message,
        "message": error.message,
    }


def _tei_error(error: RequestError) -> tuple[int, str]:
    for kind, status, error_type in _TEI_ERRORS:
        if isinstance(error, kind):
            return status or error.status, error_type
    # TEI has no name for the others: a missing key, an unknown model, a deadline.
    return error.status, "Validation" if error.status < 500 else "Backend"


async def send_error(error: RequestError, form: ErrorForm, send: Send, drain: Callable[[], Awaitable[None]]) -> None:
    """Send an error in the form that the client reads, with the headers that control retries.

    Args:
        drain: awaited after the answer has been sent and before it is ended; ending it may close the connection.
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
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await drain()
    await send({"type": "http.response.body", "body": b""})


def bad_request(error: RequestError) -> bytes:
    """Return the complete answer to bytes that are not a request; no layer above the connection sees such bytes."""
    status, content = render_error(error, ErrorForm.OPENAI)
    body = orjson.dumps(content)
    return b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (
        status,
        HTTPStatus(status).phrase.encode(),
        len(body),
        body,
    )
