"""The dialect of Hugging Face's text-embeddings-inference (TEI), as its release 1.9 speaks it.

At the root for the registry's default model, and under ``/tei/{model}/`` for each: its clients send no model.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from gateway import __version__
from gateway.api.endpoint import Endpoint, Parts
from gateway.api.json_body import as_list, check_batch
from gateway.api.pieces import dumps, nested_list, value_list, vector_list
from gateway.api.rerank import Dialect as RerankDialect
from gateway.api.rerank import rerank_endpoint
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
    check_size,
)
from gateway.config.settings import Settings
from gateway.errors import MethodNotAllowed, ModelNotFound, ModelNotReady, NotFound, RequestError
from gateway.http.middleware import RequestContext
from gateway.http.turns import Turns
from gateway.requests import EmbedAnswer
from gateway.routing.names import DEFAULT_ALIAS
from gateway.routing.router import Target
from gateway.types import ModelInfo, ModelKind, Output, SparseVector, Token

# What a token takes as an object, and was in the tokenizer.
_BYTES_PER_TOKEN = 400
# As many as are written in less than a millisecond.
_FEW_TOKENS = 500
Handler = Callable[[Request, str | None], Awaitable[Response]]
TEI_ADDRESS = "/tei/{model:path}"
"""The address of one model, for clients that have no path."""
# Of a path that is no model's address, what may be asked with GET alone.
_ONLY_READ = ("info", "health")


def tei_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes of the dialect but ``/rerank``, which ``api/rerank`` has."""
    router = APIRouter(tags=["TEI"])
    dialect = _Dialect(endpoint)

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
    add("invocations", dialect.compute, "POST")  # SageMaker's
    add("info", dialect.info, "GET")

    async def health(model: str) -> Response:
        endpoint.service.check_ready(model)
        if endpoint.deployment.is_draining:
            raise ModelNotReady("the gateway is shutting down", retry_after_s=5)
        return Response()

    async def of_root(request: Request) -> Response:
        return await dialect.compute(request, None)

    async def of_address(request: Request, model: str) -> Response:
        dialect.check_address(request, model)
        return await dialect.compute(request, model)

    router.add_api_route("/tei/{model:path}/health", health, include_in_schema=False)
    router.add_api_route("/", of_root, methods=["POST"], include_in_schema=False)
    router.add_api_route(
        TEI_ADDRESS, of_address, methods=["POST"], include_in_schema=False
    )  # the last: it fits all others
    return router


