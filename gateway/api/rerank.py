"""Rerank in the dialects of Cohere, Jina, Infinity and TEI.

A request with ``texts`` is one of TEI's, on any path: its answer and its errors have TEI's form.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from fastapi import APIRouter, Request, Response

from gateway.api.endpoint import Endpoint, may_be_captured, reserve_texts, timeout_s, unit_source
from gateway.api.json_body import Json
from gateway.api.pieces import Parts, object_around, value_list
from gateway.api.rerank_schema import RerankBody, rerank_responses
from gateway.api.wire import RERANK_HEADERS, request_body
from gateway.errors import (
    BadInput,
    BodyTooLarge,
    DeadlineExceeded,
    ModelNotAllowed,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
)
from gateway.http.context import RequestContext
from gateway.http.error_forms import ErrorForm
from gateway.requests import RerankAnswer, RerankRequest
from gateway.types import Vectors

_ANSWERS = rerank_responses(
    BadInput,
    ModelNotAllowed,
    ModelNotFound,
    BodyTooLarge,
    Overloaded,
    ModelNotReady,
    DeadlineExceeded,
    headers=RERANK_HEADERS,
)
_REQUEST = request_body(RerankBody)
_META = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}


@dataclass(frozen=True, slots=True)
class RerankPath:
    """The differences between the paths: clients expect different shapes.

    Attributes:
        shows_documents: include documents in results by default, which Jina's clients rely on.
        is_plain: a document is a string, as in Infinity's API, rather than an object.
        is_tei: accept only TEI's requests.
    """

    path: str
    shows_documents: bool = False
    is_plain: bool = False
    is_tei: bool = False
    is_in_schema: bool = True


PATHS = (
    RerankPath("/v1/rerank", shows_documents=True),
    RerankPath("/v2/rerank"),
    RerankPath("/v1/v2/rerank", is_in_schema=False),  # Cohere's client with a base URL that ends in /v1
    RerankPath("/rerank", is_plain=True),
    RerankPath("/tei/{model:path}/rerank", is_tei=True, is_in_schema=False),
)


class _Parsed(NamedTuple):
    """A body, the texts in it, and whether the results repeat them."""

    body: RerankBody
    texts: list[str]
    shows_texts: bool

    @property
    def held_bytes(self) -> int:
        """The memory of the texts that the answer repeats."""
        return sum(map(sys.getsizeof, self.texts)) if self.shows_texts else 0


class Reranker:
    """The handler of one path."""

    def __init__(self, endpoint: Endpoint, path: RerankPath) -> None:
        self._endpoint = endpoint
        self._service = endpoint.service
        self._path = path

    async def rerank(self, request: Request) -> Response:
        """Score texts against a query, the best first."""
        return await self._endpoint.answer(
            request,
            partial(self._parse, request),
            self._ask,
            self._service.rerank,
            self._write,
            held_bytes=lambda parsed: parsed.held_bytes,
        )

    def _parse(self, request: Request, content: dict[str, Json]) -> _Parsed:
        if content.get("texts") is not None:
            RequestContext.of(request).error_form = ErrorForm.TEI
        elif self._path.is_tei:
            raise BadInput("`texts` is required", param="texts")
        body = RerankBody.parse(content)
        texts = body.wanted_documents(self._endpoint.settings.max_inputs)
        wants_texts = body.wants_texts
        shows_texts = self._path.shows_documents and not body.is_tei if wants_texts is None else wants_texts
        return _Parsed(body, texts, shows_texts)

    async def _ask(self, request: Request, parsed: _Parsed) -> RerankRequest:
        body, texts = parsed.body, parsed.texts
        context = RequestContext.of(request)
        return RerankRequest(
            query=body.query,
            texts=texts,
            model=request.path_params.get("model", body.model),
            timeout_s=timeout_s(request, self._endpoint.settings.request_timeout_s),
            caller=context.caller,
            priority=context.priority,
            may_be_captured=may_be_captured(request),
            truncate=body.wanted_truncation,
            max_text_tokens=body.max_tokens_per_doc,
            score_by=body.wanted_scores,
            unit_source=unit_source(request, body.user),
            client=context.client,
            reserve=reserve_texts(request, [body.query, *texts]),
        )

    def _write(self, request: Request, parsed: _Parsed, answer: RerankAnswer) -> Parts:
        body = parsed.body
        shown = parsed.texts if parsed.shows_texts else None
        before, after = _envelope(RequestContext.of(request).request_id, answer)

        def parts() -> Iterator[bytes]:
            results = value_list(_results(answer, shown, body, is_plain=self._path.is_plain))
            return results if body.is_tei else object_around(before, "results", results, after)

        return parts


def rerank_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes that rerank."""
    router = APIRouter(tags=["Rerank"])
    for path in PATHS:
        router.add_api_route(
            path.path,
            Reranker(endpoint, path).rerank,
            methods=["POST"],
            responses=_ANSWERS if path.is_in_schema else None,
            openapi_extra=_REQUEST,
            include_in_schema=path.is_in_schema,
        )
    return router


def _results(
    answer: RerankAnswer, texts: Sequence[str] | None, body: RerankBody, *, is_plain: bool
) -> Iterator[dict[str, object]]:
    """Yield the results, the best first; results with equal scores stay in the order of the request.

    Args:
        texts: the texts that were scored, if the results repeat them.
        is_plain: write a document as a string rather than an object.
    """
    scores = answer.scores
    order = np.argsort(-scores, kind="stable")[: body.top_n]
    values = _sigmoid(scores) if answer.are_logits and not body.raw_scores else scores
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
    """Return the fields before the results, and those after them."""
    before: dict[str, object] = {"id": request_id, "object": "rerank", "model": answer.name}
    usage = {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens}
    return before, {"usage": usage, "meta": _META}
