"""The spans of requests, as an in-memory exporter of OpenTelemetry's SDK gets them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs
from structlog.typing import EventDict

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Experiment, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import OutOfMemory
from gateway.fleet import Fleet, Model
from gateway.telemetry import semconv, tracing
from gateway.types import Embeddings, EmbedJob, ModelKind, Timings

MakeModel = Callable[..., Model]
MakeFleet = Callable[..., tuple[Registry, Fleet]]
Post = Callable[..., Any]

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01", "tracestate": "vendor=1"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-00"}
TIMINGS = Timings(tokenize_s=0.001, queue_s=0.002, inference_s=0.003)
SECRET_TEXT, SECRET_KEY = "the patient's diagnosis", "key-that-must-stay-secret"
INFO = fake_info("jina", width=8, dimensions=(8, 4), tasks={"text-matching": ""}, default_task="text-matching")
ARMS = ({"name": "new", "model": "jina", "weight": 1}, {"model": "mini", "weight": 0})
EXPERIMENT = Experiment.model_validate({"id": "exp", "kind": "cross_space", "unit": ("body:user",), "arms": ARMS})


class Backend(FakeBackend):
    """Takes as long as :data:`TIMINGS` says, calls out as a backend on another machine would, and fails on some texts."""

    def __init__(self) -> None:
        super().__init__(INFO, delay_s=0.01)
        self.sent_headers: dict[str, str] = {}

    async def embed(self, job: EmbedJob) -> Embeddings:
        if "out of memory" in job.texts:
            raise OutOfMemory("not enough memory")
        if "broken" in job.texts:
            raise RuntimeError(f"cannot read {SECRET_TEXT}")
        tracing.inject(self.sent_headers)
        result = await super().embed(job)
        return Embeddings(result.vectors, result.num_tokens, result.truncated, TIMINGS)


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.use(None)
    provider.shutdown()


@pytest.fixture(autouse=True)
def lines() -> Iterator[list[EventDict]]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
async def client(backend: Backend, make_model: MakeModel, make_fleet: MakeFleet) -> AsyncIterator[httpx.AsyncClient]:
    model = make_model("jina", backend=backend)
    model.info = INFO
    registry, fleet = make_fleet(model, make_model("mini"), aliases={"default": "jina"}, experiments=[EXPERIMENT])
    await backend.start()
    fleet.started.set()
    app = create_app(Deployment(registry, Settings(), fleet))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


async def embed(client: httpx.AsyncClient, text: str = "a b", **fields: object) -> httpx.Response:
    headers = fields.pop("headers", {})
    return await client.post("/v1/embeddings", json={"input": text, **fields}, headers=headers)  # type: ignore[arg-type]


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    spans = exporter.get_finished_spans()
    found = {span.name: span for span in spans}
    assert len(found) == len(spans), f"names are not unique: {[span.name for span in spans]}"
    return found


def parent(span: ReadableSpan) -> int | None:
    return span.parent and span.parent.span_id


async def test_a_request_is_one_trace_with_the_embedding_and_its_stages(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    assert (await embed(client, headers=SAMPLED)).status_code == 200

    spans = by_name(exporter)
    assert set(spans) == {"POST /v1/embeddings", "embeddings default", "tokenize", "queue", "inference"}
    request, embeddings = spans["POST /v1/embeddings"], spans["embeddings default"]
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE_ID}
    assert f"{parent(request):016x}" == CALLER_ID
    assert request.context.trace_state["vendor"] == "1"
    assert request.kind is SpanKind.SERVER
    assert parent(embeddings) == request.context.span_id
    assert embeddings.kind is SpanKind.INTERNAL
    for stage in ("tokenize", "queue", "inference"):
        assert parent(spans[stage]) == embeddings.context.span_id


async def test_scores_have_a_span_with_their_own_name(
    exporter: InMemorySpanExporter, make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    ranks = {"width": 1, "kind": ModelKind.RERANK}
    model = make_model("ranker", backend=FakeBackend(fake_info("ranker", **ranks)), **ranks)
    registry, fleet = make_fleet(model)
    await model.backend.start(model.report)
    app = create_app(Deployment(registry, Settings(), fleet))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        answer = await client.post("/v2/rerank", json={"query": "a b", "documents": ["c", "d e"]})

    assert answer.status_code == 200
    spans = by_name(exporter)
    assert set(spans) == {"POST /v2/rerank", "rerank ranker", "tokenize", "queue", "inference"}
    attributes = spans["rerank ranker"].attributes
    assert attributes[semconv.GEN_AI_OPERATION_NAME] == "rerank"
    assert (attributes[semconv.GATEWAY_NUM_TEXTS], attributes[semconv.GEN_AI_USAGE_INPUT_TOKENS]) == (2, 7)
    assert semconv.GATEWAY_SPACE not in attributes


async def test_a_request_without_a_parent_begins_a_trace(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await embed(client)
    await embed(client)

    requests = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert [parent(span) for span in requests] == [None, None]
    assert requests[0].context.trace_id != requests[1].context.trace_id


async def test_the_stages_take_as_long_as_the_answer_says(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await embed(client)

    spans = by_name(exporter)
    stages = [spans["tokenize"], spans["queue"], spans["inference"]]
    assert [span.end_time - span.start_time for span in stages] == [1_000_000, 2_000_000, 3_000_000]
    assert [span.attributes["gateway.stage.seconds"] for span in stages] == [0.001, 0.002, 0.003]
    assert stages[0].end_time == stages[1].start_time
    assert stages[1].end_time == stages[2].start_time
    assert stages[2].end_time <= spans["embeddings default"].end_time
    assert stages[0].start_time >= spans["embeddings default"].start_time


async def test_the_attributes_of_a_request(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    answer = await embed(client)

    assert by_name(exporter)["POST /v1/embeddings"].attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/embeddings",
        "url.path": "/v1/embeddings",
        "url.scheme": "http",
        "gateway.request_id": answer.headers["x-request-id"],
    }


async def test_the_attributes_of_an_embedding(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    await embed(client, "a b c", dimensions=4, encoding_format="base64")

    assert by_name(exporter)["embeddings default"].attributes == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "infinity",
        "gen_ai.request.model": "default",
        "gen_ai.request.encoding_formats": ("base64",),
        "gen_ai.response.model": "jina",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.embeddings.dimension.count": 4,
        "gateway.num_texts": 1,
        "gateway.num_truncated": 0,
        "gateway.space": INFO.space("text-matching", 4, is_normalized=True),
        "gateway.task": "text-matching",
    }


async def test_a_request_of_an_experiment_says_which_arm_it_was_in(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await embed(client, model="exp", user="ann")

    attributes = by_name(exporter)["embeddings exp"].attributes
    assert (attributes["gateway.experiment"], attributes["gateway.arm"]) == ("exp", "new")
    assert attributes["gen_ai.response.model"] == "jina"


@pytest.mark.parametrize("text", [SECRET_TEXT, "broken"], ids=["answered", "failed"])
async def test_no_span_holds_a_text_or_a_key(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, text: str
) -> None:
    await embed(client, text, user=SECRET_KEY, headers={"authorization": f"Bearer {SECRET_KEY}"})

    exported = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "embeddings default" in exported
    assert SECRET_TEXT not in exported
    assert SECRET_KEY not in exported


# ----------------------------------------------------------------------------------------------------------- errors


async def test_a_mistake_of_the_client_is_not_an_error_of_the_server(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    assert (await embed(client, dimensions=5)).status_code == 400

    spans = by_name(exporter)
    assert set(spans) == {"POST /v1/embeddings", "embeddings default"}
    request, embeddings = spans["POST /v1/embeddings"], spans["embeddings default"]
    assert request.status.status_code is StatusCode.UNSET
    assert request.attributes["gateway.error_code"] == "unsupported_dimensions"
    assert "error.type" not in request.attributes
    assert embeddings.status.status_code is StatusCode.ERROR
    assert embeddings.attributes["error.type"] == "unsupported_dimensions"


@pytest.mark.parametrize(("text", "code"), [("out of memory", "out_of_memory"), ("broken", "internal_error")])
async def test_a_fault_of_the_gateway_is_an_error_of_both_spans(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, text: str, code: str
) -> None:
    assert (await embed(client, text)).status_code == 500

    spans = by_name(exporter)
    for name in ("POST /v1/embeddings", "embeddings default"):
        assert spans[name].status.status_code is StatusCode.ERROR
        assert spans[name].status.description is None
        assert spans[name].attributes["error.type"] == code
        assert spans[name].events == ()  # the text of an exception may quote a request


async def test_a_name_that_no_model_has_is_in_no_span_name(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    assert (await embed(client, model="made-up")).status_code == 404

    assert set(by_name(exporter)) == {"POST /v1/embeddings"}


@pytest.mark.parametrize(("method", "name"), [("GET", "GET"), ("MADE-UP", "HTTP")])
async def test_invented_names_of_clients_are_in_no_span_name(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, method: str, name: str
) -> None:
    path = "/made/up" * 100
    assert (await client.request(method, path)).status_code == 404

    (span,) = exporter.get_finished_spans()
    assert span.name == name
    assert span.attributes["http.request.method"] == (method if method == "GET" else "_OTHER")
    assert span.attributes["url.path"] == path[:256]
    assert "http.route" not in span.attributes


async def test_a_client_that_goes_away_has_its_own_error_type(exporter: InMemorySpanExporter) -> None:
    """As the service sees it: the task that embeds is canceled."""

    async def embed_slowly() -> None:
        with tracing.embeddings_span(model="jina", provider="infinity", num_texts=1, encoding=None):
            await asyncio.sleep(60)

    task = asyncio.create_task(embed_slowly())
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

    (span,) = exporter.get_finished_spans()
    assert span.attributes["error.type"] == "client_disconnected"
    assert span.status.status_code is StatusCode.ERROR


# -------------------------------------------------------------------------------------- traced and untraced paths


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready/", "/metrics"])
async def test_probes_and_scrapes_are_not_traced(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, path: str
) -> None:
    assert (await client.get(path)).status_code in {200, 503}
    assert exporter.get_finished_spans() == ()

    await client.get("/v1/models")
    assert set(by_name(exporter)) == {"GET /v1/models"}


async def test_a_trace_that_the_caller_does_not_sample_is_not_recorded(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, backend: Backend, lines: list[EventDict]
) -> None:
    assert (await embed(client, headers=NOT_SAMPLED)).status_code == 200

    assert exporter.get_finished_spans() == ()
    assert ["trace_id" in line for line in lines if line["event"] == "request"] == [False]
    assert backend.sent_headers["traceparent"].startswith(f"00-{TRACE_ID}-")  # servers behind it need the trace
    assert backend.sent_headers["traceparent"].endswith("-00")


async def test_a_log_line_names_its_trace(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, lines: list[EventDict]
) -> None:
    await embed(client, "broken", headers=SAMPLED)

    span_id = f"{by_name(exporter)['POST /v1/embeddings'].context.span_id:016x}"
    assert {line["event"] for line in lines} >= {"request", "unexpected_error"}
    for line in lines:
        assert (line["event"], line["trace_id"], line["span_id"]) == (line["event"], TRACE_ID, span_id)


async def test_the_context_is_sent_with_the_gateways_own_requests(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, backend: Backend
) -> None:
    await embed(client, headers={**SAMPLED, "baggage": "tenant=a"})

    span_id = f"{by_name(exporter)['embeddings default'].context.span_id:016x}"
    assert backend.sent_headers["traceparent"] == f"00-{TRACE_ID}-{span_id}-01"
    assert backend.sent_headers["tracestate"] == "vendor=1"


async def test_in_the_span_of_another_tracer_no_second_one_is_opened(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    """As under ``ddtrace-run``, whose span for the request is there already."""
    provider = TracerProvider()
    with provider.get_tracer("outside").start_as_current_span("outside") as outer:
        answer = await embed(client, "out of memory", headers=SAMPLED)

    spans = by_name(exporter)
    assert set(spans) == {"embeddings default"}
    assert parent(spans["embeddings default"]) == outer.get_span_context().span_id
    assert outer.attributes == {  # type: ignore[attr-defined]
        "gateway.request_id": answer.headers["x-request-id"],
        "gateway.error_code": "out_of_memory",
        "error.type": "out_of_memory",
    }


def test_the_documentation_has_every_attribute() -> None:
    constants = [value for name, value in vars(semconv).items() if name.isupper() and isinstance(value, str)]
    names = [value for value in constants if "." in value]
    documented = (Path(__file__).parents[2] / "docs" / "tracing.md").read_text()

    assert "gen_ai.operation.name" in names
    assert [name for name in names if f"`{name}`" not in documented] == []
