"""Embed texts, or score them against a query, by a model's public name. Knows no HTTP and no YAML."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

from gateway import vectors as vector_math
from gateway.deployment import Deployment
from gateway.errors import (
    BadInput,
    ClientDisconnected,
    InferenceFailed,
    InternalError,
    ModelNotReady,
    OutOfMemory,
    RequestError,
    SpaceMismatch,
    UnsupportedDimensions,
    UnsupportedOutput,
)
from gateway.experiments.split import Assignment, UnitSource, no_unit_source
from gateway.experiments.stats import ExperimentStats, RequestRecord
from gateway.reranking import RerankAnswer, RerankRequest, check_kind, choose_reranker, score_on
from gateway.routing.names import GATEWAY, Client
from gateway.routing.router import Choice, Router, Target
from gateway.routing.spaces import is_same_space
from gateway.telemetry import metrics, semconv, tracing
from gateway.types import (
    PER_TOKEN,
    TOKEN_BYTES,
    EmbedJob,
    ModelInfo,
    ModelKind,
    MultiVector,
    Output,
    SparseVector,
    States,
    Timings,
    Truncate,
    Vectors,
    Vocabulary,
    canonical_task,
)

_FLOAT_BYTES = 4
# Dense vectors are there three times while they are finished: as they were computed, cut, and normalized.
_DENSE_COPIES = 3
# An index of 8 bytes, a weight of 4.
_SPARSE_BYTES = 12
# How much a message quotes of what a client sent.
_MAX_SHOWN = 100
R = TypeVar("R", "EmbedRequest", RerankRequest)
A = TypeVar("A", "EmbedAnswer", RerankAnswer)


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A request for embeddings, in the gateway's own terms.

    Attributes:
        model: public name, or ``None`` for the registry's default.
        task: task by any of its names, or ``None`` for the model's default.
        dimensions: wanted size, or ``None`` for the model's own.
        is_normalized: ``None`` for what the model does by itself.
        expect_space: the space that the vectors must be in, if the caller says.
        timeout_s: seconds after which the caller no longer waits.
        caller: whom the work is for.
        client: the sender, who may use some names.
        encoding: how the caller wants to have the vectors written, for the trace.
        unit_source: looks up the values that an experiment can make a unit from.
        max_token_vectors: how many tokens the texts may have together, if the answer has a vector of each.
        reserve: told how many bytes the work and its answer need, before they do, and again when more is known; refuses
            with a :class:`RequestError` what there is no room for.
    """

    texts: Sequence[str]
    model: str | None
    timeout_s: float
    caller: str
    client: Client
    task: str | None = None
    dimensions: int | None = None
    is_normalized: bool | None = None
    truncate: Truncate = Truncate.END
    outputs: Sequence[Output] = (Output.DENSE,)
    is_late_chunked: bool = False
    expect_space: str | None = None
    encoding: str | None = None
    unit_source: UnitSource = no_unit_source
    max_token_vectors: int | None = None
    reserve: Callable[[int], None] = lambda _num_bytes: None


