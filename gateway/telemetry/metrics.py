"""Every Prometheus metric. Labels hold only names from the registry, never what a client sent.

``docs/metrics.md`` is generated from what is declared here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from gateway import __version__

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
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

# What an embedding request is counted under. A request outside an experiment has no experiment and no arm, and one to a
# model without tasks no task: the labels are empty.
_TARGET = ["model", "task", "experiment", "arm"]
EMBED_REQUESTS = Counter(
    "gateway_embed_requests",
    "Requests for embeddings or scores that reached a model, by `ok` or the code of the error.",
    [*_TARGET, "outcome"],
    registry=REGISTRY,
)
EMBED_SECONDS = Histogram(
    "gateway_embed_duration_seconds",
    "Time from the choice of the model to the finished vectors or scores.",
    _TARGET,
    buckets=_SECONDS,
    registry=REGISTRY,
)
TEXTS = Counter("gateway_texts", "Texts embedded or scored.", _TARGET, registry=REGISTRY)
TOKENS = Counter(
    "gateway_tokens",
    "Tokens embedded or scored, after truncation; a query counts once with each text.",
    _TARGET,
    registry=REGISTRY,
)
TRUNCATED = Counter("gateway_truncated_texts", "Texts cut to the model's length.", _TARGET, registry=REGISTRY)
STAGE_SECONDS = Histogram(
    "gateway_stage_duration_seconds",
    "Wall-clock time that such a request spent in a stage: tokenize, queue, inference, serialize. Each moment counts once: "
    "the stages of a request add up to at most its duration, however many batches ran side by side.",
    [*_TARGET, "stage"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
FALLBACKS = Counter(
    "gateway_fallbacks",
    "Requests that another model of the same space answered, by the error of the first.",
    ["model", "fallback", "code"],
    registry=REGISTRY,
)
TOKENIZER_REQUESTS = Counter(
    "gateway_tokenizer_requests",
    "Requests to tokenize texts or decode token ids, by `ok` or the code of the error.",
    ["model", "operation", "outcome"],
    registry=REGISTRY,
)
SHADOW_REQUESTS = Counter(
    "gateway_shadow_requests",
    "Copied requests, by `ok`, `dropped` or the code of the error.",
    ["of", "to", "outcome"],
    registry=REGISTRY,
)
SHADOW_TEXTS = Counter("gateway_shadow_texts", "Texts embedded for shadows.", ["of", "to"], registry=REGISTRY)
SHADOW_TOKENS = Counter("gateway_shadow_tokens", "Tokens embedded for shadows.", ["of", "to"], registry=REGISTRY)
SHADOW_SECONDS = Histogram(
    "gateway_shadow_duration_seconds",
    "Time that the second model took for a copied request, its queue included.",
    ["of", "to"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
SHADOW_QUEUE = Gauge("gateway_shadow_queue", "Copied requests that wait.", ["of", "to"], registry=REGISTRY)
DROPPED_EXPOSURES = Counter(
    "gateway_exposures_dropped",
    "Failed attempts to write a line of the exposure log. The line is written when there is room again.",
    registry=REGISTRY,
)
RELOADS = Counter("gateway_reloads", "Reloads of the registry, by `ok` or `refused`.", ["outcome"], registry=REGISTRY)
KEY_RELOADS = Counter(
    "gateway_key_reloads",
    "Readings of a changed file of API keys, by `ok` or `refused`.",
    ["outcome"],
    registry=REGISTRY,
)
QUOTA_ERRORS = Counter(
    "gateway_quota_errors",
    "Requests that passed uncounted, as the storage of quotas did not answer.",
    registry=REGISTRY,
)
SLOW_CONNECTIONS = Counter(
    "gateway_slow_connections",
    "Connections closed because what was begun did not come (receive), or an answer was not taken (send), in time.",
    ["side"],
    registry=REGISTRY,
)
MEMORY_RESERVED = Gauge(
    "gateway_memory_reserved_bytes",
    "Memory that requests hold, or are about to: bodies, texts and tokens that wait, answers that have not been read.",
    registry=REGISTRY,
)
MEMORY_BUDGET = Gauge(
    "gateway_memory_budget_bytes",
    "How much they may hold together (`GATEWAY_MEMORY_BUDGET_BYTES`); requests beyond are refused (`memory_full`).",
    registry=REGISTRY,
)
CONNECTIONS = Gauge(
    "gateway_connections",
    "Open connections of clients. Each takes a file descriptor, of which there are `process_max_fds`.",
    registry=REGISTRY,
)
FILE_LIMIT_REACHED = Counter(
    "gateway_file_limit_reached",
    "Checks that found no file descriptor left: new connections are reset until some are closed.",
    registry=REGISTRY,
)
LOG_LINES_DROPPED = Counter(
    "gateway_log_lines_dropped",
    "Lines of the log that were dropped because standard error was not read, or is closed.",
    registry=REGISTRY,
)
# What an alert waits for must be seen at 0 first: the first of a kind would not be an increase.
for _outcome in ("ok", "refused"):
    RELOADS.labels(_outcome)
    KEY_RELOADS.labels(_outcome)
BATCH_TEXTS = Histogram(
    "gateway_batch_texts", "Texts in a batch.", ["model"], buckets=_POWERS_OF_TWO[:12], registry=REGISTRY
)
BATCH_TOKENS = Histogram(
    "gateway_batch_tokens", "Tokens in a batch, without padding.", ["model"], buckets=_POWERS_OF_TWO, registry=REGISTRY
)
BATCH_FILL = Histogram(
    "gateway_batch_fill_ratio",
    "Tokens of a batch as a share of the most that it may have. Always full: a larger `max_batch_tokens` may be faster.",
    ["model"],
    buckets=_SHARES,
    registry=REGISTRY,
)
COMPUTED_TOKENS = Counter(
    "gateway_computed_tokens",
    "Tokens that forwards have computed, padding included: `gateway_batch_tokens_sum` has those without.",
    ["model"],
    registry=REGISTRY,
)
QUEUE_TEXTS = Gauge("gateway_queue_texts", "Texts admitted and not yet answered.", ["model"], registry=REGISTRY)
QUEUE_TOKENS = Gauge(
    "gateway_queue_tokens",
    "Tokens of the texts admitted and not yet answered, estimated.",
    ["model"],
    registry=REGISTRY,
)
QUEUE_OLDEST_SECONDS = Gauge(
    "gateway_queue_oldest_seconds",
    "How long the oldest request that the model has not answered yet has been waiting.",
    ["model"],
    registry=REGISTRY,
)
FAILED_BATCHES = Counter("gateway_failed_batches", "Batches whose forward raised.", ["model"], registry=REGISTRY)
WORKER_FAULTS = Counter(
    "gateway_worker_faults",
    "Faults of the gateway's own code in a computing thread; the batch in its hands is lost. Report them.",
    ["model"],
    registry=REGISTRY,
)
ENGINE_RESTARTS = Counter(
    "gateway_engine_restarts", "Attempts to load a model anew after it hung or failed.", ["model"], registry=REGISTRY
)
UPSTREAM_REQUESTS = Counter(
    "gateway_upstream_requests",
    "Requests to the servers of models that run elsewhere. `outcome`: ok, refused, overloaded, unready, unreachable, "
    "timeout, broken, failed, wrong, abandoned (by a client).",
    ["model", "server", "outcome"],
    registry=REGISTRY,
)
UPSTREAM_SECONDS = Histogram(
    "gateway_upstream_seconds",
    "How long a server took to answer.",
    ["model", "server"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
UPSTREAM_RETRIES = Counter(
    "gateway_upstream_retries",
    "Requests that were sent again, as a server had not answered or was too busy.",
    ["model"],
    registry=REGISTRY,
)
UPSTREAM_UP = Gauge(
    "gateway_upstream_up",
    "1 while a server is sent requests, 0 while it is only tried from time to time.",
    ["model", "server"],
    registry=REGISTRY,
)
UPSTREAM_TEXTS = Gauge(
    "gateway_upstream_texts", "Texts on their way to a server.", ["model", "server"], registry=REGISTRY
)
MODEL_READY = Gauge("gateway_model_ready", "1 when the model answers, else 0.", ["model"], registry=REGISTRY)
MODEL_STATE = Gauge(
    "gateway_model_state",
    "1 for the state that the model is in, 0 for the others: disabled, loading, ready, recovering, failed, stopped.",
    ["model", "state"],
    registry=REGISTRY,
)
MODEL_INFO = Gauge(
    "gateway_model_info",
    "1 for each model whose checkpoint has been read: what it is and runs on. `space` is that of its default task.",
    ["model", "source", "revision", "space", "dtype", "device", "runtime"],
    registry=REGISTRY,
)
GOLDEN_COSINE = Gauge(
    "gateway_golden_min_cosine",
    "Smallest cosine between a golden vector and the same text computed here, at the last check.",
    ["model"],
    registry=REGISTRY,
)
GOLDEN_LIMIT = Gauge(
    "gateway_golden_limit_cosine",
    "Smallest cosine to a golden vector that the model's number format explains; below it the model is loaded anew.",
    ["model"],
    registry=REGISTRY,
)
GPU_MEMORY = Gauge(
    "gateway_gpu_memory_bytes",
    "Memory of a card: `total`, `used` by all processes, `allocated` by this one's tensors.",
    ["device", "kind"],
    registry=REGISTRY,
)
GPU_UTILIZATION = Gauge(
    "gateway_gpu_utilization_ratio",
    "Share of the last moments in which the card computed something, whoever for.",
    ["device"],
    registry=REGISTRY,
)
BUILD_INFO = Gauge("gateway_build_info", "1; the version of the gateway.", ["version"], registry=REGISTRY)
BUILD_INFO.labels(__version__).set(1)

_scrape_readers: list[Callable[[], None]] = []


def at_scrape(reader: Callable[[], None]) -> None:
    """Have ``reader`` called once before every scrape, to set what is not worth setting all the time."""
    if reader not in _scrape_readers:
        _scrape_readers.append(reader)


def declared() -> list[MetricWrapperBase]:
    """Return every metric of the gateway's own, in the order of its declaration."""
    return [metric for metric in globals().values() if isinstance(metric, MetricWrapperBase)]


