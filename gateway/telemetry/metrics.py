"""The Prometheus metrics. Labels hold only names from the registry, never text that a client sent.

``docs/metrics.md`` is generated from these declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

import prometheus_client
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from gateway import __version__

# Without this, each series has a second one with its creation time, which no rule and no dashboard uses.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_POWERS_OF_TWO = tuple(2**n for n in range(16))

# Each declaration below goes to the gateway's own registry. A histogram is of seconds unless it gives its own buckets.
Counter = partial(prometheus_client.Counter, registry=REGISTRY)
Gauge = partial(prometheus_client.Gauge, registry=REGISTRY)
Histogram = partial(prometheus_client.Histogram, buckets=_SECONDS, registry=REGISTRY)

REQUESTS = Counter("gateway_requests", "HTTP requests answered.", ["path", "status"])
REQUEST_SECONDS = Histogram(
    "gateway_request_duration_seconds", "Time from the first byte of a request to the last of its response.", ["path"]
)
IN_FLIGHT = Gauge("gateway_requests_in_flight", "HTTP requests in progress.")
ERRORS = Counter("gateway_errors", "Requests answered with an error, by error code.", ["code"])

# The labels of an embedding request. Those that do not apply (no experiment, no arm, a model without tasks) are empty.
_TARGET = ["model", "task", "experiment", "arm"]
EMBED_REQUESTS = Counter(
    "gateway_embed_requests",
    "Requests for embeddings or scores that reached a model, by `ok` or the error code.",
    [*_TARGET, "outcome"],
)
EMBED_SECONDS = Histogram(
    "gateway_embed_duration_seconds", "Time from choosing the model to the finished vectors or scores.", _TARGET
)
TEXTS = Counter("gateway_texts", "Texts embedded or scored.", _TARGET)
TOKENS = Counter(
    "gateway_tokens", "Tokens embedded or scored, after truncation; a query counts once per text.", _TARGET
)
TRUNCATED = Counter("gateway_truncated_texts", "Texts truncated to the model's maximum length.", _TARGET)
STAGE_SECONDS = Histogram(
    "gateway_stage_duration_seconds",
    "Wall-clock time that an embedding or rerank request spent in a stage: tokenize, queue, inference, serialize. Each "
    "moment counts once: the stages of a request add up to at most its duration, however many batches run in parallel.",
    [*_TARGET, "stage"],
)
FALLBACKS = Counter(
    "gateway_fallbacks",
    "Requests answered by a fallback, another model of the same space, by the error code of the first model.",
    ["model", "fallback", "code"],
)
TOKENIZER_REQUESTS = Counter(
    "gateway_tokenizer_requests",
    "Requests to tokenize texts or decode token ids, by `ok` or the error code.",
    ["model", "operation", "outcome"],
)
CACHE_TEXTS = Counter(
    "gateway_cache_texts",
    "Texts of a model with a cache, by where their vectors came from: `memory`, `disk`, `redis`, or `miss` for those that "
    "were computed. The hit rate is the share of all but `miss`.",
    ["model", "outcome"],
)
CACHE_BYTES = Gauge("gateway_cache_bytes", "Memory that the vectors in a model's cache take.", ["model"])
CACHE_EVICTIONS = Counter(
    "gateway_cache_evictions", "Entries evicted from a model's cache for lack of room.", ["model"]
)
CACHE_ERRORS = Counter(
    "gateway_cache_errors",
    "Times that the disk or Redis of a model's cache failed, was too slow, or had too much to write. Requests are answered "
    "without it.",
    ["model", "store"],
)
SHADOW_REQUESTS = Counter(
    "gateway_shadow_requests", "Shadow requests, by `ok`, `dropped` or the error code.", ["of", "to", "outcome"]
)
CAPTURED_TEXTS = Counter(
    "gateway_captured_texts",
    "Texts sampled for a capture: `written`, `scrubbed` (the hook dropped them), `dropped` (too many waited), `too_long`, "
    "`full` (the file of the day), or `failed`.",
    ["name", "outcome"],
)
SHADOW_TEXTS = Counter("gateway_shadow_texts", "Texts embedded for shadows.", ["of", "to"])
SHADOW_TOKENS = Counter("gateway_shadow_tokens", "Tokens embedded for shadows.", ["of", "to"])
SHADOW_SECONDS = Histogram(
    "gateway_shadow_duration_seconds",
    "Duration of a shadow request on the second model, including its time in the queue.",
    ["of", "to"],
)
SHADOW_QUEUE = Gauge("gateway_shadow_queue", "Shadow requests waiting to be sent.", ["of", "to"])
DROPPED_EXPOSURES = Counter(
    "gateway_exposures_dropped",
    "Failed attempts to write a line to the exposure log. The line is retried when there is room again.",
)
RELOADS = Counter("gateway_reloads", "Reloads of the registry, by `ok` or `refused`.", ["outcome"])
KEY_RELOADS = Counter(
    "gateway_key_reloads", "Reloads of the API key file after a change, by `ok` or `refused`.", ["outcome"]
)
QUOTA_ERRORS = Counter(
    "gateway_quota_errors", "Requests admitted without being counted, because the quota storage did not respond."
)
SLOW_CONNECTIONS = Counter(
    "gateway_slow_connections",
    "Connections closed because the client sent its request (`receive`), or read its response (`send`), too slowly.",
    ["side"],
)
MEMORY_RESERVED = Gauge(
    "gateway_memory_reserved_bytes",
    "Memory reserved by requests: bodies, waiting texts and tokens, and responses that have not been read.",
)
MEMORY_BUDGET = Gauge(
    "gateway_memory_budget_bytes",
    "Maximum of the memory reserved by all requests (`GATEWAY_MEMORY_BUDGET_BYTES`); requests beyond it are refused "
    "(`memory_full`).",
)
CONNECTIONS = Gauge(
    "gateway_connections", "Open client connections. Each uses one file descriptor out of `process_max_fds`."
)
FILE_LIMIT_REACHED = Counter(
    "gateway_file_limit_reached",
    "Checks that found no free file descriptor: new connections are reset until others close.",
)
LOG_LINES_DROPPED = Counter(
    "gateway_log_lines_dropped", "Log lines dropped because standard error is closed or is not being read."
)
# An alert must see a series at 0 first; otherwise the first event is not an increase.
for _outcome in ("ok", "refused"):
    RELOADS.labels(_outcome)
    KEY_RELOADS.labels(_outcome)
BATCH_TEXTS = Histogram("gateway_batch_texts", "Texts per batch.", ["model"], buckets=_POWERS_OF_TWO[:12])
BATCH_TOKENS = Histogram(
    "gateway_batch_tokens", "Tokens per batch, without padding.", ["model"], buckets=_POWERS_OF_TWO
)
BATCH_FILL = Histogram(
    "gateway_batch_fill_ratio",
    "Tokens of a batch as a fraction of its token limit. If batches are always full, a larger `max_batch_tokens` may be "
    "faster.",
    ["model"],
    buckets=_SHARES,
)
COMPUTED_TOKENS = Counter(
    "gateway_computed_tokens",
    "Tokens computed by forward passes, padding included; `gateway_batch_tokens_sum` excludes it.",
    ["model"],
)
QUEUE_TEXTS = Gauge("gateway_queue_texts", "Texts admitted and not yet answered.", ["model"])
QUEUE_TOKENS = Gauge("gateway_queue_tokens", "Estimated tokens of the texts admitted and not yet answered.", ["model"])
QUEUE_OLDEST_SECONDS = Gauge(
    "gateway_queue_oldest_seconds", "Age of the oldest request that the model has not answered yet.", ["model"]
)
LOW_QUEUE_TEXTS = Gauge(
    "gateway_low_priority_queue_texts",
    "Low-priority texts admitted and not yet answered. `gateway_queue_*` leave these out.",
    ["model"],
)
LOW_QUEUE_OLDEST_SECONDS = Gauge(
    "gateway_low_priority_queue_oldest_seconds",
    "Age of the oldest low-priority request that the model has not answered yet: it grows while requests of normal "
    "priority leave no time for it.",
    ["model"],
)
BATCH_JOBS = Gauge(
    "gateway_batch_api_open", "Batches of the Batch API that have not ended, by their state.", ["status"]
)
BATCH_JOBS_ENDED = Counter(
    "gateway_batch_api_ended", "Batches that ended: `completed`, `failed`, `expired`, `cancelled`.", ["status"]
)
BATCH_LINES = Counter(
    "gateway_batch_api_lines",
    "Requests of batches: `completed`, `failed`, `expired`, `cancelled`, and `repeated` because a quota, a queue or a model "
    "refused one.",
    ["outcome"],
)
BATCH_BYTES = Gauge("gateway_batch_api_bytes", "Bytes of all files in GATEWAY_BATCH_DIR.")
FAILED_BATCHES = Counter("gateway_failed_batches", "Batches whose forward pass raised an error.", ["model"])
RECOMPUTED_TEXTS = Counter(
    "gateway_recomputed_texts",
    "Texts whose vectors were not finite with `fp16_accumulation`, and were computed again with float32 accumulation.",
    ["model"],
)
WORKER_FAULTS = Counter(
    "gateway_worker_faults",
    "Bugs of the gateway that hit a worker thread; the batch it was computing is lost. Please report them.",
    ["model"],
)
ENGINE_RESTARTS = Counter("gateway_engine_restarts", "Attempts to reload a model after it hung or failed.", ["model"])
DEVICES_LOST = Counter(
    "gateway_device_lost",
    "Cards lost while a model used them: a forward pass hung, or a CUDA error was fatal. The process then ends with "
    "exit code 75, to be started again.",
    ["model"],
)
MODEL_LOADS = Counter(
    "gateway_model_loads", "Loads of a model that is loaded on demand, by `ok` or `failed`.", ["model", "outcome"]
)
MODEL_LOAD_SECONDS = Histogram(
    "gateway_model_load_seconds",
    "Duration of a successful load on demand, including the wait for its turn and for room, until the model is warm.",
    ["model"],
    buckets=(1, 2.5, 5, 10, 20, 30, 60, 120, 300),
)
MODEL_UNLOADS = Counter(
    "gateway_model_unloads",
    "Times that a model loaded on demand left the memory: it was `idle`, another model needed the `memory`, or the "
    "`operator` unloaded it.",
    ["model", "reason"],
)
UPSTREAM_REQUESTS = Counter(
    "gateway_upstream_requests",
    "Requests to upstream servers. `outcome`: ok, refused, overloaded, unready, unreachable, timeout, broken, failed, "
    "wrong, abandoned (by a client).",
    ["model", "server", "outcome"],
)
UPSTREAM_SECONDS = Histogram("gateway_upstream_seconds", "Response time of an upstream server.", ["model", "server"])
UPSTREAM_RETRIES = Counter(
    "gateway_upstream_retries",
    "Requests sent again because an upstream server did not respond or was too busy.",
    ["model"],
)
UPSTREAM_UP = Gauge(
    "gateway_upstream_up",
    "1 while an upstream server receives requests, 0 while it is only probed.",
    ["model", "server"],
)
UPSTREAM_LOOKUPS = Counter(
    "gateway_upstream_lookups",
    "Look-ups of the names in `dns+http://` URLs. `outcome`: ok, failed (no address, or no resolver), timeout.",
    ["model", "outcome"],
)
UPSTREAM_TEXTS = Gauge("gateway_upstream_texts", "Texts in flight to an upstream server.", ["model", "server"])
MODEL_READY = Gauge(
    "gateway_model_ready", "1 if the model takes requests: it is ready, or is loaded on demand; else 0.", ["model"]
)
MODEL_STATE = Gauge(
    "gateway_model_state",
    "1 for the current state of the model, 0 for the others: disabled, unloaded, downloading, loading, ready, recovering, "
    "failed, stopped.",
    ["model", "state"],
)
REPLICAS_WANTED = Gauge(
    "gateway_replicas_wanted", "The smallest number of replicas that a model should have on a cluster.", ["model"]
)
REPLICAS_USABLE = Gauge(
    "gateway_replicas_usable", "The replicas of a model on a cluster that accept jobs of this gateway.", ["model"]
)
REPLICAS_LOST = Counter(
    "gateway_replicas_lost",
    "Replicas on a cluster that this gateway lost: the process, its card or its machine ended, or does not answer.",
    ["model"],
)
MODEL_INFO = Gauge(
    "gateway_model_info",
    "1 for each model whose checkpoint has been read, with its properties. `space` is the space of its default task.",
    ["model", "source", "revision", "space", "dtype", "device", "runtime"],
)
GOLDEN_COSINE = Gauge(
    "gateway_golden_min_cosine",
    "Lowest cosine similarity between a golden vector and the vector computed here, at the last check.",
    ["model"],
)
GOLDEN_LIMIT = Gauge(
    "gateway_golden_limit_cosine",
    "Lowest cosine similarity to a golden vector that the model's number format explains; below it the model is reloaded.",
    ["model"],
)
GPU_MEMORY = Gauge(
    "gateway_gpu_memory_bytes",
    "GPU memory: `total`, `used` by all processes, `allocated` by the tensors of this process.",
    ["device", "kind"],
)
GPU_UTILIZATION = Gauge(
    "gateway_gpu_utilization_ratio",
    "Fraction of the last sample period in which the GPU was busy, for any process.",
    ["device"],
)
BUILD_INFO = Gauge("gateway_build_info", "Always 1; the label is the version of the gateway.", ["version"])
BUILD_INFO.labels(__version__).set(1)

_scrape_readers: list[Callable[[], None]] = []


def at_scrape(reader: Callable[[], None]) -> None:
    """Call ``reader`` before every scrape, to set metrics that are not worth updating all the time."""
    if reader not in _scrape_readers:
        _scrape_readers.append(reader)


class Declared(NamedTuple):
    """A metric as declared here; the name of a counter is without ``_total``."""

    metric: MetricWrapperBase
    name: str
    kind: str | None
    labels: tuple[str, ...]
    help: str


def declared() -> list[Declared]:
    """Return every metric declared here, in order."""
    found = [value for value in globals().values() if isinstance(value, MetricWrapperBase)]
    return [Declared(each, each._name, each._type, tuple(each._labelnames), each._documentation) for each in found]


def values(metric: MetricWrapperBase) -> dict[tuple[str, ...], float]:
    """Return the value of each series of a counter or a gauge, by its labels in the order of their declaration."""
    name = f"{metric._name}_total" if metric._type == "counter" else metric._name
    return {
        tuple(sample.labels[label] for label in metric._labelnames): sample.value
        for family in metric.collect()
        for sample in family.samples
        if sample.name == name
    }


def count_replicas(counts: Mapping[str, tuple[int, int]]) -> None:
    """Set the numbers of replicas on a cluster, and remove those of other models.

    Args:
        counts: for each model on the cluster, its usable replicas, and how many it should have.
    """
    for gauge in (REPLICAS_USABLE, REPLICAS_WANTED):
        for (model,) in values(gauge).keys() - {(model,) for model in counts}:
            gauge.remove_by_labels({"model": model})
    for model, (num_usable, num_wanted) in counts.items():
        REPLICAS_USABLE.labels(model).set(num_usable)
        REPLICAS_WANTED.labels(model).set(num_wanted)


def describe_model(model: str, **facts: str) -> None:
    """Set the info of a model, and remove its earlier one.

    Args:
        facts: the other labels of :data:`MODEL_INFO`.
    """
    MODEL_INFO.remove_by_labels({"model": model})
    MODEL_INFO.labels(model=model, **facts).set(1)


def refresh() -> None:
    """Update the metrics whose values are read only on demand."""
    for reader in _scrape_readers:
        reader()


def render() -> bytes:
    """Return all metrics in Prometheus' text format."""
    refresh()
    return generate_latest(REGISTRY)


class TargetMetrics:
    """The metrics of one target, looked up once: the lookup costs more than the counting."""

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
        """Count a request that succeeded, or failed with an error."""
        (self._ok if error_code is None else EMBED_REQUESTS.labels(*self._labels, error_code)).inc()


@lru_cache(maxsize=4096)
def target_metrics(model: str, task: str | None, experiment: str | None, arm: str | None) -> TargetMetrics:
    """Return the metrics of a target, cached."""
    return TargetMetrics(model, task or "", experiment or "", arm or "")
