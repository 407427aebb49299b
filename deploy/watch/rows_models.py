"""The rows of the dashboard about models, their batches, and the machine."""

from __future__ import annotations

from typing import Final

from deploy.watch.expressions import (
    OF_GATEWAY,
    Increase,
    Level,
    Mean,
    Panel,
    Present,
    Quantile,
    Rate,
    Row,
    Series,
    Share,
    quantiles,
)

_MODEL: Final = ("model",)
_INFO: Final = ("model", "source", "revision", "space", "dtype", "device", "runtime")

MODELS: Final = Row(
    "Models",
    [
        Panel("Requests", [Series(Rate("gateway_embed_requests_total", _MODEL), "{model}")], "per_second"),
        Panel("Latency", quantiles(Quantile(0, "gateway_embed_duration_seconds", _MODEL)), "seconds"),
        Panel("Texts", [Series(Rate("gateway_texts_total", ("model", "task")), "{model} {task}")]),
        Panel(
            "Where the time goes",
            [Series(Mean("gateway_stage_duration_seconds", ("model", "stage")), "{model} {stage}")],
            "seconds",
            is_stacked=True,
            description="Mean seconds of a request in each stage.",
        ),
        Panel(
            "p95 of stages",
            [Series(Quantile(0.95, "gateway_stage_duration_seconds", ("model", "stage")), "{model} {stage}")],
            "seconds",
        ),
        Panel(
            "Truncated texts",
            [
                Series(Rate("gateway_truncated_texts_total", _MODEL), "{model}"),
                Series(Rate("gateway_recomputed_texts_total", _MODEL), "{model} computed again"),
            ],
        ),
        Panel("State", [Series(Present("gateway_model_state", ("model", "state")), "{model} {state}")]),
        Panel(
            "Golden vectors",
            [
                Series(Level("gateway_golden_min_cosine", _MODEL, how="min"), "{model}"),
                Series(Level("gateway_golden_limit_cosine", _MODEL, how="max"), "{model} limit"),
            ],
            description="Smallest cosine between a recorded vector and the same text computed now.",
        ),
        Panel(
            "Reloads after a failure",
            [
                Series(Increase("gateway_engine_restarts_total", _MODEL), "{model}"),
                Series(Increase("gateway_device_lost_total", _MODEL), "{model} lost its card"),
            ],
        ),
        Panel(
            "Loads and unloads on demand",
            [
                Series(Increase("gateway_model_loads_total", ("model", "outcome")), "{model} load {outcome}"),
                Series(Increase("gateway_model_unloads_total", ("model", "reason")), "{model} unload {reason}"),
            ],
            width=12,
            description="Many of them: the models that are used do not fit together.",
        ),
        Panel(
            "p95 of loads on demand",
            [Series(Quantile(0.95, "gateway_model_load_seconds", _MODEL), "{model}")],
            "seconds",
            width=12,
        ),
        Panel("Models", [Series(Level("gateway_model_info", _INFO))], kind="table", width=24),
    ],
)

