"""The spans of a request: one for the HTTP request, inside it one for the embedding, and inside that one for each stage.

Off until :func:`use` sets a tracer provider; while off, a request costs two comparisons with ``None``. A span never holds a
text or a key, and its name holds only names of the registry. ``trace_export`` sends the spans.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, TracerProvider
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import Scope

from gateway import __version__
from gateway.errors import ClientDisconnected, InternalError, RequestError
from gateway.telemetry import semconv
from gateway.types import Timings

# Clients can send any path; a span keeps the beginning.
_MAX_PATH_CHARS = 256
# The name after these may hold a unit of an experiment, which identifies a person.
_NAME_IN_PATH = re.compile(r"(/tei/|/openai/deployments/|/models/|/experiments/[^/]+/).+", re.DOTALL)
_FIRST_SERVER_ERROR = 500

_OFF: AbstractContextManager[None] = nullcontext()

_tracer: Tracer | None = None


def use(provider: TracerProvider | None) -> None:
    """Trace all further requests with a provider; ``None`` turns tracing off."""
    global _tracer  # noqa: PLW0603  one process, one tracer, as with the metrics
    _tracer = None if provider is None else provider.get_tracer("gateway", __version__)


def inject(headers: MutableMapping[str, str]) -> None:
    """Add the current span's W3C context to the headers of an outgoing request."""
    if _tracer is not None:
        from opentelemetry import propagate

        propagate.inject(headers)


# ------------------------------------------------------------------------------------------------------ the request


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """The span of an HTTP request.

    Attributes:
        is_ours: whether the gateway opened the span, rather than a tracer around the gateway such as ddtrace.
    """

    span: Span
    is_ours: bool

    @property
    def log_ids(self) -> dict[str, str]:
        """Return the ids that connect a log line to the trace, as hex; empty if the trace is not recorded."""
        if not self.span.is_recording():
            return {}
        context = self.span.get_span_context()
        return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}

    def describe(self, scope: Scope, status: int, error_code: str | None) -> None:
        """Add the result. Call this before the answer is sent, because ddtrace then ends its span.

        Args:
            scope: the scope of the request, after routing.
            error_code: the code in the answer, if it is an error.
        """
        route = getattr(scope.get("route"), "path", None)  # the template; absent for an unknown path
        if self.is_ours:
            self.span.set_attribute(semconv.HTTP_RESPONSE_STATUS_CODE, status)
        if self.is_ours and route is not None:
            self.span.set_attribute(semconv.HTTP_ROUTE, route)
            self.span.update_name(f"{_name(scope)} {route}")
        if error_code is not None:
            self.span.set_attribute(semconv.GATEWAY_ERROR_CODE, error_code)
        if status >= _FIRST_SERVER_ERROR:  # by the conventions, a fault of the client is not an error
            _fail(self.span, error_code or str(status))


def request_span(
    scope: Scope, headers: Headers, request_id: str, *, untraced: Collection[str]
) -> AbstractContextManager[RequestSpan | None]:
    """Return a context manager that makes the span of an HTTP request the current span.

    The span's parent is the caller's span, which the headers ``traceparent`` and ``tracestate`` name.

    Args:
        untraced: paths whose requests have no span.
    """
    if _tracer is None or scope["path"] in untraced:
        return _OFF
    return _request_span(_tracer, scope, headers, request_id)


@contextmanager
def _request_span(tracer: Tracer, scope: Scope, headers: Headers, request_id: str) -> Iterator[RequestSpan]:
    outer = trace.get_current_span()
    if outer.get_span_context().is_valid:
        # A tracer around the application has a span for the request; a second one would count it twice.
        outer.set_attribute(semconv.GATEWAY_REQUEST_ID, request_id)
        yield RequestSpan(outer, is_ours=False)
        return
    is_known = scope["method"] in semconv.KNOWN_METHODS
    span = tracer.start_span(
        _name(scope),
        context=_caller(headers),
        kind=SpanKind.SERVER,
        attributes={
            semconv.HTTP_REQUEST_METHOD: scope["method"] if is_known else semconv.OTHER_METHOD,
            semconv.URL_SCHEME: scope["scheme"],
            semconv.URL_PATH: _NAME_IN_PATH.sub(r"\1…", scope["path"])[:_MAX_PATH_CHARS],
            semconv.GATEWAY_REQUEST_ID: request_id,
        },
    )
    with _current(span):
        try:
            yield RequestSpan(span, is_ours=True)
        except Exception:  # only noted: the span shows every failure
            _fail(span, InternalError.code)
            raise


def _name(scope: Scope) -> str:
    """Return the name of a request's span before its route is known."""
    method: str = scope["method"]
    return method if method in semconv.KNOWN_METHODS else semconv.OTHER_METHOD_NAME


def _caller(headers: Headers) -> Context:
    from opentelemetry import propagate

    return propagate.extract(headers, context=Context(), getter=_HEADERS)


