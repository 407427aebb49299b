"""The export of spans from a gateway that serves to an OTLP receiver, over HTTP and gRPC, and its failures."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from gateway import __version__
from gateway.config.otel import read_trace_settings
from gateway.errors import StartError
from gateway.telemetry import trace_export, tracing
from tests.clients.gateway_process import MODEL, WIDTH, running_gateway
from tests.telemetry.receivers import Receiver, Span, otlp_over_grpc, otlp_over_http

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass(frozen=True)
class Traced:
    """One traced request to a gateway that has ended since."""

    receiver: Receiver
    answer: dict[str, Any]
    log: list[dict[str, Any]]

    def span(self, name: str) -> Span:
        (span,) = (span for span in self.receiver.spans if span.name == name)
        return span


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("gateway")
    with otlp_over_http() as receiver:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20token",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "OTEL_BSP_SCHEDULE_DELAY": "600000",  # nothing is sent until the gateway stops
            "GATEWAY_LOG_FORMAT": "json",
        }
        with running_gateway(folder, **environ) as gateway:
            response = httpx.post(
                f"{gateway.base_url}/embeddings",
                json={"model": "default", "input": ["a text", "another"]},
                headers={"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01"},
            )
            assert receiver.spans == []
        lines = (folder / "gateway.log").read_text().splitlines()
        yield Traced(receiver, response.json(), [json.loads(line) for line in lines if line.startswith("{")])


def test_the_last_spans_are_sent_when_the_gateway_stops(traced: Traced) -> None:
    stages = ["tokenize", "queue", "inference"]
    assert sorted(span.name for span in traced.receiver.spans) == sorted(
        ["POST /v1/embeddings", "embeddings default", *stages]
    )
    request, embeddings = traced.span("POST /v1/embeddings"), traced.span("embeddings default")
    assert {span.trace_id for span in traced.receiver.spans} == {TRACE_ID}
    assert request.parent_id == CALLER_ID
    assert embeddings.parent_id == request.span_id
    assert {traced.span(stage).parent_id for stage in stages} == {embeddings.span_id}


def test_the_work_of_the_model_is_in_the_trace(traced: Traced) -> None:
    attributes = traced.span("embeddings default").attributes
    assert attributes["gen_ai.response.model"] == MODEL
    assert attributes["gen_ai.usage.input_tokens"] == traced.answer["usage"]["prompt_tokens"]
    assert attributes["gen_ai.embeddings.dimension.count"] == WIDTH
    assert attributes["gen_ai.request.encoding_formats"] == ["float"]
    assert attributes["gateway.num_texts"] == 2
    seconds = [traced.span(stage).attributes["gateway.stage.seconds"] for stage in ("tokenize", "queue", "inference")]
    assert all(isinstance(value, float) and value > 0 for value in seconds)


def test_the_sender_says_who_it_is(traced: Traced) -> None:
    (resource,) = traced.receiver.resources
    assert resource["service.name"] == "embedding-gateway"
    assert resource["service.version"] == __version__
    assert resource["deployment.environment.name"] == "test"
    (path, headers) = traced.receiver.requests[0]
    assert path == "/v1/traces"
    assert headers["authorization"] == "Bearer token"


def test_the_access_log_joins_the_trace(traced: Traced) -> None:
    (line,) = (line for line in traced.log if line["event"] == "request" and line["path"] == "/v1/embeddings")
    assert (line["trace_id"], line["span_id"]) == (TRACE_ID, traced.span("POST /v1/embeddings").span_id)


# --------------------------------------------------------------------------------------------------- in this process


def embed() -> None:
    with tracing.embeddings_span(model="jina", provider="infinity", num_texts=1, encoding=None):
        pass


def set_environ(monkeypatch: pytest.MonkeyPatch, **environ: str) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def test_it_sends_by_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    with otlp_over_grpc() as receiver:
        set_environ(
            monkeypatch,
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=receiver.url,
            OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
            OTEL_SERVICE_NAME="named",
        )
        with trace_export.sending(read_trace_settings(os.environ)):
            embed()

    assert [span.name for span in receiver.spans] == ["embeddings jina"]
    assert [resource["service.name"] for resource in receiver.resources] == ["named"]


@pytest.mark.parametrize(("share", "num_spans"), [("0", 0), ("1", 3)])
def test_the_sampler_is_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, share: str, num_spans: int) -> None:
    with otlp_over_http() as receiver:
        set_environ(
            monkeypatch,
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
            OTEL_TRACES_SAMPLER="traceidratio",
            OTEL_TRACES_SAMPLER_ARG=share,
        )
        with trace_export.sending(read_trace_settings(os.environ)):
            for _ in range(3):
                embed()

    assert len(receiver.spans) == num_spans


def test_a_receiver_that_hangs_holds_up_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_export, "_FLUSH_S", 0.5)
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as silent, capture_logs() as lines:
        set_environ(
            monkeypatch,
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}",
            OTEL_EXPORTER_OTLP_TIMEOUT="2",
            OTEL_BSP_SCHEDULE_DELAY="1",
            OTEL_BSP_MAX_QUEUE_SIZE="512",
        )
        with trace_export.sending(read_trace_settings(os.environ)):
            embed()
            stack.enter_context(silent.accept()[0])  # the sender has begun, and waits from here on
            started = time.monotonic()
            for _ in range(2000):  # more than may wait
                embed()
        assert time.monotonic() - started < 2

    assert lines[-1]["event"] == "traces_lost"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    set_environ(monkeypatch)
    package = f"opentelemetry.exporter.otlp.proto.{protocol}.trace_exporter"
    monkeypatch.setitem(sys.modules, package, None)
    settings = trace_export.TraceSettings(("otlp",), "grpc" if protocol == "grpc" else "http/protobuf")

    with pytest.raises(StartError, match=rf"{package} is missing: pip install 'embedding-gateway\[tracing\]'"):  # noqa: SIM117
        with trace_export.sending(settings):
            pass


def test_settings_that_the_sdk_refuses_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environ(monkeypatch, OTEL_TRACES_EXPORTER="console", OTEL_BSP_MAX_QUEUE_SIZE="1")

    with pytest.raises(StartError, match="max_export_batch_size must be less than"):  # noqa: SIM117
        with trace_export.sending(read_trace_settings(os.environ)):
            pass


GIVEN = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=lambda span: f"sent {span.name}\\n")))
trace.set_tracer_provider(provider)

from gateway.telemetry import trace_export, tracing

with trace_export.sending(trace_export.TraceSettings(("otlp",))):
    with tracing.embeddings_span(model="jina", provider="infinity", num_texts=1, encoding=None):
        pass
"""


def test_an_existing_tracer_is_used_instead() -> None:
    """As ``opentelemetry-instrument`` sets one, before the gateway runs."""
    done = subprocess.run([sys.executable, "-c", GIVEN], capture_output=True, text=True, check=True)

    assert "sent embeddings jina" in done.stdout.splitlines()
    assert "exporters" not in done.stdout  # no second way to send them


def test_no_span_is_made_when_sending_has_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with otlp_over_http() as receiver:
        set_environ(monkeypatch, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        with trace_export.sending(read_trace_settings(os.environ)):
            embed()
        embed()

    assert len(receiver.spans) == 1
