"""Have one target score texts: against a query, or by the labels of a model."""

from __future__ import annotations

from gateway import vectors as vector_math
from gateway.requests import ClassifyAnswer, ClassifyRequest, Patience, RerankAnswer, RerankRequest
from gateway.routing.router import Choice, Target
from gateway.types import TOKEN_BYTES, EmbedJob

_FLOAT_BYTES = 4


async def rerank(target: Target, choice: Choice, request: RerankRequest, patience: Patience) -> RerankAnswer:
    """Have a target score the texts of a request, and check the scores."""
    result = await target.model.embed(
        EmbedJob(
            texts=request.texts,
            task=None,
            truncate=request.truncate,
            deadline=patience.deadline,
            may_wait=patience.may_wait,
            caller=request.caller,
            query=request.query,
            max_text_tokens=request.max_text_tokens,
            on_tokens=lambda num_tokens: request.reserve(num_tokens * TOKEN_BYTES),
        )
    )
    scores = vector_math.finish(result.vectors, (len(request.texts), 1), 1, normalize=False)
    return RerankAnswer(
        scores=scores[:, 0],
        name=target.name,
        model=target.info.id,
        num_tokens=sum(result.num_tokens),
        truncated=result.truncated,
        timings=result.timings,
        assignment=choice.assignment,
    )


async def classify(target: Target, choice: Choice, request: ClassifyRequest, patience: Patience) -> ClassifyAnswer:
    """Have a target classify the texts of a request, and check the numbers."""
    info = target.info
    num_bytes = _FLOAT_BYTES * len(request.texts) * info.width
    request.reserve(num_bytes)
    result = await target.model.embed(
        EmbedJob(
            texts=request.texts,
            task=None,
            truncate=request.truncate,
            deadline=patience.deadline,
            may_wait=patience.may_wait,
            caller=request.caller,
            firsts=request.firsts,
            on_tokens=lambda num_tokens: request.reserve(num_bytes + num_tokens * TOKEN_BYTES),
        )
    )
    return ClassifyAnswer(
        logits=vector_math.finish(result.vectors, (len(request.texts), info.width), info.width, normalize=False),
        labels=info.labels,
        function=info.label_function,
        name=target.name,
        model=info.id,
        num_tokens=sum(result.num_tokens),
        truncated=result.truncated,
        timings=result.timings,
        assignment=choice.assignment,
    )
