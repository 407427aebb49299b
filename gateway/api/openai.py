"""The OpenAI dialect: embeddings and models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TypeAlias

import orjson
from fastapi import APIRouter, Request, Response

from gateway.api.endpoint import Endpoint, add
from gateway.api.json_body import Json, describe, integral
from gateway.api.model_cards import find_card, list_cards
from gateway.api.openai_schema import AnyModelCard, EmbeddingsAnswer, EmbeddingsBody, ModelList
from gateway.api.pieces import Parts, dumps, nested_list, object_around, rows_in_piece, vector_list
from gateway.api.token_ids import MAX_IDS, TokenIds
from gateway.api.wire import EMBEDDINGS_HEADERS, EXPECT_SPACE, request_body, responses
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
from gateway.http.context import RequestContext
from gateway.precision import Precision
from gateway.requests import EmbedAnswer, EmbedRequest
from gateway.vectors import Encoding, encode, quantize

# Azure's, whose deployments are our models, and two for clients of TEI that speak OpenAI's dialect and send no model.
_PATHS_WITH_MODEL = (
    "/openai/deployments/{model:path}/embeddings",
    "/tei/{model:path}/v1/embeddings",
    "/tei/{model:path}/embeddings",
)
Item: TypeAlias = str | TokenIds
"""One input: a text, or the token ids of one."""

_BYTES_PER_ID = 8
_EMBEDDINGS_ANSWERS = responses(
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
)
_MODEL_ANSWERS = responses(AnyModelCard, BadInput, ModelNotAllowed, ModelNotFound)
_REQUEST = {
    "parameters": [EXPECT_SPACE],
    **request_body(EmbeddingsBody),
}


class OpenAIDialect:
    """The handlers: one method per path."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._service = endpoint.service
        self._deployment = endpoint.deployment

    async def embeddings(self, request: Request) -> Response:
        """Embed one text or many. The same path without `/v1` works as well."""
        return await self._endpoint.answer(request, self._parse, self._ask, self._service.embed, _write)

    async def list_models(self, request: Request) -> Response:
        """List every model and experiment that the key may use, ready or not."""
        cards = list_cards(self._deployment.router, self._deployment.registry, RequestContext.of(request).client)
        content = {"object": "list", "data": [card.model_dump() for card in cards]}
        return Response(orjson.dumps(content), media_type="application/json")

    async def retrieve_model(self, request: Request, model_id: str) -> Response:
        """Describe a model, by any name that embeds. A task in the name becomes the default task."""
        client = RequestContext.of(request).client
        card = find_card(model_id, self._deployment.router, self._deployment.registry, client)
        return Response(card.model_dump_json(), media_type="application/json")

    def _parse(self, content: dict[str, Json]) -> tuple[EmbeddingsBody, list[Item]]:
        body = EmbeddingsBody.parse(content)
        items = parse_input(body.input, self._endpoint.settings.max_inputs)
        body.input = None  # token ids are dropped once they are decoded
        return body, items

    async def _ask(self, request: Request, parsed: tuple[EmbeddingsBody, list[Item]]) -> EmbedRequest:
        """Return the request to the service. A model in the path takes precedence over the body's."""
        body, items = parsed
        precision, encoding = body.wanted_precision, body.wanted_encoding
        _check_decoding(request, precision, encoding)
        texts = await self._decode(request, items)
        items.clear()
        return replace(
            self._endpoint.embed_request(request, texts, request.path_params.get("model", body.model), body.user),
            task=body.wanted_task,
            dimensions=body.wanted_dimensions,
            is_normalized=body.wants_normalized,
            truncate=body.wanted_truncation,
            outputs=body.wanted_outputs,
            is_late_chunked=bool(body.late_chunking),
            precision=precision,
            encoding=encoding.value if encoding is Encoding.BASE64 else precision.value,
        )

    async def _decode(self, request: Request, items: list[Item]) -> list[str]:
        num_ids = sum(len(item.ids) for item in items if not isinstance(item, str))
        if not num_ids:
            return decode_items(items)
        return await self._endpoint.in_turn(request, _BYTES_PER_ID * num_ids, lambda: decode_items(items))


