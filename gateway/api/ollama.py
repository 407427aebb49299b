"""What Ollama's clients need to embed: ``/api/embed`` and the list of models."""

from __future__ import annotations

from collections.abc import Iterator
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
from gateway.api.pieces import object_around, vector_list
from gateway.http.middleware import RequestContext
from gateway.routing.router import Choice, Router
from gateway.types import ModelState


class OllamaEmbedBody(RequestBody):
    """``POST /api/embed``. Ollama's ``options`` and ``keep_alive`` are about running models, and ignored."""

    model: ModelName | None = Field(None, title="a string")
    input: str | Texts = Field(title="a string or a list of strings")
    truncate: Truncation = Field(None, title=TRUNCATION)
    dimensions: PositiveInteger | None = Field(None, title="a positive integer")


def ollama_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes of the dialect."""
    router = APIRouter(tags=["Ollama"])

    async def embed(request: Request) -> Response:
        ticket = await endpoint.admit(request)
        body = await endpoint.read(request, OllamaEmbedBody.parse)
        texts = as_list(body.input)
        check_batch(len(texts), endpoint.settings.max_inputs, "input")
        wanted = replace(
            endpoint.begin(request, texts, body.model),
            truncate=wanted_truncation(body.truncate, None),
            dimensions=body.dimensions,
            is_normalized=True,  # as Ollama's always are
        )
        answer = await endpoint.embed(request, ticket, wanted)

        before = {"model": body.model or answer.name}
        after = {
            "total_duration": int(RequestContext.of(request).elapsed_s * 1e9),
            "load_duration": 0,  # models are loaded before they are asked
            "prompt_eval_count": answer.num_tokens,
        }

        def parts() -> Iterator[bytes]:
            return object_around(before, "embeddings", vector_list(answer.vectors), after)

        return await endpoint.respond(request, answer, parts)

    async def tags(request: Request) -> Response:
        client, router = RequestContext.of(request).client, endpoint.deployment.router
        choices = [router.choose(name, client) for name in router.names.usable_by(client)]
        cards = [_tag(choice) for choice in choices if _is_ready(choice, router)]
        return Response(orjson.dumps({"models": cards}), media_type="application/json")

    router.add_api_route("/api/embed", embed, methods=["POST"], include_in_schema=False)
    router.add_api_route("/api/tags", tags, include_in_schema=False)
    return router


def _is_ready(choice: Choice, router: Router) -> bool:
    models = [choice.model] if choice.experiment is None else [model for _arm, model, _task in router.arms(choice)]
    return all(model.info is not None and model.state is ModelState.READY for model in models)


def _tag(choice: Choice) -> dict[str, object]:
    """Describe what a name stands for; an experiment has no weights of its own, and so no digest of them."""
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
