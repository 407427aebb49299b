"""Embed, score or classify texts with a model, chosen by its public name. Independent of HTTP and YAML."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import TypeAlias, TypeVar

from gateway import scoring
from gateway import vectors as vector_math
from gateway.config.capture import QUERY_TASK
from gateway.config.wording import cut
from gateway.deployment import Deployment
from gateway.errors import (
    BadInput,
    InferenceFailed,
    ModelNotReady,
    OutOfMemory,
    SpaceMismatch,
    UnsupportedDimensions,
    UnsupportedOutput,
)
from gateway.experiments.stats import ExperimentStats
from gateway.observation import Observer, observe_tokenizer
from gateway.precision import CALIBRATED, Precision
from gateway.requests import (
    Answer,
    ClassifyAnswer,
    ClassifyRequest,
    EmbedAnswer,
    EmbedRequest,
    Request,
    RerankAnswer,
    RerankRequest,
)
from gateway.routing.names import GATEWAY, Client
from gateway.routing.router import Choice, Router, Target
from gateway.routing.spaces import is_same_space
from gateway.telemetry import metrics
from gateway.types import PER_TOKEN, TOKEN_BYTES, EmbedJob, ModelInfo, ModelState, Output, Vocabulary

_FLOAT_BYTES = 4
# Finishing holds three copies of the dense vectors: as computed, cut, and normalized.
_DENSE_COPIES = 3
_BY_DEFAULT = " (as a request without it does)"
# An upper limit for trained sparse encoders, which give a text some hundreds of weights; a vocabulary has 250,000.
_USUAL_WEIGHTS = 4096
# An index of 8 bytes, a weight of 4.
_SPARSE_BYTES = 12
R = TypeVar("R", bound=Request)
A = TypeVar("A", bound=Answer)

Compute: TypeAlias = Callable[[Target, R, EmbedJob], Awaitable[A]]
"""Has a target compute the answer to a request, with a job that has the request's texts."""


class EmbeddingService:
    """Turns texts into vectors or scores: choose a model, check, compute, finish."""

    def __init__(self, deployment: Deployment, stats: ExperimentStats) -> None:
        self._deployment = deployment
        self._observer = Observer(stats, deployment.traffic)

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        """Embed the texts of a request.

        Raises:
            RequestError: the request cannot be answered; one of the classes in ``gateway.errors``.
        """
        shadows = self._deployment.shadows  # now, because a reload may replace them while this request is answered
        choice, answer = await self._answer(request, _embed)
        shadows.offer(choice, request.texts, request.task, request.truncate, request.timeout_s, request.priority)
        self._capture(choice, request, request.texts, request.task)
        return answer

    async def rerank(self, request: RerankRequest) -> RerankAnswer:
        """Score the texts of a request against its query.

        Raises:
            RequestError: the request cannot be answered; one of the classes in ``gateway.errors``.
        """
        choice, answer = await self._answer(request, scoring.rerank)
        self._capture(choice, request, [request.query], QUERY_TASK)
        return answer

    async def classify(self, request: ClassifyRequest) -> ClassifyAnswer:
        """Score the labels of the texts of a request.

        Raises:
            RequestError: the request cannot be answered; one of the classes in ``gateway.errors``.
        """
        _choice, answer = await self._answer(request, scoring.classify)
        return answer

    async def _answer(self, request: R, compute: Compute[R, A]) -> tuple[Choice, A]:
        """Choose the model, have it compute the answer, and record the result."""
        router = self._deployment.router
        choice = router.choose_for(request.kind, request.model, request.client, request.unit_source)
        return choice, await self._observer.observe(choice, request, _try_targets(router, choice, request, compute))

    def _capture(self, choice: Choice, request: Request, texts: Sequence[str], task: str | None) -> None:
        """Keep a sample of the texts, if the registry captures this name."""
        if (captures := self._deployment.captures) is not None:
            captures.offer(choice, texts, task, request.unit_source)

    def target(self, model: str | None, task: str | None, client: Client) -> Target:
        """Resolve a name to a ready target, for anything other than embedding.

        Args:
            model: public name, or ``None`` for the registry's default.
            task: the task, by any of its names; ``None`` for the model's default.
            client: the sender, who may use some names.

        Raises:
            BadInput: the name is that of an experiment between spaces, so it does not mean a single model.
            RequestError: no model has the name, the client may not use it, or it is not ready.
        """
        router = self._deployment.router
        choice = router.choose(model, client)
        if choice.experiment is not None and choice.experiment.kind == "cross_space":
            arms = ", ".join(f"{arm.label} (model {arm.model!r})" for arm in choice.experiment.arms)
            raise BadInput(
                f"{choice.asked!r} is an experiment between spaces, whose models have different tokens and limits. Name a "
                f"model; the arms are: {arms}",
                param="model",
            )
        return router.targets(choice, task)[0]

    def check_ready(self, model: str) -> None:
        """Check that requests under a name can be answered; for an experiment, in each of its arms.

        Raises:
            RequestError: no model has the name, or a model that it leads to is not ready.
        """
        router = self._deployment.router
        choice = router.choose(model, GATEWAY)
        if choice.experiment is None:
            router.targets(choice, None)
            return
        for arm, arm_model, task in router.arms(choice):
            if arm.weight or arm is choice.experiment.control:
                router.targets(Choice(arm_model, task, asked=arm.model, name=arm.model), None)

    @asynccontextmanager
    async def vocabulary(self, target: Target, operation: str) -> AsyncIterator[Vocabulary]:
        """Yield the vocabulary of a target's model, keep the model running until the context ends, and count the use.

        Args:
            operation: ``tokenize`` or ``decode``.

        Raises:
            ModelNotReady: the model is not loaded.
            UnsupportedOutput: the model runs elsewhere, and its vocabulary is not known here.
        """
        with observe_tokenizer(target.model.id, operation):
            async with target.model.vocabulary() as vocabulary:
                yield vocabulary


