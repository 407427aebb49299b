"""Have one target compute the answer to a request: check the options, embed or score the texts, check the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gateway import vectors as vector_math
from gateway.config.wording import cut
from gateway.errors import BadInput, SpaceMismatch, UnsupportedDimensions, UnsupportedOutput
from gateway.precision import CALIBRATED, Precision
from gateway.requests import (
    ClassifyAnswer,
    ClassifyRequest,
    EmbedAnswer,
    EmbedRequest,
    RerankAnswer,
    RerankRequest,
)
from gateway.routing.router import Choice, Target
from gateway.routing.spaces import is_same_space
from gateway.similarity import QueryVectors
from gateway.tasks import RETRIEVAL
from gateway.types import PER_TOKEN, TOKEN_BYTES, EmbedJob, ModelInfo, ModelKind, Output, Timings, Truncate

_FLOAT_BYTES = 4
# Finishing holds three copies of the dense vectors: as computed, cut, and normalized.
_DENSE_COPIES = 3
_BY_DEFAULT = " (as a request without it does)"
# An upper limit for trained sparse encoders, which give a text some hundreds of weights; a vocabulary has 250,000.
_USUAL_WEIGHTS = 4096
# An index of 8 bytes, a weight of 4.
_SPARSE_BYTES = 12


async def embed(target: Target, request: EmbedRequest, job: EmbedJob) -> EmbedAnswer:
    """Check that a target supports the options of a request, have it embed the texts, and finish the vectors."""
    info = target.info
    _check_outputs(info, request)
    dimensions = _dimensions(info, request.dimensions)
    is_normalized = info.is_normalized if request.is_normalized is None else request.is_normalized
    if not is_normalized and not info.has_raw:
        raise BadInput(
            f"`normalized` is false, but the server that runs model {info.id!r} returns normalized vectors only",
            param="normalized",
        )
    outputs = frozenset(request.outputs)
    output = Output.STATES if Output.STATES in outputs else Output.DENSE
    _check_precision(info, request.precision, is_normalized=is_normalized)
    precision = request.precision
    space = info.space(target.task, dimensions, is_normalized=is_normalized, output=output, precision=precision)
    _check_space(space, request.expect_space, target.choice)
    texts_bytes = len(request.texts) * _text_bytes(info, outputs)
    token_bytes = TOKEN_BYTES + _output_bytes(info, outputs)
    request.reserve(texts_bytes)
    result = await target.model.embed(
        replace(
            job,
            outputs=outputs,
            is_late_chunked=request.is_late_chunked,
            max_total_tokens=request.max_token_vectors if outputs & PER_TOKEN else None,
            on_tokens=lambda num_tokens: request.reserve(texts_bytes + num_tokens * token_bytes),
        )
    )
    if info.max_weights > _USUAL_WEIGHTS:
        request.reserve(max(texts_bytes, _SPARSE_BYTES * sum(len(weights.indices) for weights in result.sparse or ())))
    vector_math.require_finite(result.sparse or (), result.multivectors or (), result.states or ())
    shape = (len(request.texts), info.width)
    vectors = vector_math.finish(result.vectors, shape, dimensions, normalize=is_normalized and info.width > 0)
    return EmbedAnswer(
        vectors=vectors,
        precision=precision,
        ranges=info.ranges.get(dimensions),
        name=target.choice.name,
        model=info.id,
        task=target.task,
        space=space,
        num_tokens=sum(result.num_tokens),
        truncated=result.truncated,
        timings=result.timings,
        has_dense=Output.DENSE in outputs,
        sparse=result.sparse,
        multivectors=result.multivectors,
        states=result.states,
        num_cached=result.num_cached,
        assignment=target.choice.assignment,
    )


def _check_space(space: str, sent: str | None, choice: Choice) -> None:
    """Compare the space of the vectors with the header x-gateway-expect-space, and with the hash in the name.

    Raises:
        SpaceMismatch: they differ.
    """
    for expected in (sent, choice.space):
        if expected is None or is_same_space(expected, space):
            continue
        advice = ""
        if choice.assignment is not None:
            advice = (
                f". The request is in arm {choice.assignment.arm.label!r} of the experiment now: ask "
                f"GET /v1/experiments/{choice.assignment.experiment}/assignment for the collection that belongs to it"
            )
        raise SpaceMismatch(  # a header can have 64 KiB
            f"the vectors would be in space {space}, but the request expects {cut(expected)}: they could not be compared "
            f"with the stored ones{advice}"
        )


def _text_bytes(info: ModelInfo, outputs: frozenset[Output]) -> int:
    """Return the bytes of output per text of any length."""
    num_weights = min(info.max_weights, _USUAL_WEIGHTS) if Output.SPARSE in outputs else 0
    return _DENSE_COPIES * _FLOAT_BYTES * info.width + _SPARSE_BYTES * num_weights


def _output_bytes(info: ModelInfo, outputs: frozenset[Output]) -> int:
    """Return the maximum number of bytes of output per token."""
    numbers = {Output.MULTIVECTOR: info.token_width, Output.STATES: info.width}
    num_bytes = _FLOAT_BYTES * sum(numbers[output] for output in outputs & PER_TOKEN)
    return num_bytes + (_SPARSE_BYTES if Output.SPARSE in outputs and not info.max_weights else 0)


def _dimensions(info: ModelInfo, dimensions: int | None) -> int:
    if dimensions is None:
        return info.width
    if not info.dimensions:
        raise UnsupportedDimensions(
            f"`dimensions` is {dimensions}, which sets the size of dense vectors, but model {info.id!r} has none",
            param="dimensions",
        )
    if dimensions not in info.dimensions:
        sizes = ", ".join(str(size) for size in info.dimensions)
        raise UnsupportedDimensions(
            f"`dimensions` is {dimensions}, but model {info.id!r} returns vectors of {sizes} dimensions. With Mem0, set "
            f"both `embedder.config.embedding_dims` and `vector_store.config.embedding_model_dims` to {info.width}",
            param="dimensions",
        )
    return dimensions


def _check_precision(info: ModelInfo, precision: Precision, *, is_normalized: bool) -> None:
    if precision not in CALIBRATED:
        return
    if not info.ranges:
        raise BadInput(
            f"{precision.value} vectors need the range of each dimension, and model {info.id!r} has no ranges: set "
            f"`ranges: ranges/{info.id}.json` on it in models.yaml, and run `gateway calibrate {info.id} --texts FILE` with "
            "texts like yours",
            param="encoding_format",
        )
    if is_normalized != info.is_normalized:
        raise BadInput(
            f"`normalized` is {str(is_normalized).lower()}, but the ranges of model {info.id!r} for {precision.value} were "
            "measured on vectors with the default: leave `normalized` out",
            param="normalized",
        )


def _check_outputs(info: ModelInfo, request: EmbedRequest) -> None:
    if Output.STATES in request.outputs and not info.dimensions:
        raise UnsupportedOutput(f"model {info.id!r} has no token states; it returns: {', '.join(info.outputs)}")
    if Output.STATES in request.outputs and not info.has_states:
        raise UnsupportedOutput(
            f"model {info.id!r} runs on another server, which does not return un-pooled token vectors"
        )
    missing = [output.value for output in request.outputs if output not in (*info.outputs, Output.STATES)]
    if missing:
        raise UnsupportedOutput(
            f"`outputs` asks for {', '.join(missing)}{_BY_DEFAULT if missing == ['dense'] else ''}, but model {info.id!r} "
            f"returns only: {', '.join(info.outputs)}",
            param="outputs",
        )
    if not request.is_late_chunked:
        return
    if not info.can_chunk_late:
        raise BadInput(
            f"`late_chunking` is not supported by model {info.id!r}: it needs the mean over token states",
            param="late_chunking",
        )
    if set(request.outputs) != {Output.DENSE}:
        raise BadInput("`late_chunking` returns dense vectors only: remove `outputs`", param="outputs")


# --------------------------------------------------------------------------------------------------------------- scores


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
    _check_space(info.space(target.task), None, target.choice)
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


def _weights(info: ModelInfo, requested: Mapping[Output, float] | None) -> Mapping[Output, float]:
    """Return the outputs to score by, with their weights.

    Raises:
        UnsupportedOutput: the model lacks one of the requested outputs.
    """
    if requested is None:
        return info.rerank
    if missing := [output.value for output in requested if output not in info.outputs]:
        raise UnsupportedOutput(
            f"`score_by` asks for {', '.join(missing)}, but model {info.id!r} returns only: {', '.join(info.outputs)}",
            param="score_by",
        )
    return requested


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
