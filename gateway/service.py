"""Embed texts by a model's public name. Knows no HTTP and no YAML."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from gateway import vectors as vector_math
from gateway.embedding import EmbedJob, MultiVector, Output, SparseVector, Timings, Truncate, Vectors
from gateway.errors import BadInput, SpaceMismatch, UnsupportedDimensions
from gateway.routing.router import Router, Target
from gateway.routing.spaces import is_same_space, space_id
from gateway.telemetry import metrics


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A request for embeddings, in the gateway's own terms.

    Attributes:
        model: public name, or ``None`` for the registry's default.
        task: task by any of its names, or ``None`` for the model's default.
        dimensions: wanted size, or ``None`` for the model's own.
        is_normalised: ``None`` for what the model does by itself.
        expect_space: the space that the vectors must be in, if the caller says.
        timeout_s: seconds after which the caller no longer waits.
        caller: whom the work is for.
    """

    texts: Sequence[str]
    model: str | None
    timeout_s: float
    caller: str
    task: str | None = None
    dimensions: int | None = None
    is_normalised: bool | None = None
    truncate: Truncate = Truncate.END
    outputs: Sequence[Output] = (Output.DENSE,)
    is_late_chunked: bool = False
    expect_space: str | None = None


@dataclass(frozen=True, slots=True)
class EmbedAnswer:
    """Finished vectors, and what they are.

    Attributes:
        vectors: ``(n, d)`` float32, checked, cut and normalised, in input order.
        name: what to say in ``model``.
        model: id of the model that answered.
        truncated: indices of the texts that were cut.
        num_tokens: tokens of all texts together, after truncation.
        has_dense: whether dense vectors were asked for.
    """

    vectors: Vectors
    name: str
    model: str
    task: str | None
    space: str
    num_tokens: int
    truncated: Sequence[int]
    timings: Timings
    has_dense: bool = True
    sparse: Sequence[SparseVector] | None = None
    multivectors: Sequence[MultiVector] | None = None


class EmbeddingService:
    """Turns texts into vectors: resolve, check, embed, finish."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        """Embed the texts of a request.

        Raises:
            RequestError: the request cannot be answered; one of the classes in ``gateway.errors``.
        """
        target = self._router.resolve(request.model, request.task)
        info = target.info
        dimensions = _dimensions(target, request.dimensions)
        is_normalised = info.is_normalised if request.is_normalised is None else request.is_normalised
        _check_outputs(target, request)
        space = space_id(info, target.task, dimensions, is_normalised=is_normalised)
        if request.expect_space is not None and not is_same_space(request.expect_space, space):
            raise SpaceMismatch(
                f"the vectors would be in space {space}, and the request expects {request.expect_space}: they could not "
                "be compared with the stored ones"
            )
        result = await target.backend.embed(
            EmbedJob(
                texts=request.texts,
                task=target.task,
                truncate=request.truncate,
                deadline=time.monotonic() + request.timeout_s,
                caller=request.caller,
                outputs=frozenset(request.outputs),
                is_late_chunked=request.is_late_chunked,
            )
        )
        vector_math.require_finite(result.sparse or (), result.multivectors or ())
        num_tokens = sum(result.num_tokens)
        _record(info.id, len(request.texts), num_tokens, len(result.truncated), result.timings)
        return EmbedAnswer(
            vectors=vector_math.finish(
                result.vectors, (len(request.texts), info.width), dimensions, normalise=is_normalised
            ),
            name=target.name,
            model=info.id,
            task=target.task,
            space=space,
            num_tokens=num_tokens,
            truncated=result.truncated,
            timings=result.timings,
            has_dense=Output.DENSE in request.outputs,
            sparse=result.sparse,
            multivectors=result.multivectors,
        )


def _dimensions(target: Target, wanted: int | None) -> int:
    info = target.info
    if wanted is None:
        return info.width
    if wanted not in info.dimensions:
        sizes = ", ".join(str(size) for size in info.dimensions)
        raise UnsupportedDimensions(
            f"`dimensions` is {wanted}, but model {info.id!r} returns vectors of {sizes} dimensions. With Mem0, set both "
            f"`embedder.config.embedding_dims` and `vector_store.config.embedding_model_dims` to {info.width}",
            param="dimensions",
        )
    return wanted


def _check_outputs(target: Target, request: EmbedRequest) -> None:
    info = target.info
    missing = [output.value for output in request.outputs if output not in info.outputs]
    if missing:
        raise BadInput(
            f"`outputs` asks for {', '.join(missing)}, but model {info.id!r} returns only: {', '.join(info.outputs)}",
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
        raise BadInput("`late_chunking` gives dense vectors only: leave `outputs` out", param="outputs")


def _record(model: str, num_texts: int, num_tokens: int, num_truncated: int, timings: Timings) -> None:
    metrics.TEXTS.labels(model).inc(num_texts)
    metrics.TOKENS.labels(model).inc(num_tokens)
    metrics.TRUNCATED.labels(model).inc(num_truncated)
    for stage, seconds in (
        ("tokenise", timings.tokenise_s),
        ("queue", timings.queue_s),
        ("inference", timings.inference_s),
    ):
        metrics.STAGE_SECONDS.labels(model, stage).observe(seconds)
