"""The dialect of Hugging Face's text-embeddings-inference (TEI), as its release 1.9 speaks it.

At the root for the registry's default model, and under ``/tei/{model}/`` for each: its clients send no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from gateway import __version__
from gateway.api.exchange import Exchange, unless_disconnected
from gateway.api.json_body import parse_object
from gateway.api.tei_headers import describe_work
from gateway.api.tei_schema import (
    MAX_CHARACTERS,
    MAX_IDS,
    Cutting,
    DecodeBody,
    EmbedBody,
    SimilarityBody,
    SimilarityInputs,
    TextsBody,
    TokenizeBody,
    check_batch,
    check_size,
    listed,
)
from gateway.api.token_vectors import write_token_vectors
from gateway.config.settings import Settings
from gateway.embedding import ModelInfo, ModelKind, Output, SparseVector, Token
from gateway.errors import DeadlineExceeded, ModelNotReady
from gateway.middleware import RequestContext
from gateway.routing.router import Target
from gateway.routing.spaces import space_id
from gateway.service import EmbedAnswer

Handler = Callable[[Request, str | None], Awaitable[Response]]
T = TypeVar("T")


def tei_router(exchange: Exchange) -> APIRouter:
    """Return the routes of the dialect but ``/rerank``, which ``api/rerank`` has."""
    router = APIRouter(tags=["TEI"])
    dialect = _Dialect(exchange)

    def add(name: str, handler: Handler, method: str) -> None:
        async def of_default(request: Request) -> Response:
            return await handler(request, None)

        async def of_model(request: Request, model: str) -> Response:
            return await handler(request, model)

        router.add_api_route(f"/{name}", of_default, methods=[method], include_in_schema=False)
        router.add_api_route(f"/tei/{{model:path}}/{name}", of_model, methods=[method], include_in_schema=False)

    add("embed", dialect.embed, "POST")
    add("embed_sparse", dialect.embed_sparse, "POST")
    add("embed_all", dialect.embed_all, "POST")
    add("similarity", dialect.similarity, "POST")
    add("tokenize", dialect.tokenize, "POST")
    add("decode", dialect.decode, "POST")
    add("info", dialect.info, "GET")

    async def health(model: str) -> Response:
        exchange.service.check_ready(model)
        if exchange.deployment.is_draining:
            raise ModelNotReady("the gateway is shutting down", retry_after_s=5)
        return Response()

    router.add_api_route("/tei/{model:path}/health", health, include_in_schema=False)
    return router


class _Dialect:
    """One method a path. ``model`` is the public name in it, or ``None`` at the root."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._settings = exchange.settings
        # One at a time: it takes a core, which the models need more.
        self._tokenising = asyncio.Semaphore(1)

    async def embed(self, request: Request, model: str | None) -> Response:
        """Answer one vector a text: ``[[float]]``."""
        ticket = await self._exchange.admit(request)
        body = EmbedBody.parse(parse_object(await request.body()))
        texts = await self._texts(request, model, body)
        wanted = replace(
            self._exchange.begin(request, texts, model),
            task=body.prompt_name or None,
            truncate=body.wanted_truncation,
            is_normalised=body.normalize,
            dimensions=body.dimensions,
        )
        answer = await self._exchange.embed(request, ticket, wanted)
        return self._respond(request, answer, texts, answer.vectors)

    async def embed_sparse(self, request: Request, model: str | None) -> Response:
        """Answer the weights of each text's tokens: ``[[{index, value}]]``."""
        answer, texts = await self._embed_as(request, model, Output.SPARSE)
        return self._respond(request, answer, texts, [_sparse(one) for one in answer.sparse or ()])

    async def embed_all(self, request: Request, model: str | None) -> Response:
        """Answer what is pooled to each text's vector, for each of its tokens: ``[[[float]]]``."""
        answer, texts = await self._embed_as(request, model, Output.STATES)
        return self._respond(request, answer, texts, await write_token_vectors(answer.states or ()))

    async def similarity(self, request: Request, model: str | None) -> Response:
        """Answer the cosine of one text with each of the others: ``[float]``."""
        ticket = await self._exchange.admit(request)
        body = SimilarityBody.parse(parse_object(await request.body()))
        inputs, parameters = SimilarityInputs.parse(body.inputs), Cutting.parse(body.parameters)
        if inputs.sentences:  # the source counts as well, as it does there
            check_batch(len(inputs.sentences) + 1, self._settings.max_inputs, "inputs.sentences")
        else:
            check_batch(0, self._settings.max_inputs, "inputs.sentences")
        texts = [inputs.source_sentence, *inputs.sentences]
        wanted = replace(
            self._exchange.begin(request, texts, model),
            task=parameters.prompt_name or None,
            truncate=parameters.wanted_truncation,
            is_normalised=True,
        )
        answer = await self._exchange.embed(request, ticket, wanted)
        # Rounding can take the cosine of equal texts past 1.
        cosines = np.clip(answer.vectors[1:] @ answer.vectors[0], -1, 1)
        return self._respond(request, answer, texts, cosines)

    async def tokenize(self, request: Request, model: str | None) -> Response:
        """Answer each text's tokens: ``[[{id, text, special, start, stop}]]``."""
        await self._exchange.admit(request)
        body = TokenizeBody.parse(parse_object(await request.body()))
        texts = listed(body.inputs)
        check_batch(len(texts), self._settings.max_inputs, "inputs")
        check_size(sum(map(len, texts)), MAX_CHARACTERS, "inputs", "characters")
        target = self._target(request, model, body.prompt_name or None)
        if body.prompt_name and target.task is not None:
            texts = [target.info.tasks[target.task] + text for text in texts]
        with self._exchange.service.vocabulary(target, "tokenize") as vocabulary:

            def split() -> bytes:
                rows = vocabulary.split(texts, add_special_tokens=body.add_special_tokens)
                return orjson.dumps([[_token(token) for token in row] for row in rows])

            return _about(target, await self._in_thread(request, split))

    async def decode(self, request: Request, model: str | None) -> Response:
        """Answer the text of each list of token ids: ``[string]``."""
        await self._exchange.admit(request)
        body = DecodeBody.parse(parse_object(await request.body()))
        rows = body.rows
        check_batch(len(rows), self._settings.max_inputs, "ids")
        check_size(sum(map(len, rows)), MAX_IDS, "ids", "token ids")
        target = self._target(request, model, None)
        with self._exchange.service.vocabulary(target, "decode") as vocabulary:

            def join() -> bytes:
                return orjson.dumps(vocabulary.join(rows, skip_special_tokens=body.skip_special_tokens))

            return _about(target, await self._in_thread(request, join))

    async def info(self, request: Request, model: str | None) -> Response:
        """Say what the model is, and what a request may have."""
        target = self._target(request, model, None)
        return _about(target, orjson.dumps(_info(target, self._settings)))

    async def _embed_as(self, request: Request, model: str | None, output: Output) -> tuple[EmbedAnswer, list[str]]:
        """Embed the texts of a request as something else than dense vectors; return the texts as well."""
        ticket = await self._exchange.admit(request)
        body = TextsBody.parse(parse_object(await request.body()))
        texts = await self._texts(request, model, body)
        wanted = replace(
            self._exchange.begin(request, texts, model),
            task=body.prompt_name or None,
            truncate=body.wanted_truncation,
            outputs=(output,),
        )
        return await self._exchange.embed(request, ticket, wanted), texts

    async def _texts(self, request: Request, model: str | None, body: TextsBody) -> list[str]:
        """Return the texts of a request; what it has as token ids of the model is decoded."""
        items = body.items
        check_batch(len(items), self._settings.max_inputs, "inputs")
        texts = [item for item in items if isinstance(item, str)]
        rows = [item for item in items if not isinstance(item, str)]
        if not rows:
            return texts
        check_size(sum(map(len, rows)), MAX_IDS, "inputs", "token ids")
        with self._exchange.service.vocabulary(self._target(request, model, None), "decode") as vocabulary:
            # Without special tokens: the model's template puts them around every text.
            join = partial(vocabulary.join, rows, skip_special_tokens=True)
            decoded, given = iter(await self._in_thread(request, join)), iter(texts)
        return [next(given) if isinstance(item, str) else next(decoded) for item in items]

    def _target(self, request: Request, model: str | None, task: str | None) -> Target:
        context = RequestContext.of(request)
        target = self._exchange.service.target(model, task, context.client.may_use)
        context.model = target.model.id
        return target

    async def _in_thread(self, request: Request, work: Callable[[], T]) -> T:
        """Do what holds a core for a while, when its turn comes.

        Raises:
            DeadlineExceeded: its turn did not come in time.
            ClientDisconnected: the client went away first.
        """
        limit_s = self._settings.request_timeout_s

        async def in_turn() -> T:
            async with self._tokenising:
                return await asyncio.to_thread(work)

        try:
            async with asyncio.timeout(limit_s):
                return await unless_disconnected(request, in_turn())
        except TimeoutError:
            raise DeadlineExceeded(f"the request was not done in {limit_s:g} s; others were before it") from None

    def _respond(self, request: Request, answer: EmbedAnswer, texts: Sequence[str], content: object) -> Response:
        def render() -> bytes:
            return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)

        describe_times = describe_work(sum(map(len, texts)), answer.num_tokens)
        return self._exchange.respond(request, answer, render, describe_times)


