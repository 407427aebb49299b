"""Fake receivers of traces: an OTLP receiver over HTTP or gRPC, and a Datadog Agent. All on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import msgpack
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

PATIENCE_S = 30

# What ddtrace sends by default. A span of version 0.5 is a list of these; texts in it are indices of a table.
DATADOG_PATH = "/v0.5/traces"
_DATADOG_FIELDS = (
    "service",
    "name",
    "resource",
    "trace_id",
    "span_id",
    "parent_id",
    "start",
    "duration",
    "error",
    "meta",
    "metrics",
    "type",
)


@dataclass(frozen=True)
class Span:
    """A span from any sender. Ids are hex; ``parent_id`` is empty for the first one."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: Mapping[str, object]


@dataclass
class Receiver:
    """A listener on ``url``, and the spans that it has received so far."""

    url: str
    spans: list[Span] = field(default_factory=list)
    resources: list[Mapping[str, object]] = field(default_factory=list)
    requests: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)

    def wait_for(self, is_there: Callable[[list[Span]], bool]) -> list[Span]:
        """Wait for the wanted spans, and return all."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_there(list(self.spans)):
            assert time.monotonic() < deadline, f"got only {self.spans}"
            time.sleep(0.05)
        return list(self.spans)

    def take_otlp(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            self.resources.append(_attributes(resource.resource.attributes))
            self.spans += [
                Span(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    attributes=_attributes(span.attributes),
                )
                for scope in resource.scope_spans
                for span in scope.spans
            ]

    def take_datadog(self, texts: list[str], traces: list[list[list[Any]]]) -> None:
        """Add the spans of a request to :data:`DATADOG_PATH`. The upper half of a trace's id is a tag of its first span."""
        for rows in traces:
            trace = [_datadog_span(texts, row) for row in rows]
            upper = next(span["meta"]["_dd.p.tid"] for span in trace if "_dd.p.tid" in span["meta"])
            self.spans += [
                Span(
                    name=span["resource"],
                    trace_id=f"{upper}{span['trace_id']:016x}",
                    span_id=f"{span['span_id']:016x}",
                    parent_id=f"{span['parent_id']:016x}" if span["parent_id"] else "",
                    attributes={**span["meta"], **span["metrics"], "service": span["service"], "name": span["name"]},
                )
                for span in trace
            ]


def _datadog_span(texts: list[str], row: list[Any]) -> dict[str, Any]:
    span = dict(zip(_DATADOG_FIELDS, row, strict=True))
    span["meta"] = {texts[name]: texts[value] for name, value in span["meta"].items()}
    span["metrics"] = {texts[name]: value for name, value in span["metrics"].items()}
    return span | {name: texts[span[name]] for name in ("service", "name", "resource", "type")}


def _attributes(pairs: list[KeyValue]) -> dict[str, object]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    assert kind is not None
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def otlp_over_http() -> Iterator[Receiver]:
    """Listen for OTLP over HTTP while the context lasts."""

    def answer(receiver: Receiver, path: str, body: bytes) -> bytes:
        if path == "/v1/traces":
            receiver.take_otlp(ExportTraceServiceRequest.FromString(body))
        return ExportTraceServiceResponse().SerializeToString()

    with _http(answer) as receiver:
        yield receiver


@contextmanager
def otlp_over_grpc() -> Iterator[Receiver]:
    """Listen for OTLP over gRPC while the context lasts."""

    class Service(TraceServiceServicer):
        def Export(  # noqa: N802  as the protocol calls it
            self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
        ) -> ExportTraceServiceResponse:
            receiver.take_otlp(request)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Service(), server)
    receiver = Receiver(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    try:
        yield receiver
    finally:
        server.stop(None).wait()


@contextmanager
def datadog_agent() -> Iterator[Receiver]:
    """Listen as the Datadog Agent does while the context lasts."""

    def answer(receiver: Receiver, path: str, body: bytes) -> bytes:
        if path == "/info":
            return json.dumps({"version": "7.70.0", "endpoints": [DATADOG_PATH]}).encode()
        if path == DATADOG_PATH:
            receiver.take_datadog(*msgpack.unpackb(body, strict_map_key=False))
        return b"{}"

    with _http(answer) as receiver:
        yield receiver


@contextmanager
def _http(answer: Callable[[Receiver, str, bytes], bytes]) -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            receiver.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            content = answer(receiver, self.path, body)
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
