"""Classify texts in the dialects of vLLM, Infinity and TEI: score each text by the labels of a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response

from gateway.api.classify_schema import ClassifyBody, ClassifyResult
from gateway.api.endpoint import Endpoint, add, reserve_texts, timeout_s, unit_source
from gateway.api.json_body import Json, check_batch
from gateway.api.pieces import Parts, object_around, value_list
from gateway.api.tei_schema import PredictBody
from gateway.api.wire import RERANK_HEADERS, request_body, responses
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
from gateway.requests import ClassifyAnswer, ClassifyRequest
from gateway.types import LabelFunction

Scores = npt.NDArray[np.float64]

_ANSWERS = responses(
    ClassifyResult,
    BadInput,
    ModelNotAllowed,
    ModelNotFound,
    BodyTooLarge,
    Overloaded,
    ModelNotReady,
    DeadlineExceeded,
    headers=RERANK_HEADERS,
)
_REQUEST = request_body(ClassifyBody)


class _Parsed(NamedTuple):
    body: ClassifyBody
    texts: list[str]
    firsts: list[str | None] | None
    wants_raw: bool


class ClassifyDialect:
    """The handler of ``/v1/classify``."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._service = endpoint.service

    async def classify(self, request: Request) -> Response:
        """Score the labels of each text."""
        return await self._endpoint.answer(request, self._parse, self._ask, self._service.classify, _write)

    def _parse(self, content: dict[str, Json]) -> _Parsed:
        body = ClassifyBody.parse(content)
        return _Parsed(body, *body.sequences(self._endpoint.settings.max_inputs), body.wants_raw)

    async def _ask(self, request: Request, parsed: _Parsed) -> ClassifyRequest:
        body = parsed.body
        classify_request = _request(self._endpoint, request, parsed.texts, parsed.firsts)
        unit = unit_source(request, body.user)
        return replace(classify_request, model=body.model, truncate=body.wanted_truncation, unit_source=unit)


class Predictor:
    """The handler of TEI's path."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._service = endpoint.service

    async def predict(self, request: Request) -> Response:
        """Return the labels of a text, the best first: ``[{score, label}]``; a list of such lists for a batch."""
        return await self._endpoint.answer(request, PredictBody.parse, self._ask, self._service.classify, _write_tei)

    async def _ask(self, request: Request, body: PredictBody) -> ClassifyRequest:
        items = body.sequences
        check_batch(len(items), self._endpoint.settings.max_inputs, "inputs")
        has_pairs = any(len(item) > 1 for item in items)
        firsts = [item[0] if len(item) > 1 else None for item in items] if has_pairs else None
        classify_request = _request(self._endpoint, request, [item[-1] for item in items], firsts)
        model = request.path_params.get("model", body.model)
        return replace(classify_request, model=model, truncate=body.wanted_truncation)


def classify_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes that classify, except TEI's."""
    router = APIRouter(tags=["Classify"])
    add(router, "/classify", ClassifyDialect(endpoint).classify, _ANSWERS, method="POST", request=_REQUEST)
    return router


def _request(
    endpoint: Endpoint, request: Request, texts: list[str], firsts: list[str | None] | None
) -> ClassifyRequest:
    """Return a request to the service, with the parts that do not depend on the dialect.

    Raises:
        MemoryFull: there is no room for the texts.
    """
    context = RequestContext.of(request)
    return ClassifyRequest(
        texts=texts,
        firsts=firsts,
        model=None,
        timeout_s=timeout_s(request, endpoint.settings.request_timeout_s),
        caller=context.caller,
        priority=context.priority,
        unit_source=unit_source(request, None),
        client=context.client,
        reserve=reserve_texts(request, [*texts, *(first or "" for first in firsts or ())]),
    )


def _scores(answer: ClassifyAnswer, *, is_raw: bool) -> Scores:
    """Return the scores of each text's labels, ``(n, labels)`` float64.

    Args:
        is_raw: return the model's own numbers.
    """
    numbers: Scores = answer.logits.astype(np.float64)
    if is_raw or answer.function is LabelFunction.NONE:
        return numbers
    if answer.function is LabelFunction.SIGMOID:
        return np.asarray(np.exp(-np.logaddexp(0.0, -numbers)))
    powers = np.exp(numbers - numbers.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _best_first(scores: Scores, labels: Sequence[str]) -> Iterator[list[dict[str, object]]]:
    """Yield the labels of each text with their scores, the best first, as Infinity and TEI write them."""
    for row in scores:
        yield [{"score": row[i], "label": labels[i]} for i in np.argsort(-row, kind="stable")]


def _write(request: Request, parsed: _Parsed, answer: ClassifyAnswer) -> Parts:
    usage = {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens}
    is_infinity = parsed.body.is_infinity
    before = {
        "id": RequestContext.of(request).request_id,
        "object": "classify" if is_infinity else "list",
        "created": int(time.time()),
        "model": answer.name,
    }

    def parts() -> Iterator[bytes]:
        scores = _scores(answer, is_raw=parsed.wants_raw)
        rows: Iterator[object] = _best_first(scores, answer.labels) if is_infinity else _vllm_rows(scores, answer)
        return object_around(before, "data", value_list(rows), {"usage": usage})

    return parts


def _vllm_rows(scores: Scores, answer: ClassifyAnswer) -> Iterator[dict[str, object]]:
    for i, row in enumerate(scores):
        label = answer.labels[int(np.argmax(row))]
        yield {"index": i, "label": label, "probs": row, "num_classes": len(row)}


def _write_tei(_request: Request, body: PredictBody, answer: ClassifyAnswer) -> Parts:
    def parts() -> Iterator[bytes]:
        rows = _best_first(_scores(answer, is_raw=body.raw_scores), answer.labels)
        return value_list(rows if body.is_batch else next(rows))

    return parts
