"""The OpenAI dialect: embeddings and models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import orjson
from fastapi import APIRouter, Request, Response

from gateway.api.exchange import Exchange
from gateway.api.json_body import Json, describe, integral, parse_object
from gateway.api.model_cards import find_card, list_cards
from gateway.api.schema import (
    EMBEDDINGS_HEADERS,
    EXPECT_SPACE,
    AnyModelCard,
    EmbeddingsAnswer,
    EmbeddingsBody,
    ModelList,
    responses,
)
from gateway.api.token_ids import TokenIdDecoder
from gateway.api.token_vectors import write_token_vectors
from gateway.errors import (
    BadInput,
    BodyTooLarge,
    DeadlineExceeded,
    ModelNotAllowed,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    SpaceMismatch,
)
from gateway.middleware import RequestContext
from gateway.service import EmbedAnswer
from gateway.vectors import Encoding, encode

# Azure's, whose deployments are our models, and one for clients of TEI, which send no model.
_PATHS_WITH_MODEL = (
    "/openai/deployments/{model:path}/embeddings",
    "/tei/{model:path}/v1/embeddings",
    "/tei/{model:path}/embeddings",
)
_REQUEST = {
    "parameters": [EXPECT_SPACE],
    "requestBody": {"required": True, "content": {"application/json": {"schema": EmbeddingsBody.model_json_schema()}}},
}


def openai_router(exchange: Exchange) -> APIRouter:
    """Return the routes of the dialect, with and without ``/v1``."""
    deployment, settings = exchange.deployment, exchange.settings
    router = APIRouter(tags=["OpenAI"])
    decoder = TokenIdDecoder(settings.tiktoken_cache_dir)

    async def embeddings(request: Request) -> Response:
        """Embed one text or many. The same path without `/v1` works as well."""
        return await embed(request, None)

    async def embeddings_of(request: Request, model: str) -> Response:
        """Embed with the model that the path names, whatever the body says: what has an address for each model."""
        return await embed(request, model)

    async def embed(request: Request, model: str | None) -> Response:
        ticket = await exchange.admit(request)
        body = EmbeddingsBody.parse(parse_object(await request.body()))
        texts = parse_input(body.input, settings.max_inputs, decoder)
        wanted = replace(
            exchange.begin(request, texts, model or body.model, body.user),
            task=body.wanted_task,
            dimensions=body.wanted_dimensions,
            is_normalised=body.wants_normalised,
            truncate=body.wanted_truncation,
            outputs=body.wanted_outputs,
            is_late_chunked=bool(body.late_chunking),
            encoding=body.wanted_encoding,
        )
        answer = await exchange.embed(request, ticket, wanted)
        multivectors = await write_token_vectors(answer.multivectors or ())
        return exchange.respond(request, answer, lambda: render_answer(answer, body.wanted_encoding, multivectors))

    async def list_models(request: Request) -> Response:
        """List every model and experiment that the key may use, ready or not."""
        cards = list_cards(deployment.router, deployment.registry, RequestContext.of(request).client.may_use)
        content = {"object": "list", "data": [card.model_dump() for card in cards]}
        return Response(orjson.dumps(content), media_type="application/json")

    async def retrieve_model(request: Request, model_id: str) -> Response:
        """Describe what a name stands for, by any name that embeds; if it holds a task, with that as its default."""
        may_use = RequestContext.of(request).client.may_use
        card = find_card(model_id, deployment.router, deployment.registry, may_use)
        return Response(card.model_dump_json(), media_type="application/json")

    # Routes are tried in this order: the path that nearly every request has comes first.
    for prefix, is_shown in (("/v1", True), ("", False)):
        router.add_api_route(
            f"{prefix}/embeddings",
            embeddings,
            methods=["POST"],
            responses=responses(
                EmbeddingsAnswer,
                BadInput,
                ModelNotAllowed,
                ModelNotFound,
                SpaceMismatch,
                BodyTooLarge,
                Overloaded,
                ModelNotReady,
                DeadlineExceeded,
                headers=EMBEDDINGS_HEADERS,
            ),
            openapi_extra=_REQUEST,
            include_in_schema=is_shown,
        )
        router.add_api_route(
            f"{prefix}/models",
            list_models,
            responses=responses(ModelList),
            include_in_schema=is_shown,
        )
        router.add_api_route(
            f"{prefix}/models/{{model_id:path}}",
            retrieve_model,
            responses=responses(AnyModelCard, BadInput, ModelNotAllowed, ModelNotFound),
            include_in_schema=is_shown,
        )
    for path in _PATHS_WITH_MODEL:
        router.add_api_route(path, embeddings_of, methods=["POST"], include_in_schema=False)
    router.add_api_route("/openai/v1/embeddings", embeddings, methods=["POST"], include_in_schema=False)
    return router


# ------------------------------------------------------------------------------------------------------------ input


def parse_input(value: Json, max_inputs: int, decoder: TokenIdDecoder) -> list[str]:
    """Read the union that ``input`` is: a text, texts, ``{"text": …}`` objects, or token ids.

    Raises:
        BadInput: it is of another type, empty, or has more than ``max_inputs`` items.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise BadInput(f"`input` must be a string or a list of strings, got {describe(value)}", param="input")
    if not value:
        raise BadInput("`input` is an empty list; send at least one text", param="input")
    if (ids := _token_ids(value)) is not None:
        return [decoder.decode(ids, "`input`")]
    if len(value) > max_inputs:
        raise BadInput(
            f"`input` has {len(value)} items, the limit is {max_inputs}: send several requests", param="input"
        )
    return [
        item if isinstance(item, str) else _parse_item(item, f"`input[{i}]`", decoder) for i, item in enumerate(value)
    ]


def _parse_item(item: Json, where: str, decoder: TokenIdDecoder) -> str:
    match item:
        case {"text": str(text)}:
            return text
        case [_, *_] if (ids := _token_ids(item)) is not None:
            return decoder.decode(ids, where)
        case _:
            raise BadInput(
                f'{where} must be a string, {{"text": string}} or a list of token ids, got {describe(item)}',
                param="input",
            )


def _token_ids(items: list[Json]) -> list[int] | None:
    """Return the items as token ids if all are integers; a bool is none."""
    ids: list[int] = []
    for item in map(integral, items):
        if isinstance(item, bool) or not isinstance(item, int):
            return None
        ids.append(item)
    return ids


# ----------------------------------------------------------------------------------------------------------- answer


def render_answer(answer: EmbedAnswer, encoding: Encoding, multivectors: Sequence[orjson.Fragment] = ()) -> bytes:
    """Write an answer as JSON; float32 in the shortest form that reads back exactly.

    Args:
        multivectors: those of each text, already written, if they were asked for.
    """
    rows: list[dict[str, object]] = [{"object": "embedding", "index": i} for i in range(len(answer.vectors))]
    if answer.has_dense:
        for row, vector in zip(rows, encode(answer.vectors, encoding), strict=True):
            row["embedding"] = vector
    for row, sparse in zip(rows, answer.sparse or (), strict=False):
        row["sparse"] = {"indices": sparse.indices, "values": sparse.values}
    for row, multivector in zip(rows, multivectors, strict=False):
        row["multivector"] = multivector
    return orjson.dumps(
        {
            "object": "list",
            "data": rows,
            "model": answer.name,
            "usage": {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens},
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
