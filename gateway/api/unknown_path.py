"""The answer to a path that does not exist, or does not have the request's method."""

from __future__ import annotations

import difflib

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from gateway.api.tei import TEI_ADDRESS
from gateway.errors import InternalError, MethodNotAllowed, NotFound
from gateway.http.context import MAX_SHOWN_PATH, RequestContext


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Raise the gateway's own error for the framework's, on a wrong path or method: the exit for errors answers it.

    Raises:
        NotFound: no such path.
        MethodNotAllowed: the path has other methods.
        InternalError: anything else, which is not expected.
    """
    assert isinstance(error, HTTPException)  # noqa: S101  it is registered for nothing else
    context = RequestContext.of(request)
    path = context.path[:MAX_SHOWN_PATH]
    route = getattr(request.scope.get("route"), "path", "")
    # TEI's clients post there; a GET comes from a curious person.
    is_nowhere = route in ("/", TEI_ADDRESS) and context.method in ("GET", "HEAD")
    if error.status_code == 405 and not is_nowhere:
        # The framework names the methods of only one of the path's routes; it has a few paths that are not ours.
        known = (error.headers or {}).get("Allow", "").split(", ")
        methods = sorted(request.app.state.methods.get(route, known))
        raise MethodNotAllowed(
            f"{context.method} is not allowed on {path}; use {' or '.join(methods)}", allow=", ".join(methods)
        )
    if error.status_code in (404, 405):
        near = difflib.get_close_matches(path, request.app.state.shown_paths, n=1)
        hint = (
            f"did you mean {near[0].replace(':path', '')}?"
            if near
            else "embeddings are at POST /v1/embeddings, models at GET /v1/models"
        )
        raise NotFound(f"no such path: {path}; {hint}")
    raise InternalError(f"unexpected status {error.status_code} from the framework")
