"""Rerank as Cohere, Jina, Infinity and TEI have it.

A request with ``texts`` is one of TEI's, wherever it is sent: so are its answer and its errors.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, Request, Response

from gateway.api.endpoint import Endpoint, reserve_beside, timeout_s, unit_source
from gateway.api.json_body import Json
from gateway.api.pieces import object_around, value_list
from gateway.api.rerank_schema import RerankBody, rerank_responses
from gateway.api.tei_headers import describe_work
from gateway.api.wire import RERANK_HEADERS
from gateway.errors import (
    BadInput,
    BodyTooLarge,
    DeadlineExceeded,
    ModelNotAllowed,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
)
from gateway.http.error_forms import ErrorForm
from gateway.http.middleware import RequestContext
from gateway.requests import RerankAnswer, RerankRequest
from gateway.types import Vectors

_REQUEST = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": RerankBody.model_json_schema()}}}
}
_META = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between the paths; no one shape serves all clients.

    Attributes:
        shows_documents: whether a result has its document when the request does not say: Jina's clients rely on it.
        is_plain: whether a document is a string, as Infinity has it, and not an object.
        is_tei: whether nothing but TEI's requests is accepted.
    """

    path: str
    shows_documents: bool = False
    is_plain: bool = False
    is_tei: bool = False
    is_in_schema: bool = True


DIALECTS = (
    Dialect("/v1/rerank", shows_documents=True),
    Dialect("/v2/rerank"),
    Dialect("/v1/v2/rerank", is_in_schema=False),  # Cohere's client with a base URL that ends in /v1
    Dialect("/rerank", is_plain=True),
    Dialect("/tei/{model:path}/rerank", is_tei=True, is_in_schema=False),
)


def rerank_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes of each dialect."""
    router = APIRouter(tags=["Rerank"])
    for dialect in DIALECTS:
        router.add_api_route(
            dialect.path,
            rerank_endpoint(endpoint, dialect),
            methods=["POST"],
            responses=rerank_responses(
                BadInput,
                ModelNotAllowed,
                ModelNotFound,
                BodyTooLarge,
                Overloaded,
                ModelNotReady,
                DeadlineExceeded,
                headers=RERANK_HEADERS,
            ),
            openapi_extra=_REQUEST,
            include_in_schema=dialect.is_in_schema,
        )
    return router


def rerank_endpoint(endpoint: Endpoint, dialect: Dialect) -> Handler:
    """Return what answers the requests of a dialect."""
    settings = endpoint.settings

    async def rerank(request: Request) -> Response:
        """Score texts against a query, the best first."""

        def read(given: dict[str, Json]) -> tuple[RerankBody, list[str]]:
            if given.get("texts") is not None:
                RequestContext.of(request).error_form = ErrorForm.TEI
            elif dialect.is_tei:
                raise BadInput("`texts` is required", param="texts")
            body = RerankBody.parse(given)
            return body, body.wanted_documents(settings.max_inputs)

        ticket = await endpoint.admit(request)
        body, texts = await endpoint.read(request, read)
        wants_texts = body.wants_texts
        wanted = _rerank_request(request, body, texts, timeout_s(request, settings.request_timeout_s))
        answer = await endpoint.rerank(request, ticket, wanted)
        shows_texts = dialect.shows_documents and not body.is_tei if wants_texts is None else wants_texts
        shown = texts if shows_texts else None

        def parts() -> Iterator[bytes]:
            results = value_list(_results(answer.scores, shown, body, is_plain=dialect.is_plain))
            if body.is_tei:
                return results
            before, after = _envelope(RequestContext.of(request).request_id, answer)
            return object_around(before, "results", results, after)

        num_characters = len(texts) * len(body.query) + sum(map(len, texts))
        describe_times = describe_work(num_characters, answer.num_tokens) if body.is_tei else None
        num_bytes = answer.num_bytes + sum(map(sys.getsizeof, shown or ()))
        return await endpoint.respond(request, answer, parts, describe_times, num_bytes=num_bytes)

    return rerank


def _rerank_request(request: Request, body: RerankBody, texts: list[str], patience_s: float) -> RerankRequest:
    """Say in the gateway's own terms what a request asks for."""
    context = RequestContext.of(request)
    return RerankRequest(
        query=body.query,
        texts=texts,
        model=request.path_params.get("model", body.model),
        timeout_s=patience_s,
        caller=context.caller,
        truncate=body.wanted_truncation,
        max_text_tokens=body.max_tokens_per_doc,
        unit_source=unit_source(request, body.user),
        client=context.client,
        reserve=reserve_beside(request, [body.query, *texts]),
    )


def _results(
    scores: Vectors, texts: Sequence[str] | None, body: RerankBody, *, is_plain: bool
) -> Iterator[dict[str, object]]:
    """Yield the results, the best first, of equal ones the first in the request.

    Args:
        scores: ``(n,)`` float32, before any sigmoid.
        texts: what was scored, if results are to hold it.
        is_plain: write a document as a string, and not as an object.
    """
    order = np.argsort(-scores, kind="stable")[: body.top_n]
    values = scores if body.raw_scores else _sigmoid(scores)
    for i in order:
        result: dict[str, object] = {"index": int(i), "score" if body.is_tei else "relevance_score": values[i]}
        if texts is not None and body.is_tei:
            result["text"] = texts[i]
        elif texts is not None:
            result["document"] = texts[i] if is_plain else {"text": texts[i]}
        yield result


def _sigmoid(scores: Vectors) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return ``1 / (1 + exp(-score))`` in float64, without an overflow."""
    probabilities: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.exp(
        -np.logaddexp(0.0, -scores.astype(np.float64))
    )
    return probabilities


def _envelope(request_id: str, answer: RerankAnswer) -> tuple[dict[str, object], dict[str, object]]:
    """Return what stands before the results, and what after them."""
    before: dict[str, object] = {"id": request_id, "object": "rerank", "model": answer.name}
    usage = {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens}
    return before, {"usage": usage, "meta": _META}
