"""Every Prometheus metric. Labels hold only names from the registry, never what a client sent."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_POWERS_OF_TWO = tuple(2**n for n in range(16))

REQUESTS = Counter("gateway_requests", "Answered HTTP requests.", ["path", "status"], registry=REGISTRY)
REQUEST_SECONDS = Histogram(
    "gateway_request_duration_seconds",
    "Time from the first byte of a request to the last of its answer.",
    ["path"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
IN_FLIGHT = Gauge("gateway_requests_in_flight", "HTTP requests being answered.", registry=REGISTRY)
ERRORS = Counter("gateway_errors", "Requests answered with an error, by its code.", ["code"], registry=REGISTRY)

TEXTS = Counter("gateway_texts", "Texts embedded.", ["model"], registry=REGISTRY)
TOKENS = Counter("gateway_tokens", "Tokens embedded, after truncation.", ["model"], registry=REGISTRY)
TRUNCATED = Counter("gateway_truncated_texts", "Texts cut to the model's length.", ["model"], registry=REGISTRY)
STAGE_SECONDS = Histogram(
    "gateway_stage_duration_seconds",
    "Time that an embedding request spent in a stage: tokenise, queue, inference.",
    ["model", "stage"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
BATCH_TEXTS = Histogram(
    "gateway_batch_texts", "Texts in a batch.", ["model"], buckets=_POWERS_OF_TWO[:12], registry=REGISTRY
)
BATCH_TOKENS = Histogram(
    "gateway_batch_tokens", "Tokens in a batch, without padding.", ["model"], buckets=_POWERS_OF_TWO, registry=REGISTRY
)
QUEUE_TEXTS = Gauge("gateway_queue_texts", "Texts admitted and not yet answered.", ["model"], registry=REGISTRY)
FAILED_BATCHES = Counter("gateway_failed_batches", "Batches whose forward raised.", ["model"], registry=REGISTRY)
ENGINE_RESTARTS = Counter(
    "gateway_engine_restarts", "Attempts to load a model anew after it hung or failed.", ["model"], registry=REGISTRY
)
MODEL_READY = Gauge("gateway_model_ready", "1 when the model answers, else 0.", ["model"], registry=REGISTRY)


def render() -> bytes:
    """Return all metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