async def _try_targets(router: Router, choice: Choice, request: R, compute: Compute[R, A]) -> A:
    """Answer a request with the first target, or with the next one if it fails. All targets are in one space."""
    targets = router.targets(choice, request.task)
    deadline = time.monotonic() + request.timeout_s
    with ExitStack() as in_use:
        # Hold all targets, so that a reload does not stop one before its turn comes.
        for target in targets:
            in_use.enter_context(target.model.in_use())
        for target, alternative in zip_longest(targets, targets[1:]):
            job = EmbedJob(
                texts=request.texts,
                task=target.task,
                truncate=request.truncate,
                deadline=deadline,
                caller=request.caller,
                priority=request.priority,
                may_wait=alternative is None or alternative.model.state is not ModelState.READY,
            )
            try:
                return await compute(target, request, job)
            except (ModelNotReady, InferenceFailed, OutOfMemory) as error:
                if alternative is None:
                    raise
                metrics.FALLBACKS.labels(target.model.id, alternative.model.id, error.code).inc()
    raise AssertionError("there is always a target")


async def _embed(target: Target, request: EmbedRequest, job: EmbedJob) -> EmbedAnswer:
    """Check that a target can do what a request asks for, have it embed the texts, and finish the vectors."""
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
        request.reserve(max(texts_bytes, _SPARSE_BYTES * sum(len(one.indices) for one in result.sparse or ())))
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
                f"GET /v1/experiments/{choice.assignment.experiment}/assignment which collection belongs to it"
            )
        raise SpaceMismatch(  # a header can have 64 KiB
            f"the vectors would be in space {space}, but the request expects {cut(expected)}: they could not be compared "
            f"with the stored ones{advice}"
        )


def _text_bytes(info: ModelInfo, outputs: frozenset[Output]) -> int:
    """Return the bytes of output per text, whatever its length."""
    num_weights = min(info.max_weights, _USUAL_WEIGHTS) if Output.SPARSE in outputs else 0
    return _DENSE_COPIES * _FLOAT_BYTES * info.width + _SPARSE_BYTES * num_weights


def _output_bytes(info: ModelInfo, outputs: frozenset[Output]) -> int:
    """Return the most bytes of output per token."""
    numbers = {Output.MULTIVECTOR: info.token_width, Output.STATES: info.width}
    num_bytes = _FLOAT_BYTES * sum(numbers[output] for output in outputs & PER_TOKEN)
    return num_bytes + (_SPARSE_BYTES if Output.SPARSE in outputs and not info.max_weights else 0)


def _dimensions(info: ModelInfo, dimensions: int | None) -> int:
    if dimensions is None:
        return info.width
    if not info.dimensions:
        raise UnsupportedDimensions(
            f"`dimensions` is {dimensions}, but model {info.id!r} has no dense vectors, whose size it is",
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
            "measured on vectors as they are by default: leave it out",
            param="normalized",
        )


def _check_outputs(info: ModelInfo, request: EmbedRequest) -> None:
    if Output.STATES in request.outputs and not info.dimensions:
        raise UnsupportedOutput(f"model {info.id!r} pools no token states; it returns: {', '.join(info.outputs)}")
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
