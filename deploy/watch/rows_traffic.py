"""The rows of the dashboard about requests: overview, experiments, errors, models that run elsewhere."""

from __future__ import annotations

from typing import Final

from deploy.watch.expressions import (
    EMBEDDINGS,
    FAULTS,
    IN_EXPERIMENTS,
    MODEL,
    NOT_OK,
    Increase,
    Level,
    Panel,
    Quantile,
    Rate,
    Row,
    Series,
    Share,
    quantiles,
)

_AVAILABILITY: Final = Share(
    Rate("gateway_requests_total", where=(EMBEDDINGS, FAULTS), over="shown"),
    Rate("gateway_requests_total", where=(EMBEDDINGS,), over="shown"),
    is_rest=True,
)
_ARM: Final = ("experiment", "arm")

OVERVIEW: Final = Row(
    "Overview",
    [
        Panel(
            "Availability",
            [Series(_AVAILABILITY)],
            "share",
            "number",
            "Share of the requests for embeddings without a 5xx, over the time shown. The objective is 99.9 %.",
            width=4,
            thresholds=((None, "red"), (0.99, "orange"), (0.999, "green")),
        ),
        Panel("Models ready", [Series(Level("gateway_model_ready", where=()))], kind="number", width=4),
        Panel("In flight", [Series(Level("gateway_requests_in_flight", where=()))], kind="number", width=4),
        Panel("Texts per second", [Series(Rate("gateway_texts_total", over="5m"))], kind="number", width=4),
        Panel("Tokens per second", [Series(Rate("gateway_tokens_total", over="5m"))], kind="number", width=4),
        Panel(
            "Versions",
            [Series(Level("gateway_build_info", ("version",), ()), "{version}")],
            kind="number",
            width=4,
        ),
        Panel(
            "Requests", [Series(Rate("gateway_requests_total", ("status",), (EMBEDDINGS,)), "{status}")], "per_second"
        ),
        Panel(
            "Latency of requests",
            quantiles(Quantile(0, "gateway_request_duration_seconds", where=(EMBEDDINGS,))),
            "seconds",
            description="From the first byte of a request to the last of its answer, bulk requests included.",
        ),
        Panel("Tokens by model", [Series(Rate("gateway_tokens_total", ("model",)), "{model}")], is_stacked=True),
    ],
)

EXPERIMENTS: Final = Row(
    "Experiments",
    [
        Panel(
            "Requests of arms",
            [Series(Rate("gateway_embed_requests_total", _ARM, (IN_EXPERIMENTS,)), "{experiment} {arm}")],
            "per_second",
        ),
        Panel(
            "p95 of arms",
            [Series(Quantile(0.95, "gateway_embed_duration_seconds", _ARM, (IN_EXPERIMENTS,)), "{experiment} {arm}")],
            "seconds",
        ),
        Panel(
            "Errors of arms",
            [
                Series(
                    Share(
                        Rate("gateway_embed_requests_total", _ARM, (IN_EXPERIMENTS, NOT_OK)),
                        Rate("gateway_embed_requests_total", _ARM, (IN_EXPERIMENTS,)),
                    ),
                    "{experiment} {arm}",
                )
            ],
            "share",
        ),
        Panel(
            "Shadows",
            [Series(Rate("gateway_shadow_requests_total", ("of", "to", "outcome"), ()), "{of} to {to} {outcome}")],
            "per_second",
        ),
        Panel(
            "Captured queries",
            [Series(Rate("gateway_captured_texts_total", ("name", "outcome"), ()), "{name} {outcome}")],
        ),
        Panel(
            "p95 of shadows",
            [Series(Quantile(0.95, "gateway_shadow_duration_seconds", ("of", "to"), ()), "{of} to {to}")],
            "seconds",
        ),
        Panel(
            "Fallbacks",
            [Series(Rate("gateway_fallbacks_total", ("model", "fallback", "code")), "{model} to {fallback} {code}")],
            "per_second",
        ),
    ],
)

ERRORS: Final = Row(
    "Errors and refusals",
    [
        Panel(
            "By code",
            [Series(Rate("gateway_errors_total", ("code",), ()), "{code}")],
            "per_second",
            width=12,
            is_stacked=True,
        ),
        Panel(
            "By model",
            [Series(Rate("gateway_embed_requests_total", ("model", "outcome"), (MODEL, NOT_OK)), "{model} {outcome}")],
            "per_second",
            width=12,
        ),
        Panel(
            "Connections of clients",
            [Series(Level("gateway_connections", ("instance",), ()), "{instance}")],
            description="Each takes a file descriptor; process_max_fds is how many there are.",
        ),
        Panel(
            "File limit, and log lines dropped",
            [
                Series(Rate("gateway_file_limit_reached_total", where=()), "no file descriptor left"),
                Series(Rate("gateway_log_lines_dropped_total", where=()), "lines of the log dropped"),
            ],
            description="New connections are reset while no file descriptor is left. Lines of the log are dropped "
            "while standard error is not read.",
        ),
        Panel(
            "Slow connections closed",
            [Series(Rate("gateway_slow_connections_total", ("side",), ()), "{side}")],
        ),
        Panel(
            "Reloads",
            [
                Series(Increase("gateway_reloads_total", ("outcome",), ()), "models {outcome}"),
                Series(Increase("gateway_key_reloads_total", ("outcome",), ()), "keys {outcome}"),
            ],
        ),
        Panel(
            "Uncounted requests, lost exposures",
            [
                Series(Rate("gateway_quota_errors_total", where=()), "quota storage"),
                Series(Rate("gateway_exposures_dropped_total", where=()), "exposure log"),
            ],
        ),
    ],
)

UPSTREAM: Final = Row(
    "Models that run elsewhere",
    [
        Panel(
            "Requests to servers",
            [Series(Rate("gateway_upstream_requests_total", ("model", "server", "outcome")), "{server} {outcome}")],
            "per_second",
        ),
        Panel("Latency of servers", quantiles(Quantile(0, "gateway_upstream_seconds", ("server",))), "seconds"),
        Panel("Texts on their way", [Series(Level("gateway_upstream_texts", ("model", "server")), "{model} {server}")]),
        Panel(
            "Servers that take part",
            [Series(Level("gateway_upstream_up", ("model", "server"), how="min"), "{model} {server}")],
            description="0: a replica of the gateway leaves the server alone.",
        ),
        Panel(
            "Names looked up",
            [Series(Rate("gateway_upstream_lookups_total", ("model", "outcome")), "{model} {outcome}")],
            "per_second",
        ),
        Panel("Sent again", [Series(Rate("gateway_upstream_retries_total", ("model",)), "{model}")], "per_second"),
    ],
)
