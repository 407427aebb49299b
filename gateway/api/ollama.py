"""The part of Ollama's dialect that embedding needs: ``/api/embed`` and the list of models."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import Field

from gateway.api.endpoint import Endpoint
from gateway.api.json_body import (
    TRUNCATION,
    ModelName,
    PositiveInteger,
    RequestBody,
    Texts,
    Truncation,
    as_list,
    check_batch,
    wanted_truncation,
)
from gateway.api.pieces import Parts, object_around, vector_list
from gateway.http.context import RequestContext
from gateway.requests import EmbedAnswer, EmbedRequest
from gateway.routing.router import Choice, Router


class OllamaEmbedBody(RequestBody):
    """``POST /api/embed``. Ollama's ``options`` and ``keep_alive`` are about running models, and are ignored."""

    model: ModelName | None = Field(None, title="a string")
    input: str | Texts = Field(title="a string or a list of strings")
    truncate: Truncation = Field(None, title=TRUNCATION)
    dimensions: PositiveInteger | None = Field(None, title="a positive integer")


class OllamaDialect:
    """The handlers: one method per path."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._service = endpoint.service

    async def embed(self, request: Request) -> Response:
        """Embed one text or several."""
        return await self._endpoint.answer(request, OllamaEmbedBody.parse, self._ask, self._service.embed, _write)

    async def tags(self, request: Request) -> Response:
        """List the models and experiments that are ready."""
        client, router = RequestContext.of(request).client, self._endpoint.deployment.router
        choices = [router.choose(name, client) for name in router.names.usable_by(client)]
        cards = [_tag(choice) for choice in choices if _is_ready(choice, router)]
        return Response(orjson.dumps({"models": cards}), media_type="application/json")

    async def _ask(self, request: Request, body: OllamaEmbedBody) -> EmbedRequest:
        texts = as_list(body.input)
        check_batch(len(texts), self._endpoint.settings.max_inputs, "input")
        return replace(
            self._endpoint.embed_request(request, texts, body.model),
            truncate=wanted_truncation(body.truncate, None),
            dimensions=body.dimensions,
            is_normalized=True,  # Ollama's vectors are always normalized
        )


def ollama_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes of the dialect."""
    router = APIRouter(tags=["Ollama"])
    dialect = OllamaDialect(endpoint)
    router.add_api_route("/api/embed", dialect.embed, methods=["POST"], include_in_schema=False)
    router.add_api_route("/api/tags", dialect.tags, include_in_schema=False)
    return router


def _write(request: Request, body: OllamaEmbedBody, answer: EmbedAnswer) -> Parts:
    before = {"model": body.model or answer.name}
    after = {
        "total_duration": int(RequestContext.of(request).elapsed_s * 1e9),
        "load_duration": 0,  # models are loaded before requests arrive
        "prompt_eval_count": answer.num_tokens,
    }
    return lambda: object_around(before, "embeddings", vector_list(answer.vectors), after)


def _is_ready(choice: Choice, router: Router) -> bool:
    models = [choice.model] if choice.experiment is None else [model for _arm, model, _task in router.arms(choice)]
    return all(model.info is not None and model.takes_requests for model in models)


def _tag(choice: Choice) -> dict[str, object]:
    """Describe a model or experiment; an experiment has no weights, and so no digest of them."""
    info = None if choice.experiment is not None else choice.model.info
    return {
        "name": choice.asked,
        "model": choice.asked,
        "modified_at": datetime.fromtimestamp(choice.model.created, UTC).isoformat(),
        "size": info.memory_bytes if info else 0,
        "digest": info.fingerprint if info else "",
        "details": {
            "format": "safetensors" if info else "experiment",
            "family": "",
            "families": None,
            "parameter_size": "",
        },
    }
