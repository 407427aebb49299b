"""Have a target score texts, against a query or for the labels of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gateway import vectors as vector_math
from gateway.errors import BadInput, UnsupportedOutput
from gateway.requests import ClassifyAnswer, ClassifyRequest, RerankAnswer, RerankRequest
from gateway.routing.router import Target
from gateway.similarity import QueryVectors
from gateway.tasks import RETRIEVAL
from gateway.types import TOKEN_BYTES, EmbedJob, ModelInfo, ModelKind, Output, Timings, Truncate

_FLOAT_BYTES = 4


async def rerank(target: Target, request: RerankRequest, job: EmbedJob) -> RerankAnswer:
    """Have a target score the texts of a request, and check the scores."""
    if target.info.kind is ModelKind.EMBED:
        return await _rerank_by_vectors(target, request, job)
    if request.score_by is not None:
        raise BadInput(
            f"`score_by` is for models that embed, and model {target.info.id!r} scores pairs of texts: leave it out",
            param="score_by",
        )
    result = await target.model.embed(
        replace(
            job,
            task=None,
            query=request.query,
            max_text_tokens=request.max_text_tokens,
            on_tokens=lambda num_tokens: request.reserve(num_tokens * TOKEN_BYTES),
        )
    )
    scores = vector_math.finish(result.vectors, (len(request.texts), 1), 1, normalize=False)
    return RerankAnswer(
        scores=scores[:, 0],
        name=target.choice.name,
        model=target.info.id,
        num_tokens=sum(result.num_tokens),
        truncated=result.truncated,
        timings=result.timings,
        assignment=target.choice.assignment,
    )


async def _rerank_by_vectors(target: Target, request: RerankRequest, job: EmbedJob) -> RerankAnswer:
    """Embed the query, then score each text by its vectors as soon as they are computed; keep no vectors."""
    info = target.info
    weights = _weights(info, request.score_by)
    query_task, text_task = (task if task in info.tasks else target.task for task in RETRIEVAL)
    outputs = frozenset(weights)
    query = await target.model.embed(
        replace(
            job,
            texts=[request.query],
            task=query_task,
            truncate=Truncate.REFUSE if request.truncate is Truncate.REFUSE else Truncate.END,
            outputs=outputs,
            text_name="query",
        )
    )
    scorer = QueryVectors(weights, query, info.is_normalized, info.is_mean_maxsim).score
    num_query_tokens = sum(query.num_tokens)
    result = await target.model.embed(
        replace(
            job,
            task=text_task,
            outputs=outputs,
            scorer=scorer,
            text_name="documents",
            max_text_tokens=request.max_text_tokens,
            on_tokens=lambda num_tokens: request.reserve(num_tokens * TOKEN_BYTES),
        )
    )
    scores = vector_math.finish(result.vectors, (len(request.texts), 1), 1, normalize=False)
    return RerankAnswer(
        scores=scores[:, 0],
        are_logits=False,
        name=target.choice.name,
        model=info.id,
        num_tokens=num_query_tokens + sum(result.num_tokens),
        truncated=range(len(request.texts)) if query.truncated else result.truncated,
        timings=_sum(query.timings, result.timings),
        assignment=target.choice.assignment,
    )


def _sum(one: Timings, other: Timings) -> Timings:
    return Timings(one.tokenize_s + other.tokenize_s, one.queue_s + other.queue_s, one.inference_s + other.inference_s)


def _weights(info: ModelInfo, asked: Mapping[Output, float] | None) -> Mapping[Output, float]:
    """Return the outputs to score by, with their weights.

    Raises:
        UnsupportedOutput: the model lacks one of the requested outputs.
    """
    if asked is None:
        return info.rerank
    if missing := [output.value for output in asked if output not in info.outputs]:
        raise UnsupportedOutput(
            f"`score_by` asks for {', '.join(missing)}, but model {info.id!r} returns only: {', '.join(info.outputs)}",
            param="score_by",
        )
    return asked


async def classify(target: Target, request: ClassifyRequest, job: EmbedJob) -> ClassifyAnswer:
    """Have a target classify the texts of a request, and check the numbers."""
    info = target.info
    num_bytes = _FLOAT_BYTES * len(request.texts) * info.width
    request.reserve(num_bytes)
    result = await target.model.embed(
        replace(
            job,
            task=None,
            firsts=request.firsts,
            on_tokens=lambda num_tokens: request.reserve(num_bytes + num_tokens * TOKEN_BYTES),
        )
    )
    return ClassifyAnswer(
        logits=vector_math.finish(result.vectors, (len(request.texts), info.width), info.width, normalize=False),
        labels=info.labels,
        function=info.label_function,
        name=target.choice.name,
        model=info.id,
        num_tokens=sum(result.num_tokens),
        truncated=result.truncated,
        timings=result.timings,
        assignment=target.choice.assignment,
    )