def _sparse(vector: SparseVector) -> list[dict[str, object]]:
    return [
        {"index": index, "value": value} for index, value in zip(vector.indices.tolist(), vector.values, strict=True)
    ]


def _token(token: Token) -> dict[str, object]:
    fields = asdict(token)
    fields["special"] = fields.pop("is_special")
    return fields


def _about(target: Target, content: bytes) -> Response:
    """Answer something about a model that is no embedding."""
    info = target.info
    headers = {"x-gateway-model": info.id}
    if info.kind is ModelKind.EMBED:
        headers["x-gateway-space"] = space_id(info, target.task, info.width, is_normalised=info.is_normalised)
    return Response(content, media_type="application/json", headers=headers)


def _model_type(info: ModelInfo) -> dict[str, object]:
    if info.kind is ModelKind.RERANK:  # it has one label, and this is what transformers calls it
        return {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    return {"embedding": {"pooling": "last_token" if info.pooling == "last" else info.pooling}}


def _info(target: Target, settings: Settings) -> dict[str, Any]:
    info = target.info
    return {
        "model_id": info.source,
        "model_sha": target.model.entry.revision,
        "model_dtype": info.dtype,
        "served_model_name": info.id,
        "model_type": _model_type(info),
        "max_concurrent_requests": settings.max_queue_texts,
        "max_input_length": info.max_tokens,
        # Where the registry says none, it depends on the device, and is never less than the longest text.
        "max_batch_tokens": target.model.entry.max_batch_tokens or info.max_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_inputs,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
