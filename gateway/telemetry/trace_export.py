"""Export spans to a tracer that is already set, or to an OTLP receiver by the standard ``OTEL_*`` variables.

The SDK reads the variables itself; ``config/otel`` checks them first. The SDK is imported only if it is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
from opentelemetry import trace

from gateway import __version__
from gateway.errors import StartError
from gateway.telemetry import tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

log = structlog.get_logger(__name__)

SERVICE_NAME: Final = "embedding-gateway"

GRPC: Final = "grpc"
HTTP: Final = "http/protobuf"

_FLUSH_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """The settings from ``OTEL_*``.

    Attributes:
        exporters: ``otlp``, ``console`` or both; empty if traces are off.
        protocol: the protocol of ``otlp``: ``http/protobuf`` or ``grpc``.
    """

    exporters: tuple[str, ...]
    protocol: str = HTTP


@contextmanager
def sending(settings: TraceSettings) -> Iterator[None]:
    """Create and send spans, if traces are on, until the context ends; the last spans get a few seconds to arrive.

    Raises:
        StartError: a package is missing, or the SDK rejects its settings.
    """
    current = trace.get_tracer_provider()
    provider = None
    if not isinstance(current, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        # Already set: ddtrace-run or opentelemetry-instrument started this process, and sends its spans.
        tracing.use(current)
        log.info("tracing", by=type(current).__module__)
    elif settings.exporters:
        provider = _checked_provider(settings)
        tracing.use(provider)
        log.info("tracing", exporters=list(settings.exporters), protocol=settings.protocol)
    try:
        yield
    finally:
        tracing.use(None)
        if provider is not None:
            _flush(provider)


def _flush(provider: TracerProvider) -> None:
    """Send the remaining spans, and stop; in a thread, as the SDK has no timeout here and retries for half a minute."""
    flushing = threading.Thread(target=provider.shutdown, name="flush-traces", daemon=True)
    flushing.start()
    flushing.join(_FLUSH_S)
    if flushing.is_alive():
        log.warning("traces_lost", reason=f"the receiver of traces did not take the last ones in {_FLUSH_S:g} s")


def _checked_provider(settings: TraceSettings) -> TracerProvider:
    try:
        return _provider(settings)
    except ImportError as error:
        raise StartError(
            f"OTEL_* turns traces on, but {error.name} is missing: pip install 'embedding-gateway[tracing]'"
        ) from error
    except Exception as error:  # the SDK's own errors for a certificate, a header or a limit
        raise StartError(f"OTEL_*: traces cannot be sent: {error}") from error


def _provider(settings: TraceSettings) -> TracerProvider:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Not set globally: libraries in this process would start to create their own spans.
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    for name in settings.exporters:
        provider.add_span_processor(BatchSpanProcessor(_exporter(name, settings.protocol)))
    return provider


def _exporter(name: str, protocol: str) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if protocol == GRPC:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter()


def _resource() -> Resource:
    """Return the resource of this process: as given by ``OTEL_*``, with our defaults."""
    from opentelemetry.sdk.resources import Resource

    attributes = dict(Resource.create().attributes)
    if str(attributes["service.name"]).startswith("unknown_service"):
        del attributes["service.name"]
    return Resource({"service.name": SERVICE_NAME, "service.version": __version__, **attributes})
