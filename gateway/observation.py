"""Record every request in the metrics, in the trace, and in the stats of its experiment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from gateway.errors import ClientDisconnected, DeadlineExceeded, InternalError, Overloaded, RequestError
from gateway.experiments.arms import RequestRecord
from gateway.experiments.stats import ExperimentStats
from gateway.recent import RecentTraffic
from gateway.requests import Answer, EmbedRequest, Request
from gateway.routing.router import Choice
from gateway.tasks import canonical_task
from gateway.telemetry import metrics, semconv, tracing
from gateway.types import ModelKind

A = TypeVar("A", bound=Answer)
_OPERATIONS = {
    ModelKind.EMBED: semconv.EMBEDDINGS,
    ModelKind.RERANK: semconv.RERANK,
    ModelKind.CLASSIFY: semconv.CLASSIFY,
}


class Observer:
    """Awaits answers, and records each answer or error once."""

    def __init__(self, stats: ExperimentStats, traffic: RecentTraffic) -> None:
        self._stats = stats
        self._traffic = traffic

    async def observe(self, choice: Choice, request: Request, answering: Awaitable[A]) -> A:
        """Await the answer to a request, record the answer or the error, and return or raise it."""
        started = time.monotonic()
        with _span(choice, request) as span:
            try:
                answer = await answering
            except asyncio.CancelledError:
                # Clients that gave up count as failures; otherwise a slow arm would look better.
                self._record_error(choice, request, ClientDisconnected(""), time.monotonic() - started)
                raise
            except Exception as error:  # an arm that fails in any way must not look unused
                failure = error if isinstance(error, RequestError) else InternalError("")
                self._record_error(choice, request, failure, time.monotonic() - started)
                raise
            self._record_answer(choice, request, answer, time.monotonic() - started)
            if span is not None:
                span.describe(
                    model=answer.model,
                    space=answer.space,
                    task=answer.task,
                    num_tokens=answer.num_tokens,
                    num_truncated=len(answer.truncated),
                    dimensions=answer.dimensions,
                    timings=answer.timings,
                )
        return answer

    def _record_answer(self, choice: Choice, request: Request, answer: Answer, elapsed_s: float) -> None:
        target_metrics = _target_metrics(choice, answer.model, answer.task)
        target_metrics.count()
        target_metrics.seconds.observe(elapsed_s)
        target_metrics.texts.inc(answer.num_texts)
        target_metrics.tokens.inc(answer.num_tokens)
        target_metrics.truncated.inc(len(answer.truncated))
        target_metrics.tokenize_s.observe(answer.timings.tokenize_s)
        target_metrics.queue_s.observe(answer.timings.queue_s)
        target_metrics.inference_s.observe(answer.timings.inference_s)
        self._traffic.record(answer.model, elapsed_s, is_error=False)
        self._record_in_experiment(choice, request, elapsed_s, answer=answer)

    def _record_error(self, choice: Choice, request: Request, error: RequestError, elapsed_s: float) -> None:
        info = choice.model.info
        task = choice.task or request.task or (info and info.default_task)
        # Only a task that the model has: a client can make up any other.
        label = canonical_task(task) if task and info and canonical_task(task) in info.tasks else None
        _target_metrics(choice, choice.model.id, label).count(error.code)
        self._traffic.record(choice.model.id, elapsed_s, is_error=True)
        self._record_in_experiment(choice, request, elapsed_s, error=error)

    def _record_in_experiment(
        self,
        choice: Choice,
        request: Request,
        elapsed_s: float,
        *,
        answer: Answer | None = None,
        error: RequestError | None = None,
    ) -> None:
        if (assignment := choice.assignment) is None:
            return
        self._stats.record(
            RequestRecord(
                experiment=assignment.experiment,
                generation=assignment.generation,
                arm=assignment.arm.label,
                reason=assignment.reason.value,
                is_counted=assignment.is_counted,
                share=assignment.share,
                unit=assignment.unit,
                source=assignment.source,
                declared=assignment.declared,
                model=answer.model if answer else choice.model.id,
                space=answer.space if answer else None,
                elapsed_s=elapsed_s,
                num_texts=answer.num_texts if answer else 0,
                num_characters=sum(request.lengths),
                num_tokens=answer.num_tokens if answer else 0,
                queue_s=answer.timings.queue_s if answer else 0.0,
                error_code=error.code if error else None,
                is_server_error=error is not None and _is_server_fault(error),
                is_cut=isinstance(error, DeadlineExceeded | ClientDisconnected),
            )
        )


@contextmanager
def observe_tokenizer(model: str, operation: str) -> Iterator[None]:
    """Count a use of a model's tokenizer, by ``ok`` or the code of the error, when the context ends."""
    outcome = InternalError.code
    try:
        yield
        outcome = "ok"
    except asyncio.CancelledError:
        outcome = ClientDisconnected.code
        raise
    except RequestError as error:
        outcome = error.code
        raise
    finally:
        metrics.TOKENIZER_REQUESTS.labels(model, operation, outcome).inc()


def _is_server_fault(error: RequestError) -> bool:
    """Return whether a request failed through no fault of its client. A client that hung up had waited too long."""
    return error.status >= 500 or isinstance(error, Overloaded | ClientDisconnected)


def _target_metrics(choice: Choice, model: str, task: str | None) -> metrics.TargetMetrics:
    assignment = choice.assignment
    if assignment is None:
        return metrics.target_metrics(model, task, None, None)
    return metrics.target_metrics(model, task, assignment.experiment, assignment.arm.label)


def _span(choice: Choice, request: Request) -> AbstractContextManager[tracing.EmbeddingsSpan | None]:
    assignment = choice.assignment
    return tracing.embeddings_span(
        operation=_OPERATIONS[request.kind],
        model=choice.asked,
        provider=choice.model.entry.backend,
        num_texts=len(request.texts),
        encoding=request.encoding if isinstance(request, EmbedRequest) else None,
        experiment=None if assignment is None else assignment.experiment,
        arm=None if assignment is None else assignment.arm.label,
    )
