"""Plain messages for the errors of Qdrant's client, and the choice of those that are temporary."""

from __future__ import annotations

from typing import Final

import httpx
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from gateway.bulk.stores.patience import PATIENCE_S, RETRY_HINT
from gateway.bulk.stores.protocol import Place
from gateway.config.wording import cut, quote

_PASSING: Final = (429, 500, 502, 503, 504)


def pause_after(error: Exception) -> float | None:
    """Return the seconds to wait before the same request may succeed; ``None`` if it never will."""
    match error:
        case ResourceExhaustedResponse():
            return float(error.retry_after_s)
        case UnexpectedResponse() if error.status_code in _PASSING:
            return 0.0
        case ResponseHandlingException(source=httpx.TransportError() as source) if "SSL" not in str(source):
            return 0.0
    return None


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of the response to a failed request; ``None`` if the error is another one."""
    return error.status_code if isinstance(error, UnexpectedResponse) else None


def explain(error: Exception, place: Place, collection: str, has_key: bool, has_responded: bool) -> str:
    """Return the reason of a failure, and its remedy.

    Args:
        has_key: a key was sent.
        has_responded: the server has responded before.
    """
    match error:
        case UnexpectedResponse():
            return _explain_response(error, place, place.named(collection), has_key)
        case ResourceExhaustedResponse():
            return f"{place.store} has rate-limited requests for more than {PATIENCE_S:.0f} s; {RETRY_HINT}"
        case ResponseHandlingException(source=httpx.HTTPError() as source):
            return _explain_transport(source, place, has_responded)
        case ResponseHandlingException():
            return f"{place.store} does not respond like Qdrant: {cut(str(error.source), 200)}"
    return f"{place.store}: {cut(str(error), 200)}"


def _explain_transport(error: httpx.HTTPError, place: Place, has_responded: bool) -> str:
    reason = str(error) or type(error).__name__
    if "SSL" in reason:
        return f"{place.store} failed to set up TLS: {reason}. Without TLS, write qdrant:// instead of qdrant+https://"
    if not has_responded:
        return (
            f"{place.store} cannot be reached: {reason.rstrip('.')}. Is it running, and is {place.port} its HTTP port?"
        )
    return f"{place.store} has gone away: {reason}; {RETRY_HINT}"


def _explain_response(error: UnexpectedResponse, place: Place, where: str, has_key: bool) -> str:
    message, status = _message_of(error), error.status_code
    match status:
        case 401 | 403 if has_key:
            return f"{where} rejects the key in {place.secret}: {message}"
        case 401 | 403:
            return f"{where} needs a key: {place.remedy}"
        case 413:
            return (
                f"{where} rejects a request because of its size: {message}. Raise Qdrant's "
                "`service.max_request_size_mb`; the multi-vectors of a single long text can exceed the default of 32 MB"
            )
        case 404 if place.path:
            return (
                f"{where} rejects a request with status 404: {message}. Is {quote(place.path)} a prefix of all paths of the "
                "server? A collection is the last part of a URL, but not part of --from"
            )
        case int() if status in _PASSING:
            return f"{where} fails with status {status}: {message}; {RETRY_HINT}"
    return f"{where} rejects a request with status {status}: {message}"


def _message_of(error: UnexpectedResponse) -> str:
    """Return the message in the response to a failed request."""
    try:
        body = error.structured()
    except ValueError:
        return cut(error.content.decode(errors="replace").strip(), 300) or error.reason_phrase
    match body:
        case {"status": {"error": str() as message}}:
            return cut(message, 500)
    return cut(str(body), 300)