@dataclass(frozen=True, slots=True)
class EmbedAnswer:
    """Finished vectors, and what they are.

    Attributes:
        vectors: ``(n, d)`` float32, checked, cut and normalized, in input order.
        name: what to say in ``model``.
        model: id of the model that answered.
        truncated: indices of the texts that were cut.
        num_tokens: tokens of all texts together, after truncation.
        has_dense: whether dense vectors were asked for.
        assignment: the arm that the request was in, if it asked for an experiment.
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
    states: Sequence[States] | None = None
    assignment: Assignment | None = None

    @property
    def num_texts(self) -> int:
        return len(self.vectors)

    @property
    def num_bytes(self) -> int:
        """The memory that the arrays take."""
        arrays = (self.vectors, *(self.multivectors or ()), *(self.states or ()))
        sparse = sum(one.indices.nbytes + one.values.nbytes for one in self.sparse or ())
        return sparse + sum(array.nbytes for array in arrays)


class EmbeddingService:
    """Turns texts into vectors or scores: choose, check, compute, finish; and notes what came of it."""

    def __init__(self, deployment: Deployment, stats: ExperimentStats) -> None:
        self._deployment = deployment
        self._stats = stats

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        """Embed the texts of a request.

        Raises:
            RequestError: the request cannot be answered; one of the classes in ``gateway.errors``.
        """
        # Both of one moment: a reload may exchange them while this request is answered.
        router, shadows = self._deployment.router, self._deployment.shadows
        choice = router.choose(request.model, request.client, request.unit_source)
        check_kind(router, choice, ModelKind.EMBED, request.client)
        with _embeddings_span(choice, request) as span:
            answer = await self._answer_on_record(router, choice, request, _embed_on)
            if span is not None:
                _describe(span, answer, answer.vectors.shape[1] if answer.has_dense else None)
        shadows.offer(choice, request.texts, request.task, request.truncate, request.timeout_s)
        return answer

    async def rerank(self, request: RerankRequest) -> RerankAnswer:
        """Score the texts of a request against its query.

        Raises:
            RequestError: the request cannot be answered; one of the classes in ``gateway.errors``.
        """
        router, fleet = self._deployment.router, self._deployment.fleet
        choice = choose_reranker(router, fleet, request)
        check_kind(router, choice, ModelKind.RERANK, request.client)
        with _embeddings_span(choice, request) as span:
            answer = await self._answer_on_record(router, choice, request, score_on)
            if span is not None:
                _describe(span, answer, None)
        return answer

    def target(self, model: str | None, task: str | None, client: Client) -> Target:
        """Resolve a name to a ready target, for anything other than embedding.

        Args:
            model: public name, or ``None`` for the registry's default.
            task: task by any of its names, or ``None`` for the model's default.
            client: the sender, who may use some names.

        Raises:
            BadInput: an experiment between spaces has that name; no one model is what it stands for.
            RequestError: there is none, it is not ready, or it is not for the caller.
        """
        router = self._deployment.router
        choice = router.choose(model, client)
        if choice.experiment is not None and choice.experiment.kind == "cross_space":
            arms = ", ".join(f"{arm.label} (model {arm.model!r})" for arm in choice.experiment.arms)
            raise BadInput(
                f"{choice.asked!r} is an experiment between spaces: its models have tokens and limits of their own. Name a "
                f"model; the arms are: {arms}",
                param="model",
            )
        return router.targets(choice, task)[0]

    def check_ready(self, model: str) -> None:
        """Check that requests under a name are answered: of an experiment, those in each of its arms.

        Raises:
            RequestError: nothing has that name, or what it stands for is not ready.
        """
        router = self._deployment.router
        choice = router.choose(model, GATEWAY)  # for probes, which carry no key
        if choice.experiment is None:
            router.targets(choice, None)
            return
        for arm, arm_model, task in router.arms(choice):
            if arm.weight or arm is choice.experiment.control:
                router.targets(Choice(arm_model, task, asked=arm.model, name=arm.model), None)

    @contextmanager
    def vocabulary(self, target: Target, operation: str) -> Iterator[Vocabulary]:
        """Give the tokens of a target's model, which is not stopped before the context ends; count how that went.

        Args:
            operation: what they are used for: ``tokenize`` or ``decode``.

        Raises:
            ModelNotReady: the model is not loaded.
            UnsupportedOutput: its tokens are not known here.
        """
        outcome = InternalError.code
        try:
            with target.model.in_use():
                yield target.model.backend.vocabulary()
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = ClientDisconnected.code
            raise
        except RequestError as error:
            outcome = error.code
            raise
        finally:
            metrics.TOKENIZER_REQUESTS.labels(target.model.id, operation, outcome).inc()

    async def _answer_on_record(
        self, router: Router, choice: Choice, request: R, answer_on: Callable[[Target, Choice, R], Awaitable[A]]
    ) -> A:
        """Answer a request, and count what came of it: an arm that fails in whatever way must not look unused."""
        started = time.monotonic()
        try:
            answer = await self._answer(router.targets(choice, request.task), choice, request, answer_on)
        except asyncio.CancelledError:
            # An arm that is slow must not look better for it: those who did not wait are its failures.
            gone = ClientDisconnected("the client closed the connection before the answer")
            self._record_error(choice, request, gone, time.monotonic() - started)
            raise
        except Exception as error:
            known = error if isinstance(error, RequestError) else InternalError(f"unexpected {type(error).__name__}")
            self._record_error(choice, request, known, time.monotonic() - started)
            raise
        self._record(choice, answer, time.monotonic() - started)
        return answer

    async def _answer(
        self,
        targets: Sequence[Target],
        choice: Choice,
        request: R,
        answer_on: Callable[[Target, Choice, R], Awaitable[A]],
    ) -> A:
        """Have the first target answer, and if it turns out not to work, the next one: all are of one space."""
        with ExitStack() as in_use:
            # The others as well: a reload must not stop one before its turn comes.
            for target in targets:
                in_use.enter_context(target.model.in_use())
            for target, alternative in zip_longest(targets, targets[1:]):
                try:
                    return await answer_on(target, choice, request)
                except (ModelNotReady, InferenceFailed, OutOfMemory) as error:
                    if alternative is None:
                        raise
                    metrics.FALLBACKS.labels(target.model.id, alternative.model.id, error.code).inc()
        raise AssertionError("there is always a target")

    def _record(self, choice: Choice, answer: EmbedAnswer | RerankAnswer, elapsed_s: float) -> None:
        arm = choice.assignment and choice.assignment.arm.label
        meters = metrics.target_metrics(
            answer.model, answer.task, choice.assignment and choice.assignment.experiment, arm
        )
        meters.count()
        meters.seconds.observe(elapsed_s)
        meters.texts.inc(answer.num_texts)
        meters.tokens.inc(answer.num_tokens)
        meters.truncated.inc(len(answer.truncated))
        meters.tokenize_s.observe(answer.timings.tokenize_s)
        meters.queue_s.observe(answer.timings.queue_s)
        meters.inference_s.observe(answer.timings.inference_s)
        self._note(choice, elapsed_s, answer=answer)

    def _record_error(
        self, choice: Choice, request: EmbedRequest | RerankRequest, error: RequestError, elapsed_s: float
    ) -> None:
        info = choice.model.info
        asked = choice.task or request.task or (info and info.default_task)
        # Only a task that the model has: a client can make up any other.
        task = canonical_task(asked) if asked and info and canonical_task(asked) in info.tasks else None
        assignment = choice.assignment
        metrics.target_metrics(
            choice.model.id, task, assignment and assignment.experiment, assignment and assignment.arm.label
        ).count(error.code)
        self._note(choice, elapsed_s, error=error)

    def _note(
        self,
        choice: Choice,
        elapsed_s: float,
        *,
        answer: EmbedAnswer | RerankAnswer | None = None,
        error: RequestError | None = None,
    ) -> None:
        """Add a request to the stats of its experiment."""
        if (assignment := choice.assignment) is None:
            return
        self._stats.record(
            RequestRecord(
                experiment=assignment.experiment,
                generation=assignment.generation,
                arm=assignment.arm.label,
                reason=assignment.reason.value,
                is_counted=assignment.is_counted,
                unit=assignment.unit,
                model=answer.model if answer else choice.model.id,
                space=answer.space if answer else None,
                elapsed_s=elapsed_s,
                num_texts=answer.num_texts if answer else 0,
                num_tokens=answer.num_tokens if answer else 0,
                queue_s=answer.timings.queue_s if answer else 0.0,
                error_code=error.code if error else None,
            )
        )


def _embeddings_span(
    choice: Choice, request: EmbedRequest | RerankRequest
) -> AbstractContextManager[tracing.EmbeddingsSpan | None]:
    assignment = choice.assignment
    return tracing.embeddings_span(
        operation=semconv.EMBEDDINGS if isinstance(request, EmbedRequest) else semconv.RERANK,
        model=choice.asked,
        provider=choice.model.entry.backend,
        num_texts=len(request.texts),
        encoding=request.encoding,
        experiment=None if assignment is None else assignment.experiment,
        arm=None if assignment is None else assignment.arm.label,
    )


def _describe(span: tracing.EmbeddingsSpan, answer: EmbedAnswer | RerankAnswer, dimensions: int | None) -> None:
    span.describe(
        model=answer.model,
        space=answer.space,
        task=answer.task,
        num_tokens=answer.num_tokens,
        num_truncated=len(answer.truncated),
        dimensions=dimensions,
        timings=answer.timings,
    )


async def _embed_on(target: Target, choice: Choice, request: EmbedRequest) -> EmbedAnswer:
    """Check what a request asks of a target, have it embed, and finish the vectors."""
    info = target.info
    dimensions = _dimensions(target, request.dimensions)
    is_normalized = info.is_normalized if request.is_normalized is None else request.is_normalized
    if not is_normalized and not info.has_raw:
        raise BadInput(
            f"`normalized` is false, but the vectors of model {info.id!r} come normalized from where it runs",
            param="normalized",
        )
    _check_outputs(target, request)
    outputs = frozenset(request.outputs)
    output = Output.STATES if Output.STATES in outputs else Output.DENSE
    space = info.space(target.task, dimensions, is_normalized=is_normalized, output=output)
    if request.expect_space is not None and not is_same_space(request.expect_space, space):
        expected = request.expect_space[:_MAX_SHOWN]  # a header can have 64 KiB
        raise SpaceMismatch(
            f"the vectors would be in space {space}, and the request expects {expected}: they could not "
            "be compared with the stored ones"
        )
    dense_bytes = _DENSE_COPIES * _FLOAT_BYTES * len(request.texts) * info.width
    token_bytes = TOKEN_BYTES + _output_bytes(info, outputs)
    request.reserve(dense_bytes)
    result = await target.model.embed(
        EmbedJob(
            texts=request.texts,
            task=target.task,
            truncate=request.truncate,
            deadline=time.monotonic() + request.timeout_s,
            caller=request.caller,
            outputs=outputs,
            is_late_chunked=request.is_late_chunked,
            max_total_tokens=request.max_token_vectors if outputs & PER_TOKEN else None,
            on_tokens=lambda num_tokens: request.reserve(dense_bytes + num_tokens * token_bytes),
        )
    )
    vector_math.require_finite(result.sparse or (), result.multivectors or (), result.states or ())
    return EmbedAnswer(
        vectors=vector_math.finish(
            result.vectors, (len(request.texts), info.width), dimensions, normalize=is_normalized
        ),
        name=target.name,
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
        assignment=choice.assignment,
    )


def _output_bytes(info: ModelInfo, outputs: frozenset[Output]) -> int:
    """Return how many bytes of output a token has, at most."""
    num_vectors = len(outputs & PER_TOKEN)
    return num_vectors * _FLOAT_BYTES * info.width + (_SPARSE_BYTES if Output.SPARSE in outputs else 0)


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
    if Output.STATES in request.outputs and not info.has_states:
        raise UnsupportedOutput(f"model {info.id!r} runs elsewhere, and its un-pooled token vectors cannot be had here")
    missing = [output.value for output in request.outputs if output not in (*info.outputs, Output.STATES)]
    if missing:
        raise UnsupportedOutput(
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