class _Dialect:
    """One method a path. ``model`` is the public name in it, or ``None`` at the root."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._settings = endpoint.settings
        # One at a time: it takes a core, which the models need more.
        self._tokenizing = Turns("tokens")
        self._rerank = rerank_endpoint(endpoint, RerankDialect(TEI_ADDRESS, is_tei=True))

    async def compute(self, request: Request, model: str | None) -> Response:
        """Embed or rerank, as the model is: what clients ask that have nothing but an address."""
        if self._kind(request, model) is ModelKind.RERANK:
            return await self._rerank(request)
        return await self.embed(request, model)

    def _kind(self, request: Request, model: str | None) -> ModelKind:
        deployment = self._endpoint.deployment
        if model is None and DEFAULT_ALIAS not in deployment.registry.aliases:
            kinds = {one.info.kind for one in deployment.fleet if one.info is not None}
            return ModelKind.RERANK if kinds == {ModelKind.RERANK} else ModelKind.EMBED
        info = deployment.router.choose(model, RequestContext.of(request).client).model.info
        return ModelKind.EMBED if info is None else info.kind

    def check_address(self, request: Request, address: str) -> None:
        """Refuse what is behind `/tei/` and is no model's name, but a model's and a path that there is not.

        Raises:
            NotFound: no such path.
            MethodNotAllowed: the path is asked with GET.
        """
        model, _, path = address.rpartition("/")
        if not model or self._is_name(request, address) or not self._is_name(request, model):
            return
        if path in _ONLY_READ:
            raise MethodNotAllowed(f"POST is not allowed on /tei/{address}; use GET", allow="GET")
        raise NotFound(f"no such path: /tei/{address}; embeddings are at POST /tei/{model}/embed")

    def _is_name(self, request: Request, name: str) -> bool:
        try:
            self._endpoint.deployment.router.choose(name, RequestContext.of(request).client)
        except ModelNotFound:
            return False
        except RequestError:  # it is one, and not to be used like that
            return True
        return True

    async def embed(self, request: Request, model: str | None) -> Response:
        """Answer one vector a text: ``[[float]]``."""
        ticket = await self._endpoint.admit(request)
        body = await self._endpoint.read(request, EmbedBody.parse)
        texts = await self._texts(request, model, body)
        wanted = replace(
            self._endpoint.begin(request, texts, model),
            task=body.prompt_name or None,
            truncate=body.wanted_truncation,
            is_normalized=body.normalize,
            dimensions=body.dimensions,
        )
        answer = await self._endpoint.embed(request, ticket, wanted)
        return await self._respond(request, answer, texts, lambda: vector_list(answer.vectors))

    async def embed_sparse(self, request: Request, model: str | None) -> Response:
        """Answer the weights of each text's tokens: ``[[{index, value}]]``."""
        answer, texts = await self._embed_as(request, model, Output.SPARSE)
        return await self._respond(request, answer, texts, lambda: value_list(map(_sparse, answer.sparse or ())))

    async def embed_all(self, request: Request, model: str | None) -> Response:
        """Answer what is pooled to each text's vector, for each of its tokens: ``[[[float]]]``."""
        answer, texts = await self._embed_as(request, model, Output.STATES)
        return await self._respond(request, answer, texts, lambda: nested_list(map(vector_list, answer.states or ())))

    async def similarity(self, request: Request, model: str | None) -> Response:
        """Answer the cosine of one text with each of the others: ``[float]``."""
        ticket = await self._endpoint.admit(request)
        body = await self._endpoint.read(request, SimilarityBody.parse)
        inputs, parameters = SimilarityInputs.parse(body.inputs), Cutting.parse(body.parameters)
        if inputs.sentences:  # the source counts as well, as it does there
            check_batch(len(inputs.sentences) + 1, self._settings.max_inputs, "inputs.sentences")
        else:
            check_batch(0, self._settings.max_inputs, "inputs.sentences")
        texts = [inputs.source_sentence, *inputs.sentences]
        wanted = replace(
            self._endpoint.begin(request, texts, model),
            task=parameters.prompt_name or None,
            truncate=parameters.wanted_truncation,
            is_normalized=True,
        )
        answer = await self._endpoint.embed(request, ticket, wanted)
        # Rounding can take the cosine of equal texts past 1.
        cosines = np.clip(answer.vectors[1:] @ answer.vectors[0], -1, 1)
        return await self._respond(request, answer, texts, lambda: iter((dumps(cosines),)))

    async def tokenize(self, request: Request, model: str | None) -> Response:
        """Answer each text's tokens: ``[[{id, text, special, start, stop}]]``."""
        await self._endpoint.admit(request)
        body = await self._endpoint.read(request, TokenizeBody.parse)
        texts = as_list(body.inputs)
        check_batch(len(texts), self._settings.max_inputs, "inputs")
        check_size(sum(map(len, texts)), MAX_CHARACTERS, "inputs", "characters")
        target = self._target(request, model, body.prompt_name or None)
        if body.prompt_name and target.task is not None:
            texts = [target.info.tasks[target.task] + text for text in texts]
        num_characters = sum(map(len, texts))
        RequestContext.of(request).memory.resize(_BYTES_PER_TOKEN * num_characters)
        with self._endpoint.service.vocabulary(target, "tokenize") as vocabulary:
            split = partial(vocabulary.split, texts, add_special_tokens=body.add_special_tokens)
            rows = await self._endpoint.in_turn(request, num_characters, split, self._tokenizing)
        return await self._answer_about(
            request, target, lambda: nested_list(value_list(map(_token, row)) for row in rows), sum(map(len, rows))
        )

    async def decode(self, request: Request, model: str | None) -> Response:
        """Answer the text of each list of token ids: ``[string]``."""
        await self._endpoint.admit(request)
        body = await self._endpoint.read(request, DecodeBody.parse)
        rows = body.rows
        check_batch(len(rows), self._settings.max_inputs, "ids")
        check_size(sum(map(len, rows)), MAX_IDS, "ids", "token ids")
        target = self._target(request, model, None)
        num_ids = sum(map(len, rows))
        RequestContext.of(request).memory.resize(_BYTES_PER_TOKEN * num_ids)
        with self._endpoint.service.vocabulary(target, "decode") as vocabulary:
            join = partial(vocabulary.join, rows, skip_special_tokens=body.skip_special_tokens)
            texts = await self._endpoint.in_turn(request, num_ids, join, self._tokenizing)
        return await self._answer_about(request, target, lambda: value_list(texts), num_ids)

    async def info(self, request: Request, model: str | None) -> Response:
        """Say what the model is, and what a request may have."""
        target = self._target(request, model, None)
        return _about(target, orjson.dumps(_info(target, self._settings)))

    async def _embed_as(self, request: Request, model: str | None, output: Output) -> tuple[EmbedAnswer, list[str]]:
        """Embed the texts of a request as something else than dense vectors; return the texts as well."""
        ticket = await self._endpoint.admit(request)
        body = await self._endpoint.read(request, TextsBody.parse)
        texts = await self._texts(request, model, body)
        wanted = replace(
            self._endpoint.begin(request, texts, model),
            task=body.prompt_name or None,
            truncate=body.wanted_truncation,
            outputs=(output,),
        )
        return await self._endpoint.embed(request, ticket, wanted), texts

    async def _texts(self, request: Request, model: str | None, body: TextsBody) -> list[str]:
        """Return the texts of a request; what it has as token ids of the model is decoded."""
        items = body.items
        check_batch(len(items), self._settings.max_inputs, "inputs")
        texts = [item for item in items if isinstance(item, str)]
        rows = [item for item in items if not isinstance(item, str)]
        if not rows:
            return texts
        check_size(sum(map(len, rows)), MAX_IDS, "inputs", "token ids")
        num_ids = sum(map(len, rows))
        with self._endpoint.service.vocabulary(self._target(request, model, None), "decode") as vocabulary:
            # Without special tokens: the model's template puts them around every text.
            join = partial(vocabulary.join, rows, skip_special_tokens=True)
            decoded = iter(await self._endpoint.in_turn(request, num_ids, join, self._tokenizing))
        given = iter(texts)
        return [next(given) if isinstance(item, str) else next(decoded) for item in items]

    def _target(self, request: Request, model: str | None, task: str | None) -> Target:
        context = RequestContext.of(request)
        target = self._endpoint.service.target(model, task, context.client)
        context.model = target.model.id
        return target

    async def _answer_about(self, request: Request, target: Target, parts: Parts, num_tokens: int) -> Response:
        """Answer with tokens of a model."""
        if num_tokens <= _FEW_TOKENS:
            return _about(target, b"".join(parts()))
        return await self._endpoint.stream(request, parts, _BYTES_PER_TOKEN * num_tokens, _headers_about(target))

    async def _respond(self, request: Request, answer: EmbedAnswer, texts: Sequence[str], parts: Parts) -> Response:
        describe_times = describe_work(sum(map(len, texts)), answer.num_tokens)
        return await self._endpoint.respond(request, answer, parts, describe_times)


def _sparse(vector: SparseVector) -> list[dict[str, object]]:
    return [
        {"index": index, "value": value} for index, value in zip(vector.indices.tolist(), vector.values, strict=True)
    ]


def _token(token: Token) -> dict[str, object]:
    # Field by field: `asdict` takes ten times as long, and there are a quarter of a million.
    return {
        "id": token.id,
        "text": token.text,
        "special": token.is_special,
        "start": token.start,
        "stop": token.stop,
    }


def _about(target: Target, content: bytes) -> Response:
    """Answer something about a model that is no embedding."""
    return Response(content, media_type="application/json", headers=_headers_about(target))


def _headers_about(target: Target) -> dict[str, str]:
    info = target.info
    headers = {"x-gateway-model": info.id}
    if info.kind is ModelKind.EMBED:
        headers["x-gateway-space"] = info.space(target.task)
    return headers


def _model_type(info: ModelInfo) -> dict[str, object]:
    if info.kind is ModelKind.RERANK:  # it has one label, and this is what transformers calls it
        return {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    return {"embedding": {"pooling": "last_token" if info.pooling == "lasttoken" else info.pooling}}


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