BATCHES: Final = Row(
    "Queue and batches",
    [
        Panel(
            "Texts that wait",
            [
                Series(Level("gateway_queue_texts", _MODEL), "{model}"),
                Series(Level("gateway_low_priority_queue_texts", _MODEL), "{model}, low priority"),
            ],
        ),
        Panel("Tokens that wait", [Series(Level("gateway_queue_tokens", _MODEL), "{model}")]),
        Panel(
            "Age of the oldest request",
            [
                Series(Level("gateway_queue_oldest_seconds", _MODEL, how="max"), "{model}"),
                Series(Level("gateway_low_priority_queue_oldest_seconds", _MODEL, how="max"), "{model}, low priority"),
            ],
            "seconds",
        ),
        Panel(
            "Texts by cache",
            [Series(Rate("gateway_cache_texts_total", ("model", "outcome")), "{model} {outcome}")],
            is_stacked=True,
            description="Of models with a cache. All but miss were not computed.",
        ),
        Panel("Memory of the cache", [Series(Level("gateway_cache_bytes", _MODEL), "{model}")], "bytes"),
        Panel(
            "Cache: evictions and failures",
            [
                Series(Rate("gateway_cache_evictions_total", _MODEL), "{model} evictions"),
                Series(Rate("gateway_cache_errors_total", ("model", "store")), "{model} {store} failed"),
            ],
        ),
        Panel("Texts in a batch", quantiles(Quantile(0, "gateway_batch_texts", _MODEL), 0.5, 0.95), width=6),
        Panel("Tokens in a batch", quantiles(Quantile(0, "gateway_batch_tokens", _MODEL), 0.5, 0.95), width=6),
        Panel(
            "Fill of batches",
            [Series(Mean("gateway_batch_fill_ratio", _MODEL), "{model}")],
            "share",
            width=6,
            description="Tokens of a batch as a share of max_batch_tokens. Always near 1: a larger limit may be faster.",
        ),
        Panel(
            "Share of padding",
            [
                Series(
                    Share(
                        Rate("gateway_batch_tokens_sum", _MODEL),
                        Rate("gateway_computed_tokens_total", _MODEL),
                        is_rest=True,
                    ),
                    "{model}",
                )
            ],
            "share",
            width=6,
        ),
        Panel(
            "Batches that failed",
            [
                Series(Rate("gateway_failed_batches_total", _MODEL), "{model}"),
                Series(Rate("gateway_worker_faults_total", _MODEL), "{model} by a fault of the gateway"),
            ],
        ),
        Panel(
            "Memory of requests",
            [
                Series(Level("gateway_memory_reserved_bytes", where=()), "held"),
                Series(Level("gateway_memory_budget_bytes", where=()), "budget"),
            ],
            "bytes",
        ),
        Panel(
            "Requests to tokenize or decode",
            [Series(Rate("gateway_tokenizer_requests_total", ("model", "outcome")), "{model} {outcome}")],
            "per_second",
        ),
    ],
)

JOBS: Final = Row(
    "Batch API",
    [
        Panel("Batches that have not ended", [Series(Level("gateway_batch_api_open", ("status",), ()), "{status}")]),
        Panel("Batches that ended", [Series(Increase("gateway_batch_api_ended_total", ("status",), ()), "{status}")]),
        Panel("Requests of batches", [Series(Rate("gateway_batch_api_lines_total", ("outcome",), ()), "{outcome}")]),
        Panel("Files of batches", [Series(Level("gateway_batch_api_bytes", where=()), "files")], "bytes"),
    ],
)

CLUSTER: Final = Row(
    "Cluster",
    [
        Panel(
            "Replicas of models",
            [
                Series(Level("gateway_replicas_usable", _MODEL, how="min"), "{model}"),
                Series(Level("gateway_replicas_wanted", _MODEL, how="max"), "{model} wanted"),
            ],
            width=12,
            description="Of the gateway that reaches the fewest. Too few: no machine has room, or they do not load.",
        ),
        Panel(
            "Lost replicas",
            [Series(Increase("gateway_replicas_lost_total", _MODEL), "{model}")],
            width=12,
            description="As each gateway counts them.",
        ),
    ],
)

MACHINE: Final = Row(
    "Machine",
    [
        Panel(
            "GPU memory",
            [
                Series(
                    Level("gateway_gpu_memory_bytes", ("instance", "device", "kind"), ()), "{instance} {device} {kind}"
                )
            ],
            "bytes",
        ),
        Panel(
            "GPU utilization",
            [Series(Level("gateway_gpu_utilization_ratio", ("instance", "device"), ()), "{instance} {device}")],
            "share",
        ),
        Panel(
            "Resident memory",
            [Series(Level("process_resident_memory_bytes", ("instance",), (OF_GATEWAY,)), "{instance}")],
            "bytes",
        ),
        Panel("CPU", [Series(Rate("process_cpu_seconds_total", ("instance",), (OF_GATEWAY,)), "{instance}")]),
        Panel("Open files", [Series(Level("process_open_fds", ("instance",), (OF_GATEWAY,)), "{instance}")]),
    ],
)
