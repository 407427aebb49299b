"""The gateway under ``ddtrace-run``, as docs/tracing.md says to start it, and a stand-in for the Datadog Agent."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.gateway_process import MODEL, WIDTH, running_gateway
from tests.telemetry.receivers import DATADOG_PATH, Span, datadog_agent

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
DDTRACE_RUN = str(Path(sys.executable).with_name("ddtrace-run"))
STAGES = {"tokenize", "queue", "inference"}


@dataclass(frozen=True)
class Traced:
    """The Agent's traces and the log of a gateway after a request that succeeded and one that failed."""

    spans: list[Span]
    paths: set[str]
    answers: list[httpx.Response]
    log: list[dict[str, Any]]

    def named(self, name: str) -> Span:
        (span,) = (span for span in self.spans if span.name == name and span.trace_id == TRACE_ID)
        return span


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("gateway")
    with datadog_agent() as agent:
        environ = {
            "DD_TRACE_OTEL_ENABLED": "true",
            "DD_TRACE_AGENT_URL": agent.url,
            "DD_SERVICE": "embedding-gateway",
            "DD_LOGS_INJECTION": "false",
            "DD_TRACE_SAMPLING_RULES": '[{"resource": "GET /health*", "sample_rate": 0}]',
            "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
            "DD_REMOTE_CONFIGURATION_ENABLED": "false",
            "GATEWAY_LOG_FORMAT": "json",
        }
        with running_gateway(folder, DDTRACE_RUN, **environ) as gateway:
            url = f"{gateway.base_url}/embeddings"
            parent = {"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01"}
            answers = [
                httpx.post(url, json={"model": "default", "input": "a text"}, headers=parent),
                httpx.post(url, json={"model": "default", "input": "a text", "dimensions": 5}),
            ]
            agent.wait_for(lambda spans: len([span for span in spans if "embeddings" in span.name]) >= 4)
        lines = (folder / "gateway.log").read_text().splitlines()
        log = [json.loads(line) for line in lines if line.startswith("{")]
        yield Traced(agent.spans, {path for path, _ in agent.requests}, answers, log)


def test_a_request_is_one_trace_with_the_span_of_the_request_and_ours(traced: Traced) -> None:
    ours = [span for span in traced.spans if span.trace_id == TRACE_ID]
    assert {span.name for span in ours} == {"POST /v1/embeddings", "embeddings default", *STAGES}
    assert len(ours) == 5  # the request once: not by us as well, nor by the web framework
    request, embeddings = traced.named("POST /v1/embeddings"), traced.named("embeddings default")
    assert request.parent_id == CALLER_ID
    assert request.attributes["name"] == "fastapi.request"
    assert embeddings.parent_id == request.span_id
    assert {traced.named(stage).parent_id for stage in STAGES} == {embeddings.span_id}


def test_the_spans_have_the_same_attributes_as_elsewhere(traced: Traced) -> None:
    request = traced.named("POST /v1/embeddings").attributes
    assert request["service"] == "embedding-gateway"
    assert request["http.status_code"] == "200"
    assert request["gateway.request_id"] == traced.answers[0].headers["x-request-id"]
    embeddings = traced.named("embeddings default").attributes
    assert embeddings["gen_ai.operation.name"] == "embeddings"
    assert embeddings["gen_ai.response.model"] == MODEL
    assert embeddings["gen_ai.embeddings.dimension.count"] == WIDTH
    assert embeddings["gen_ai.usage.input_tokens"] == traced.answers[0].json()["usage"]["prompt_tokens"]


def test_an_error_has_its_code(traced: Traced) -> None:
    request_id = traced.answers[1].headers["x-request-id"]
    (request,) = (span for span in traced.spans if span.attributes.get("gateway.request_id") == request_id)
    (embeddings,) = (span for span in traced.spans if span.parent_id == request.span_id)
    assert traced.answers[1].status_code == 400
    assert request.attributes["gateway.error_code"] == "unsupported_dimensions"
    assert embeddings.attributes["error.type"] == "unsupported_dimensions"


def test_the_access_log_joins_the_trace(traced: Traced) -> None:
    lines = [line for line in traced.log if line["event"] == "request" and line.get("trace_id") == TRACE_ID]
    assert [line["span_id"] for line in lines] == [traced.named("POST /v1/embeddings").span_id]


def test_health_checks_are_for_the_agent_to_drop(traced: Traced) -> None:
    kept = {span.name for span in traced.spans if span.attributes.get("_sampling_priority_v1") == 1}
    dropped = {span.name for span in traced.spans if span.attributes.get("_sampling_priority_v1") == -1}
    assert kept == {"POST /v1/embeddings"}
    assert dropped == {"GET /health/ready"}


def test_the_agent_is_sent_nothing_but_traces(traced: Traced) -> None:
    assert traced.paths <= {"/info", DATADOG_PATH}