def openai_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes of the dialect, with and without ``/v1``."""
    router = APIRouter(tags=["OpenAI"])
    dialect = OpenAIDialect(endpoint)
    # Routes are tried in this order: the path of nearly all requests comes first.
    add(router, "/embeddings", dialect.embeddings, _EMBEDDINGS_ANSWERS, method="POST", request=_REQUEST)
    add(router, "/models", dialect.list_models, responses(ModelList))
    add(router, "/models/{model_id:path}", dialect.retrieve_model, _MODEL_ANSWERS)
    for path in ("/openai/v1/embeddings", *_PATHS_WITH_MODEL):
        router.add_api_route(path, dialect.embeddings, methods=["POST"], include_in_schema=False)
    return router


# ------------------------------------------------------------------------------------------------------------ input


def parse_input(value: Json, max_inputs: int) -> list[Item]:
    """Read ``input``: a text, texts, ``{"text": …}`` objects, or token ids.

    Raises:
        BadInput: the value has another type, is empty, or has more than ``max_inputs`` items.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise BadInput(f"`input` must be a string or a list of strings, got {describe(value)}", param="input")
    if not value:
        raise BadInput("`input` is an empty list; send at least one text", param="input")
    if (ids := _token_ids(value, "`input`")) is not None:
        return [ids]
    if len(value) > max_inputs:
        raise BadInput(
            f"`input` has {len(value)} items; the limit is {max_inputs}: send several requests", param="input"
        )
    return [item if isinstance(item, str) else _parse_item(item, f"`input[{i}]`") for i, item in enumerate(value)]


def _parse_item(item: Json, where: str) -> Item:
    match item:
        case {"text": str(text)}:
            return text
        case [_, *_] if (ids := _token_ids(item, where)) is not None:
            return ids
        case _:
            raise BadInput(
                f'{where} must be a string, {{"text": string}} or a list of token ids, got {describe(item)}',
                param="input",
            )


def _token_ids(items: list[Json], where: str) -> TokenIds | None:
    """Return the items as token ids if all are integers, and not booleans.

    Raises:
        BadInput: there are more ids than a text may have.
    """
    if isinstance(items[0], bool) or not isinstance(items[0], int | float):
        return None
    if len(items) > MAX_IDS:
        raise BadInput(
            f"{where} holds {len(items)} numbers; the limit is {MAX_IDS} token ids: send texts", param="input"
        )
    ids: list[int] = []
    for item in map(integral, items):
        if isinstance(item, bool) or not isinstance(item, int):
            return None
        ids.append(item)
    return TokenIds(ids, where)


def decode_items(items: Iterable[Item]) -> list[str]:
    """Return the texts of items that may be token ids.

    Raises:
        BadInput: the token ids cannot be decoded.
    """
    return [item if isinstance(item, str) else item.decode() for item in items]


def _check_decoding(request: Request, precision: Precision, encoding: Encoding) -> None:
    """Reject base64 that the client would read as other numbers.

    OpenAI's clients request base64 by default and read it as float32, whatever precision the body requests.
    """
    if encoding is Encoding.BASE64 and precision is not Precision.FLOAT and "x-stainless-lang" in request.headers:
        raise BadInput(
            f"OpenAI's clients request base64 by default and read it as float32, which would misread numbers of type "
            f'{precision.value}: pass `encoding_format="{precision.value}"` to the call, and leave out the other field',
            param="encoding_format",
        )


# ----------------------------------------------------------------------------------------------------------- answer


def _write(_request: Request, parsed: tuple[EmbeddingsBody, list[Item]], answer: EmbedAnswer) -> Parts:
    return partial(answer_parts, answer, parsed[0].wanted_encoding)


def answer_parts(answer: EmbedAnswer, encoding: Encoding) -> Iterator[bytes]:
    """Write an answer as JSON, part by part; float32 in the shortest form that reads back exactly."""
    usage = {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens}
    rows = nested_list(_rows(answer, encoding))
    return object_around({"object": "list"}, "data", rows, {"model": answer.name, "usage": usage})


def _rows(answer: EmbedAnswer, encoding: Encoding) -> Iterator[Iterable[bytes]]:
    """Yield the rows of the texts in parts: as many rows as fill one piece, or a single row with further outputs."""
    is_plain = answer.sparse is None and answer.multivectors is None
    num_together = rows_in_piece(answer.vectors.shape[1]) if is_plain else 1
    for first in range(0, answer.num_texts, num_together):
        rows = _values(answer, encoding, range(first, min(first + num_together, answer.num_texts)))
        written = dumps(rows)[1:-1]
        if answer.multivectors is None:
            yield (written,)
        else:
            yield chain((written[:-1], b',"multivector":'), vector_list(answer.multivectors[first]), (b"}",))


def _values(answer: EmbedAnswer, encoding: Encoding, indices: range) -> list[dict[str, object]]:
    """Return the rows of some texts, without multi-vectors."""
    rows: list[dict[str, object]] = [{"object": "embedding", "index": i} for i in indices]
    if answer.has_dense:
        vectors = quantize(answer.vectors[indices.start : indices.stop], answer.precision, answer.ranges)
        for row, vector in zip(rows, encode(vectors, encoding), strict=True):
            row["embedding"] = vector
    if answer.sparse is not None:
        for row, weights in zip(rows, answer.sparse[indices.start : indices.stop], strict=True):
            row["sparse"] = {"indices": weights.indices, "values": weights.values}
    return rows
