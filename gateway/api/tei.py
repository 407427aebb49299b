"""The dialect of Hugging Face's text-embeddings-inference (TEI), as its release 1.9 speaks it.

At the root for the registry's default model, and under ``/tei/{model}/`` for each model: its clients send no model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from gateway.api.classify import Predictor
from gateway.api.endpoint import Endpoint
from gateway.api.json_body import Json, as_list, check_batch
from gateway.api.pieces import Parts, dumps, nested_list, value_list, vector_list
from gateway.api.rerank import Reranker, RerankPath
from gateway.api.tei_schema import (
    AboutModel,
    DecodeBody,
    EmbedBody,
    Similarity,
    TextsBody,
    TokenizeBody,
    check_characters,
    check_ids,
    describe_model,
)
from gateway.errors import MethodNotAllowed, ModelNotFound, ModelNotReady, NotFound, RequestError
from gateway.http.context import RequestContext
from gateway.requests import EmbedAnswer, EmbedRequest
from gateway.routing.names import DEFAULT_ALIAS
from gateway.routing.router import Target
from gateway.types import ModelKind, Output, SparseVector, Token

# The memory of a token, as an object and in the tokenizer.
_BYTES_PER_TOKEN = 400
# This many are written in less than a millisecond.
_FEW_TOKENS = 500
TEI_ADDRESS = "/tei/{model:path}"
"""The address of one model, for clients that cannot set a path."""
# Paths that only answer GET, where a client posts to a model's address and a path.
_ONLY_READ = ("info", "health")


class TeiDialect:
    """The handlers: one method per path, for the model that the path names and, at the root, for the default model."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._service = endpoint.service
        self._settings = endpoint.settings
        self.predict = Predictor(endpoint).predict
        self._reranker = Reranker(endpoint, RerankPath(TEI_ADDRESS, is_tei=True))

    async def compute(self, request: Request) -> Response:
        """Embed, rerank or classify, depending on the model, for clients that know only an address."""
        self._endpoint.note_name(request, _model(request))
        match self._kind(request):
            case ModelKind.EMBED:
                return await self.embed(request)
            case ModelKind.RERANK:
                return await self._reranker.rerank(request)
            case ModelKind.CLASSIFY:
                return await self.predict(request)

    async def compute_at_address(self, request: Request) -> Response:
        """Embed, rerank or classify at a model's address, unless the path only resembles one."""
        self._endpoint.note_name(request, _model(request))
        self._check_address(request, str(_model(request)))
        return await self.compute(request)

    async def health(self, request: Request, model: str) -> Response:
        """Respond 200 while the model answers requests."""
        self._endpoint.note_name(request, model)
        self._service.check_ready(model)
        if self._endpoint.deployment.is_draining:
            raise ModelNotReady("the gateway is shutting down", retry_after_s=5)
        return Response()

    async def embed(self, request: Request) -> Response:
        """Return one vector per text: ``[[float]]``."""
        return await self._endpoint.answer(
            request, EmbedBody.parse, self._ask_vectors, self._service.embed, _write_vectors
        )

    async def embed_sparse(self, request: Request) -> Response:
        """Return the weights of each text's tokens: ``[[{index, value}]]``."""
        ask = partial(self._ask, output=Output.SPARSE)
        return await self._endpoint.answer(request, TextsBody.parse, ask, self._service.embed, _write_sparse)

    async def embed_all(self, request: Request) -> Response:
        """Return the vectors of each text's tokens, before pooling: ``[[[float]]]``."""
        ask = partial(self._ask, output=Output.STATES)
        return await self._endpoint.answer(request, TextsBody.parse, ask, self._service.embed, _write_states)

    async def similarity(self, request: Request) -> Response:
        """Return the cosine of one text with each of the others: ``[float]``."""
        return await self._endpoint.answer(
            request, self._parse_similarity, self._ask_similarity, self._service.embed, _write_cosines
        )

    async def tokenize(self, request: Request) -> Response:
        """Return each text's tokens: ``[[{id, text, special, start, stop}]]``."""
        body = await self._endpoint.receive(request, TokenizeBody.parse)
        texts = as_list(body.inputs)
        check_batch(len(texts), self._settings.max_inputs, "inputs")
        check_characters(texts)
        target = self._target(request, body, body.prompt_name or None)
        if body.prompt_name and target.task is not None:
            texts = [target.info.tasks[target.task] + text for text in texts]
        num_characters = sum(map(len, texts))
        RequestContext.of(request).memory.resize(_BYTES_PER_TOKEN * num_characters)
        async with self._service.vocabulary(target, "tokenize") as vocabulary:
            split = partial(vocabulary.split, texts, add_special_tokens=body.add_special_tokens)
            rows = await self._endpoint.in_turn(request, num_characters, split, self._endpoint.tokenizing)
        return await self._answer_about(
            request, target, lambda: nested_list(value_list(map(_token, row)) for row in rows), sum(map(len, rows))
        )

    async def decode(self, request: Request) -> Response:
        """Return the text of each list of token ids: ``[string]``."""
        body = await self._endpoint.receive(request, DecodeBody.parse)
        rows = body.rows
        check_batch(len(rows), self._settings.max_inputs, "ids")
        check_ids(rows, "ids")
        target = self._target(request, body)
        num_ids = sum(map(len, rows))
        RequestContext.of(request).memory.resize(_BYTES_PER_TOKEN * num_ids)
        texts = await self._join(request, target, rows, skip_special_tokens=body.skip_special_tokens)
        return await self._answer_about(request, target, lambda: value_list(texts), num_ids)

    async def info(self, request: Request) -> Response:
        """Return the model's properties and the limits of a request."""
        target = self._target(request)
        return _model_response(target, orjson.dumps(describe_model(target, self._settings)))

    # -------------------------------------------------------------------------------------------------------- requests

    async def _ask(self, request: Request, body: TextsBody, output: Output = Output.DENSE) -> EmbedRequest:
        texts = await self._texts(request, body)
        return replace(
            self._endpoint.embed_request(request, texts, _model(request, body)),
            task=body.prompt_name or None,
            truncate=body.wanted_truncation,
            outputs=(output,),
        )

    async def _ask_vectors(self, request: Request, body: EmbedBody) -> EmbedRequest:
        embed_request = await self._ask(request, body)
        return replace(embed_request, is_normalized=body.normalize, dimensions=body.dimensions)

    def _parse_similarity(self, content: dict[str, Json]) -> Similarity:
        return Similarity.parse(content, self._settings.max_inputs)

    async def _ask_similarity(self, request: Request, parsed: Similarity) -> EmbedRequest:
        body, inputs, parameters = parsed
        texts = [inputs.source_sentence, *inputs.sentences]
        return replace(
            self._endpoint.embed_request(request, texts, _model(request, body)),
            task=parameters.prompt_name or None,
            truncate=parameters.wanted_truncation,
            is_normalized=True,
        )

    async def _texts(self, request: Request, body: TextsBody) -> list[str]:
        """Return the texts of a request, decoding those that were sent as the model's token ids."""
        items = body.items
        check_batch(len(items), self._settings.max_inputs, "inputs")
        texts = [item for item in items if isinstance(item, str)]
        rows = [item for item in items if not isinstance(item, str)]
        if not rows:
            return texts
        check_ids(rows, "inputs")
        # Without special tokens: the model's template puts them around every text.
        decoded = iter(await self._join(request, self._target(request, body), rows, skip_special_tokens=True))
        plain = iter(texts)
        return [next(plain) if isinstance(item, str) else next(decoded) for item in items]

    async def _join(
        self, request: Request, target: Target, rows: list[list[int]], *, skip_special_tokens: bool
    ) -> list[str]:
        async with self._service.vocabulary(target, "decode") as vocabulary:
            join = partial(vocabulary.join, rows, skip_special_tokens=skip_special_tokens)
            return await self._endpoint.in_turn(request, sum(map(len, rows)), join, self._endpoint.tokenizing)

    def _target(self, request: Request, body: AboutModel | None = None, task: str | None = None) -> Target:
        name = _model(request, body)
        self._endpoint.note_name(request, name)
        context = RequestContext.of(request)
        target = self._service.target(name, task, context.client)
        context.model = target.model.id
        return target

    async def _answer_about(self, request: Request, target: Target, parts: Parts, num_tokens: int) -> Response:
        """Answer with tokens of a model."""
        if num_tokens <= _FEW_TOKENS:
            return _model_response(target, b"".join(parts()))
        return await self._endpoint.stream(request, parts, _BYTES_PER_TOKEN * num_tokens, _headers_about(target))

    # ----------------------------------------------------------------------------------------------------------- names

    def _kind(self, request: Request) -> ModelKind:
        deployment, model = self._endpoint.deployment, _model(request)
        if model is None and DEFAULT_ALIAS not in deployment.registry.aliases:
            kinds = {known.info.kind for known in deployment.fleet if known.info is not None}
            return kinds.pop() if len(kinds) == 1 else ModelKind.EMBED
        info = deployment.router.choose(model, RequestContext.of(request).client).model.info
        return ModelKind.EMBED if info is None else info.kind

    def _check_address(self, request: Request, address: str) -> None:
        """Reject an address that consists of a model's name and an unknown path.

        Raises:
            NotFound: no such path.
            MethodNotAllowed: the path only answers GET.
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
        except RequestError:  # it is a name, but not of a model that can be used like this
            return True
        return True


def tei_router(endpoint: Endpoint) -> APIRouter:
    """Return the routes of the dialect except ``/rerank``, which ``api/rerank`` has."""
    router = APIRouter(tags=["TEI"])
    dialect = TeiDialect(endpoint)
    handlers = {
        "embed": dialect.embed,
        "embed_sparse": dialect.embed_sparse,
        "embed_all": dialect.embed_all,
        "predict": dialect.predict,
        "similarity": dialect.similarity,
        "tokenize": dialect.tokenize,
        "decode": dialect.decode,
        "invocations": dialect.compute,  # SageMaker's
        "info": dialect.info,
    }
    for name, handler in handlers.items():
        for path in (f"/{name}", f"{TEI_ADDRESS}/{name}"):
            router.add_api_route(path, handler, methods=["GET" if name == "info" else "POST"], include_in_schema=False)
    router.add_api_route(f"{TEI_ADDRESS}/health", dialect.health, include_in_schema=False)
    router.add_api_route("/", dialect.compute, methods=["POST"], include_in_schema=False)
    # The last, as it matches all others.
    router.add_api_route(TEI_ADDRESS, dialect.compute_at_address, methods=["POST"], include_in_schema=False)
    return router


def _model(request: Request, body: AboutModel | None = None) -> str | None:
    """Return the model that the path names or, at the root, the body; ``None`` means the registry's default."""
    name: str | None = request.path_params.get("model", body and body.model)
    return name


def _write_vectors(_request: Request, _body: EmbedBody, answer: EmbedAnswer) -> Parts:
    return lambda: vector_list(answer.vectors)


def _write_sparse(_request: Request, _body: TextsBody, answer: EmbedAnswer) -> Parts:
    return lambda: value_list(map(_sparse, answer.sparse or ()))


def _write_states(_request: Request, _body: TextsBody, answer: EmbedAnswer) -> Parts:
    return lambda: nested_list(map(vector_list, answer.states or ()))


def _write_cosines(_request: Request, _parsed: Similarity, answer: EmbedAnswer) -> Parts:
    # Rounding can push the cosine of equal texts beyond 1.
    cosines = np.clip(answer.vectors[1:] @ answer.vectors[0], -1, 1)
    return lambda: iter((dumps(cosines),))


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


def _model_response(target: Target, content: bytes) -> Response:
    """Answer a request about a model that is not for embeddings."""
    return Response(content, media_type="application/json", headers=_headers_about(target))


def _headers_about(target: Target) -> dict[str, str]:
    info = target.info
    headers = {"x-gateway-model": info.id}
    if info.kind is ModelKind.EMBED:
        headers["x-gateway-space"] = info.space(target.task)
    return headers