class _HeadersGetter(Getter[Headers]):
    """Reads headers for OpenTelemetry. ``tracestate`` may span several lines."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        return carrier.getlist(key) or None

    def keys(self, carrier: Headers) -> list[str]:
        return carrier.keys()


_HEADERS = _HeadersGetter()


# ---------------------------------------------------------------------------------------------------- the embedding


@dataclass(frozen=True, slots=True)
class EmbeddingsSpan:
    """The span of one embedding operation.

    Attributes:
        begun_ns: start time, in nanoseconds since 1970.
    """

    tracer: Tracer
    span: Span
    begun_ns: int

    def describe(
        self,
        *,
        model: str,
        space: str | None,
        task: str | None,
        num_tokens: int,
        num_truncated: int,
        dimensions: int | None,
        timings: Timings,
    ) -> None:
        """Add the answer, and a span for each stage; the embedding ends now.

        Args:
            model: id of the model that answered.
            space: the space of the vectors; ``None`` for scores.
            dimensions: dimensions of the dense vectors; ``None`` without dense vectors.
        """
        if not self.span.is_recording():
            return
        attributes: dict[str, AttributeValue | None] = {
            semconv.GEN_AI_RESPONSE_MODEL: model,
            semconv.GEN_AI_USAGE_INPUT_TOKENS: num_tokens,
            semconv.GEN_AI_EMBEDDINGS_DIMENSION_COUNT: dimensions,
            semconv.GATEWAY_SPACE: space,
            semconv.GATEWAY_TASK: task,
            semconv.GATEWAY_NUM_TRUNCATED: num_truncated,
        }
        self.span.set_attributes(_without_none(attributes))
        context = trace.set_span_in_context(self.span, Context())
        for stage in stages(self.begun_ns, time.time_ns(), timings):
            attribute = {semconv.GATEWAY_STAGE_SECONDS: stage.seconds}
            span = self.tracer.start_span(stage.name, context, attributes=attribute, start_time=stage.begun_ns)
            span.end(stage.ended_ns)


def embeddings_span(
    *,
    model: str,
    provider: str,
    num_texts: int,
    encoding: str | None,
    experiment: str | None = None,
    arm: str | None = None,
    operation: str = semconv.EMBEDDINGS,
) -> AbstractContextManager[EmbeddingsSpan | None]:
    """Return a context manager that makes the span of an embedding the current span.

    Args:
        model: the name in the request, as the registry writes it.
        provider: the backend of the model.
        encoding: the requested encoding of the vectors.
        operation: embeddings, or scores.
    """
    if _tracer is None:
        return _OFF
    attributes: dict[str, AttributeValue | None] = {
        semconv.GEN_AI_OPERATION_NAME: operation,
        semconv.GEN_AI_PROVIDER_NAME: provider,
        semconv.GEN_AI_REQUEST_MODEL: model,
        semconv.GEN_AI_REQUEST_ENCODING_FORMATS: encoding and (encoding,),
        semconv.GATEWAY_NUM_TEXTS: num_texts,
        semconv.GATEWAY_EXPERIMENT: experiment,
        semconv.GATEWAY_ARM: arm,
    }
    return _embeddings_span(_tracer, f"{operation} {model}", _without_none(attributes))


@contextmanager
def _embeddings_span(tracer: Tracer, name: str, attributes: dict[str, AttributeValue]) -> Iterator[EmbeddingsSpan]:
    # INTERNAL, as the conventions require for a model in the same process.
    begun_ns = time.time_ns()
    span = tracer.start_span(name, kind=SpanKind.INTERNAL, attributes=attributes, start_time=begun_ns)
    with _current(span):
        try:
            yield EmbeddingsSpan(tracer, span, begun_ns)
        except asyncio.CancelledError:
            _fail(span, ClientDisconnected.code)
            raise
        except Exception as error:  # only noted: the span shows every failure
            _fail(span, error.code if isinstance(error, RequestError) else InternalError.code)
            raise


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of an embedding.

    Attributes:
        begun_ns: start of its span, in nanoseconds since 1970.
        ended_ns: end of its span.
        seconds: duration of the stage according to :class:`~gateway.types.Timings`.
    """

    name: str
    begun_ns: int
    ended_ns: int
    seconds: float


def stages(begun_ns: int, ended_ns: int, timings: Timings) -> list[Stage]:
    """Place the stages, by their durations alone, between the start and the end of an embedding.

    The last stage ends with the embedding. The first may start later than the embedding, because the request may have
    waited for a model that then failed. An upstream may report a duration that exceeds the whole embedding, so each
    stage is cut at the start and the end of the embedding.
    """
    tokenize, queue, inference = (
        round(seconds * 1e9) for seconds in (timings.tokenize_s, timings.queue_s, timings.inference_s)
    )
    tokenized = min(ended_ns, max(begun_ns, ended_ns - tokenize - queue - inference) + tokenize)
    return [
        Stage(semconv.TOKENIZE, max(begun_ns, tokenized - tokenize), tokenized, timings.tokenize_s),
        Stage(semconv.QUEUE, tokenized, min(ended_ns, tokenized + queue), timings.queue_s),
        Stage(semconv.INFERENCE, max(tokenized, ended_ns - inference), ended_ns, timings.inference_s),
    ]


# ------------------------------------------------------------------------------------------------------------ shared


def _current(span: Span) -> AbstractContextManager[Span]:
    """Make a span the current span, and end it. Leave out the message of an exception, which may quote a request."""
    return trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False)


def _fail(span: Span, error_type: str) -> None:
    span.set_attribute(semconv.ERROR_TYPE, error_type)
    span.set_status(StatusCode.ERROR)


def _without_none(attributes: Mapping[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}
