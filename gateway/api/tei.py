"""TEI (text-embeddings-inference) for its clients: the default model at the root, each under ``/tei/{model}``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from gateway import __version__
from gateway.access.quotas import Quotas
from gateway.api.exchange import answer_headers, note_answer, timeout_s, unit_attribute, unless_disconnected
from gateway.api.json_body import parse_object
from gateway.api.schema import EMBEDDINGS_HEADERS, EXPECT_SPACE, RequestBody, Responses, TeiErrorBody, responses
from gateway.api.tei_schema import (
    Similarities,
    SimilarityBody,
    SparseVectors,
    TeiEmbedBody,
    TeiInfo,
    TeiSparseBody,
    Vectors,
    texts_of,
)
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.embedding import Output, Timings, Truncate
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
from gateway.routing.router import DEFAULT_ALIAS
from gateway.service import EmbedAnswer, EmbeddingService, EmbedRequest

_ERRORS = (
    BadInput,
    ModelNotAllowed,
    ModelNotFound,
    SpaceMismatch,
    BodyTooLarge,
    Overloaded,
    ModelNotReady,
    DeadlineExceeded,
)
Endpoint = Callable[..., Awaitable[Response]]


class TeiDialect:
    """The endpoints. Each takes ``model``: the name in the path, or ``None`` for the default."""

    def __init__(self, service: EmbeddingService, deployment: Deployment, settings: Settings, quotas: Quotas) -> None:
        self._service = service
        self._deployment = deployment
        self._settings = settings
        self._quotas = quotas

    async def embed(self, request: Request, model: str | None = None) -> Response:
        """Embed one text or many, as TEI does."""
        body = TeiEmbedBody.parse(parse_object(await request.body()))
        texts = texts_of(body.inputs, "inputs", self._settings.max_inputs)
        answer = await self._ask(
            request,
            texts,
            model,
            task=body.prompt_name or None,
            truncate=body.wanted_truncation,
            is_normalised=body.normalize is not False,
            dimensions=body.dimensions,
        )
        return _respond(request, answer, texts, answer.vectors)

    async def embed_sparse(self, request: Request, model: str | None = None) -> Response:
        """Return the token weights of one text or many, as TEI does."""
        body = TeiSparseBody.parse(parse_object(await request.body()))
        texts = texts_of(body.inputs, "inputs", self._settings.max_inputs)
        answer = await self._ask(
            request,
            texts,
            model,
            task=body.prompt_name or None,
            truncate=body.wanted_truncation,
            outputs=(Output.SPARSE,),
        )
        rows = [
            [{"index": index, "value": value} for index, value in zip(row.indices.tolist(), row.values, strict=True)]
            for row in answer.sparse or ()
        ]
        return _respond(request, answer, texts, rows)

    async def similarity(self, request: Request, model: str | None = None) -> Response:
        """Return the cosine of one sentence with each of others, as TEI does."""
        body = SimilarityBody.parse(parse_object(await request.body()))
        texts = body.sentences(self._settings.max_inputs)
        wanted = body.wanted()
        answer = await self._ask(
            request,
            texts,
            model,
            task=wanted.prompt_name or None,
            truncate=wanted.wanted_truncation,
            is_normalised=True,
        )
        return _respond(request, answer, texts, answer.vectors[1:] @ answer.vectors[0])

    async def info(self, request: Request, model: str | None = None) -> Response:
        """Say what a model is, as TEI does."""
        found, _task = self._deployment.router.find(model or DEFAULT_ALIAS)
        names = (found.id, *self._deployment.registry.aliases_of(found.id))
        if not RequestContext.of(request).client.may_use(*names):
            raise ModelNotAllowed(f"this API key is not for model {found.id!r}", param="model")
        if found.info is None:
            raise ModelNotReady(f"model {found.id!r} is {found.state.value}", retry_after_s=5)
        info, entry = found.info, found.entry
        content = TeiInfo(
            model_id=info.source,
            model_sha=info.revision,
            model_dtype=info.dtype,
            served_model_name=info.id,
            model_type={"embedding": {"pooling": info.pooling}} if info.kind == "embed" else {"reranker": {}},
            max_concurrent_requests=self._settings.max_queue_texts,
            max_input_length=info.max_tokens,
            max_batch_tokens=entry.max_batch_tokens or info.max_tokens,
            max_batch_requests=None,
            max_client_batch_size=self._settings.max_inputs,
            auto_truncate=True,
            tokenization_workers=1,
            version=__version__,
            sha=None,
            docker_label=None,
        )
        return Response(content.model_dump_json(), media_type="application/json")

    async def health(self, model: str) -> Response:
        """Answer 200 if the model does."""
        found, _task = self._deployment.router.find(model)
        if found.state != "ready":
            raise ModelNotReady(f"model {found.id!r} is {found.state.value}: {found.reason}", retry_after_s=5)
        return Response()

    async def _ask(
        self,
        request: Request,
        texts: Sequence[str],
        model: str | None,
        *,
        task: str | None,
        truncate: Truncate,
        outputs: Sequence[Output] = (Output.DENSE,),
        is_normalised: bool | None = None,
        dimensions: int | None = None,
    ) -> EmbedAnswer:
        """Have the texts embedded, as every dialect does."""
        context = RequestContext.of(request)
        ticket = await self._quotas.admit(context.client, context.headers)
        wanted = EmbedRequest(
            texts=texts,
            model=model,
            timeout_s=timeout_s(request, self._settings.request_timeout_s),
            caller=context.caller,
            task=task,
            dimensions=dimensions,
            is_normalised=is_normalised,
            truncate=truncate,
            outputs=outputs,
            expect_space=request.headers.get("x-gateway-expect-space"),
            attribute=unit_attribute(request, None),
            may_use=context.client.may_use,
        )
        async with self._quotas.reserve(ticket, texts, self._deployment.fleet.max_tokens):
            answer = await unless_disconnected(request, self._service.embed(wanted))
            await self._quotas.charge(ticket, answer.num_tokens)
        return answer


def tei_router(service: EmbeddingService, deployment: Deployment, settings: Settings, quotas: Quotas) -> APIRouter:
    """Return the routes, at the root and for each model."""
    router = APIRouter(tags=["TEI"])
    dialect = TeiDialect(service, deployment, settings, quotas)
    posts: tuple[tuple[str, Endpoint, type[RequestBody], Responses], ...] = (
        ("/embed", dialect.embed, TeiEmbedBody, _responses(Vectors)),
        ("/embed_sparse", dialect.embed_sparse, TeiSparseBody, _responses(SparseVectors)),
        ("/similarity", dialect.similarity, SimilarityBody, _responses(Similarities)),
    )
    for prefix in ("", "/tei/{model:path}"):
        for path, endpoint, body, answers in posts:
            schema = {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}
            router.add_api_route(
                f"{prefix}{path}",
                endpoint if prefix else _for_default(endpoint),
                methods=["POST"],
                responses=answers,
                openapi_extra={"parameters": [EXPECT_SPACE], "requestBody": schema},
            )
        router.add_api_route(
            f"{prefix}/info",
            dialect.info if prefix else _for_default(dialect.info),
            responses=responses(
                TeiInfo, BadInput, ModelNotAllowed, ModelNotFound, ModelNotReady, error_body=TeiErrorBody
            ),
        )
    router.add_api_route("/tei/{model:path}/health", dialect.health, include_in_schema=False)
    return router


def _for_default(endpoint: Endpoint) -> Endpoint:
    """Return an endpoint without a model in its path; otherwise ``?model=`` would be one."""

    async def of_default(request: Request) -> Response:
        return await endpoint(request)

    of_default.__doc__ = endpoint.__doc__
    of_default.__name__ = endpoint.__name__
    return of_default


def _responses(model: Any) -> Responses:
    return responses(model, *_ERRORS, headers=EMBEDDINGS_HEADERS, error_body=TeiErrorBody)


def _respond(request: Request, answer: EmbedAnswer, texts: Sequence[str], content: object) -> Response:
    """Write an answer, with TEI's headers beside the gateway's own."""
    context = RequestContext.of(request)
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    timings = answer.timings
    note_answer(context, answer, timings)
    headers = answer_headers(answer, timings, context.elapsed_s)
    headers |= _tei_headers(answer, texts, timings, context.elapsed_s)
    return Response(body, media_type="application/json", headers=headers)


def _tei_headers(answer: EmbedAnswer, texts: Sequence[str], timings: Timings, elapsed_s: float) -> dict[str, str]:
    """Return what TEI says of an answer; times are whole milliseconds."""
    seconds = {
        "total": elapsed_s,
        "tokenization": timings.tokenise_s,
        "queue": timings.queue_s,
        "inference": timings.inference_s,
    }
    return {
        "x-compute-characters": str(sum(map(len, texts))),
        "x-compute-tokens": str(answer.num_tokens),
        **{f"x-{name}-time": str(round(1000 * value)) for name, value in seconds.items()},
    }