def describe_model(model: str, **facts: str) -> None:
    """Say what a model is, in place of what was said before.

    Args:
        facts: the other labels of :data:`MODEL_INFO`.
    """
    MODEL_INFO.remove_by_labels({"model": model})
    MODEL_INFO.labels(model=model, **facts).set(1)


def forget_model(model: str) -> None:
    """Remove everything under the name of a model that is no more."""
    _forget(model=model)
    _forget(fallback=model)


def forget_server(model: str, server: str) -> None:
    """Remove everything under the name of a server that runs a model no more."""
    _forget(model=model, server=server)


def forget_experiment(experiment: str, arm: str | None = None) -> None:
    """Remove everything under the name of an experiment, or of one of its arms, that is no more."""
    if arm is None:
        _forget(experiment=experiment)
    else:
        _forget(experiment=experiment, arm=arm)


def forget_shadow(of: str, to: str) -> None:
    """Remove everything under the names of a shadow that is no more."""
    _forget(of=of, to=to)


def _forget(**labels: str) -> None:
    meters.cache_clear()
    for metric in declared():
        if set(labels) <= set(metric._labelnames):
            metric.remove_by_labels(labels)


def render() -> bytes:
    """Return all metrics in Prometheus' text format."""
    for reader in _scrape_readers:
        reader()
    return generate_latest(REGISTRY)


class Meters:
    """The metrics of one target, looked up once: that costs more than counting."""

    def __init__(self, model: str, task: str, experiment: str, arm: str) -> None:
        self._labels = (model, task, experiment, arm)
        self.seconds = EMBED_SECONDS.labels(*self._labels)
        self.texts = TEXTS.labels(*self._labels)
        self.tokens = TOKENS.labels(*self._labels)
        self.truncated = TRUNCATED.labels(*self._labels)
        self.tokenize_s, self.queue_s, self.inference_s, self.serialize_s = (
            STAGE_SECONDS.labels(*self._labels, stage) for stage in ("tokenize", "queue", "inference", "serialize")
        )
        self._ok = EMBED_REQUESTS.labels(*self._labels, "ok")

    def count(self, error_code: str | None = None) -> None:
        """Count a request that ended well, or in an error."""
        (self._ok if error_code is None else EMBED_REQUESTS.labels(*self._labels, error_code)).inc()


@lru_cache(maxsize=4096)
def meters(model: str, task: str | None, experiment: str | None, arm: str | None) -> Meters:
    """Return the metrics of a target; the same ones every time."""
    return Meters(model, task or "", experiment or "", arm or "")
