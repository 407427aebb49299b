"""Which API's form an error has: that of the path that was asked. Pure."""

from __future__ import annotations

import re
from enum import Enum

from gateway.errors import (
    BadInput,
    EmptyInput,
    InferenceFailed,
    InternalError,
    InvalidVectors,
    MemoryFull,
    ModelNotReady,
    OutOfMemory,
    Overloaded,
    RequestError,
    UnsupportedOutput,
)


class ErrorForm(Enum):
    """What an error looks like: clients of one API do not understand that of another."""

    OPENAI = "openai"
    TEI = "tei"
    OLLAMA = "ollama"


_TEI_ROOT_PATHS = frozenset(
    ("/embed", "/embed_all", "/embed_sparse", "/similarity", "/tokenize", "/decode", "/info", "/invocations")
)
# Below /tei/ there are two paths of OpenAI's, for clients of TEI that speak that.
_TEI_MODEL_PATH = re.compile(r"/tei/(?!.*/embeddings$)")
_TEI_PROBE = re.compile(r"/tei/.+/health")
# Also where there is nothing: its clients ask for /api/pull, say, and print `error` as text.
_OLLAMA_PREFIX = "/api/"

# From the special to the general: the first that an error is one of. ``None`` keeps the status.
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


def is_tei_probe(path: str) -> bool:
    """Return whether a path asks for the health of one model, as TEI's clients do without a key."""
    return _TEI_PROBE.fullmatch(path) is not None


def error_form(path: str, method: str = "POST") -> ErrorForm:
    """Return the form that clients of a path look for. Clients of TEI post to its root; browsers get it."""
    if (path == "/" and method == "POST") or path in _TEI_ROOT_PATHS or _TEI_MODEL_PATH.match(path):
        return ErrorForm.TEI
    return ErrorForm.OLLAMA if path.startswith(_OLLAMA_PREFIX) else ErrorForm.OPENAI


def render_error(error: RequestError, form: ErrorForm) -> tuple[int, dict[str, object]]:
    """Return the status and the body of an error.

    TEI's form has our own ``message`` and ``detail`` beside its two fields: its clients ignore what they do not know.
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
    # One message in the three forms that clients look for.
    return error.status, {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
        "detail": error.message,
        "message": error.message,
    }


def _tei_error(error: RequestError) -> tuple[int, str]:
    for kind, status, error_type in _TEI_ERRORS:
        if isinstance(error, kind):
            return status or error.status, error_type
    # TEI has no name for what is left: a missing key, an unknown model, a deadline.
    return error.status, "Validation" if error.status < 500 else "Backend"
