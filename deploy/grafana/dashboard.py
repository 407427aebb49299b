"""Write ``dashboards/gateway.json``, Grafana's form of the panels below.

python deploy/grafana/dashboard.py           write it
python deploy/grafana/dashboard.py --check   fail when it is not up to date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "dashboards" / "gateway.json"

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 24, 8  # of the grid, and of a panel
_EMBEDDINGS = 'path=~"(/v1)?/embeddings"'
_MODEL = 'model=~"$model"'


@dataclass(frozen=True)
class Query:
    """What is drawn: an expression, and what each of its series is called."""

    expression: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A plot, or with ``kind="stat"`` a number, or with ``kind="table"`` the labels of an info metric."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    description: str = ""
    width: int = 8
    is_stacked: bool = False
    thresholds: Sequence[tuple[float | None, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


def rate(metric: str, by: str, selector: str = _MODEL) -> str:
    """Return the expression of a counter's rate, summed by some labels."""
    return f"sum by ({by}) (rate({metric}{{{selector}}}[$__rate_interval]))"


def quantile(share: float, histogram: str, by: str, selector: str = _MODEL) -> str:
    """Return the expression of a histogram's quantile by some labels; without labels of all together."""
    labels = f"{by}, le" if by else "le"
    buckets = f"sum by ({labels}) (rate({histogram}_bucket{{{selector}}}[$__rate_interval]))"
    return f"histogram_quantile({share}, {buckets})"


def quantiles(histogram: str, by: str, selector: str = _MODEL) -> list[Query]:
    """Return p50, p95 and p99 of a histogram."""
    names = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(",")) if by else ""
    return [
        Query(quantile(share, histogram, by, selector), f"{names} p{round(100 * share)}".strip())
        for share in (0.5, 0.95, 0.99)
    ]


def mean(histogram: str, by: str, selector: str = _MODEL) -> str:
    """Return the expression of a histogram's mean by some labels."""
    return f"{rate(f'{histogram}_sum', by, selector)} / {rate(f'{histogram}_count', by, selector)}"


_PADDING = f"1 - {rate('gateway_batch_tokens_sum', 'model')} / {rate('gateway_computed_tokens_total', 'model')}"
_FAILED = f'sum(rate(gateway_requests_total{{{_EMBEDDINGS},status=~"5.."}}[$__range]))'
_ALL = f"sum(rate(gateway_requests_total{{{_EMBEDDINGS}}}[$__range]))"
_ARMS = 'experiment!=""'
_GREEN_IS_GOOD = [(None, "red"), (0.99, "orange"), (0.999, "green")]

ROWS = [
    Row(
        "Overview",
        [
            Panel(
                "Availability",
                [Query(f"1 - ({_FAILED} or vector(0)) / ({_ALL} > 0)")],
                unit="percentunit",
                kind="stat",
                width=4,
                description="Share of the requests for embeddings without a 5xx, over the time shown."
                " The objective is 99.9 %.",
                thresholds=_GREEN_IS_GOOD,
            ),
            Panel("Models ready", [Query("sum(gateway_model_ready)")], kind="stat", width=4),
            Panel("In flight", [Query("sum(gateway_requests_in_flight)")], kind="stat", width=4),
            Panel("Texts per second", [Query(f"sum(rate(gateway_texts_total{{{_MODEL}}}[5m]))")], kind="stat", width=4),
            Panel(
                "Tokens per second", [Query(f"sum(rate(gateway_tokens_total{{{_MODEL}}}[5m]))")], kind="stat", width=4
            ),
            Panel("Versions", [Query("count by (version) (gateway_build_info)", "{{version}}")], kind="stat", width=4),
            Panel(
                "Requests", [Query(rate("gateway_requests_total", "status", _EMBEDDINGS), "{{status}}")], unit="reqps"
            ),
            Panel(
                "Latency of requests",
                quantiles("gateway_request_duration_seconds", "", _EMBEDDINGS),
                unit="s",
                description="From the first byte of a request to the last of its answer, bulk requests included.",
            ),
            Panel("Tokens by model", [Query(rate("gateway_tokens_total", "model"), "{{model}}")], is_stacked=True),
        ],
    ),
    Row(
        "Models",
        [
            Panel("Requests", [Query(rate("gateway_embed_requests_total", "model"), "{{model}}")], unit="reqps"),
            Panel("Latency", quantiles("gateway_embed_duration_seconds", "model"), unit="s"),
            Panel("Texts", [Query(rate("gateway_texts_total", "model, task"), "{{model}} {{task}}")]),
            Panel(
                "Where the time goes",
                [
                    Query(
                        f"{rate('gateway_stage_duration_seconds_sum', 'model, stage')} / "
                        f"{rate('gateway_stage_duration_seconds_count', 'model, stage')}",
                        "{{model}} {{stage}}",
                    )
                ],
                unit="s",
                is_stacked=True,
                description="Mean seconds of a request in each stage.",
            ),
            Panel(
                "p95 of stages",
                [Query(quantile(0.95, "gateway_stage_duration_seconds", "model, stage"), "{{model}} {{stage}}")],
                unit="s",
            ),
            Panel(
                "Truncated texts",
                [
                    Query(rate("gateway_truncated_texts_total", "model"), "{{model}}"),
                    Query(rate("gateway_recomputed_texts_total", "model"), "{{model}} computed again"),
                ],
            ),
            Panel("State", [Query(f"gateway_model_state{{{_MODEL}}} == 1", "{{model}} {{state}}")], width=8),
            Panel(
                "Golden vectors",
                [
                    Query(f"gateway_golden_min_cosine{{{_MODEL}}}", "{{model}}"),
                    Query(f"gateway_golden_limit_cosine{{{_MODEL}}}", "{{model}} limit"),
                ],
                description="Smallest cosine between a recorded vector and the same text computed now.",
            ),
            Panel(
                "Reloads after a failure",
                [
                    Query(
                        f"sum by (model) (increase(gateway_engine_restarts_total{{{_MODEL}}}[$__rate_interval]))",
                        "{{model}}",
                    ),
                    Query(
                        f"sum by (model) (increase(gateway_device_lost_total{{{_MODEL}}}[$__rate_interval]))",
                        "{{model}} lost its card",
                    ),
                ],
            ),
            Panel(
                "Loads and unloads on demand",
                [
                    Query(
                        f"sum by (model, outcome) (increase(gateway_model_loads_total{{{_MODEL}}}[$__rate_interval]))",
                        "{{model}} load {{outcome}}",
                    ),
                    Query(
                        f"sum by (model, reason) (increase(gateway_model_unloads_total{{{_MODEL}}}[$__rate_interval]))",
                        "{{model}} unload {{reason}}",
                    ),
                ],
                width=12,
                description="Many of them: the models that are used do not fit together.",
            ),
            Panel(
                "p95 of loads on demand",
                [Query(quantile(0.95, "gateway_model_load_seconds", "model"), "{{model}}")],
                unit="s",
                width=12,
            ),
            Panel("What they are", [Query(f"gateway_model_info{{{_MODEL}}}")], kind="table", width=24),
        ],
    ),
    Row(
        "Queue and batches",
        [
            Panel("Texts that wait", [Query(f"sum by (model) (gateway_queue_texts{{{_MODEL}}})", "{{model}}")]),
            Panel("Tokens that wait", [Query(f"sum by (model) (gateway_queue_tokens{{{_MODEL}}})", "{{model}}")]),
            Panel(
                "Age of the oldest request",
                [Query(f"max by (model) (gateway_queue_oldest_seconds{{{_MODEL}}})", "{{model}}")],
                unit="s",
            ),
            Panel(
                "Texts by cache",
                [Query(rate("gateway_cache_texts_total", "model, outcome"), "{{model}} {{outcome}}")],
                width=6,
                is_stacked=True,
                description="Of models with a cache. All but `miss` were not computed.",
            ),
            Panel("Texts in a batch", [*quantiles("gateway_batch_texts", "model")[:2]], width=6),
            Panel("Tokens in a batch", [*quantiles("gateway_batch_tokens", "model")[:2]], width=6),
            Panel(
                "Fill of batches",
                [
                    Query(
                        mean("gateway_batch_fill_ratio", "model"),
                        "{{model}}",
                    )
                ],
                unit="percentunit",
                width=6,
                description="Tokens of a batch as a share of max_batch_tokens. Always near 1: a larger limit may be faster.",
            ),
            Panel(
                "Share of padding",
                [
                    Query(
                        _PADDING,
                        "{{model}}",
                    )
                ],
                unit="percentunit",
                width=6,
            ),
            Panel(
                "Batches that failed",
                [
                    Query(rate("gateway_failed_batches_total", "model"), "{{model}}"),
                    Query(rate("gateway_worker_faults_total", "model"), "{{model}} by a fault of the gateway"),
                ],
            ),
            Panel(
                "Memory of requests",
                [
                    Query("sum(gateway_memory_reserved_bytes)", "held"),
                    Query("sum(gateway_memory_budget_bytes)", "budget"),
                ],
                unit="bytes",
            ),
            Panel(
                "Requests to tokenize or decode",
                [Query(rate("gateway_tokenizer_requests_total", "model, outcome"), "{{model}} {{outcome}}")],
                unit="reqps",
            ),
        ],
    ),
    Row(
        "Experiments",
        [
            Panel(
                "Requests of arms",
                [Query(rate("gateway_embed_requests_total", "experiment, arm", _ARMS), "{{experiment}} {{arm}}")],
                unit="reqps",
            ),
            Panel(
                "p95 of arms",
                [
                    Query(
                        quantile(0.95, "gateway_embed_duration_seconds", "experiment, arm", _ARMS),
                        "{{experiment}} {{arm}}",
                    )
                ],
                unit="s",
            ),
            Panel(
                "Errors of arms",
                [
                    Query(
                        f"""{rate("gateway_embed_requests_total", "experiment, arm", _ARMS + ',outcome!="ok"')} / """
                        f"{rate('gateway_embed_requests_total', 'experiment, arm', _ARMS)}",
                        "{{experiment}} {{arm}}",
                    )
                ],
                unit="percentunit",
            ),
            Panel(
                "Shadows",
                [Query(rate("gateway_shadow_requests_total", "of, to, outcome", ""), "{{of}} to {{to}} {{outcome}}")],
                unit="reqps",
            ),
            Panel(
                "Captured queries",
                [Query(rate("gateway_captured_texts_total", "name, outcome", ""), "{{name}} {{outcome}}")],
            ),
            Panel(
                "p95 of shadows",
                [Query(quantile(0.95, "gateway_shadow_duration_seconds", "of, to", ""), "{{of}} to {{to}}")],
                unit="s",
            ),
            Panel(
                "Fallbacks",
                [Query(rate("gateway_fallbacks_total", "model, fallback, code"), "{{model}} to {{fallback}} {{code}}")],
                unit="reqps",
            ),
        ],
    ),
    Row(
        "Errors and refusals",
        [
            Panel(
                "By code",
                [Query("sum by (code) (rate(gateway_errors_total[$__rate_interval]))", "{{code}}")],
                unit="reqps",
                width=12,
                is_stacked=True,
            ),
            Panel(
                "By model",
                [
                    Query(
                        rate("gateway_embed_requests_total", "model, outcome", _MODEL + ',outcome!="ok"'),
                        "{{model}} {{outcome}}",
                    )
                ],
                unit="reqps",
                width=12,
            ),
            Panel(
                "Connections of clients",
                [Query("gateway_connections", "{{instance}}")],
                description="Each takes a file descriptor; process_max_fds says how many there are.",
            ),
            Panel(
                "File limit, and log lines dropped",
                [
                    Query("sum(rate(gateway_file_limit_reached_total[$__rate_interval]))", "no file descriptor left"),
                    Query("sum(rate(gateway_log_lines_dropped_total[$__rate_interval]))", "lines of the log dropped"),
                ],
                description="New connections are reset while no file descriptor is left. Lines of the log are dropped "
                "while standard error is not read.",
            ),
            Panel(
                "Slow connections closed",
                [Query("sum by (side) (rate(gateway_slow_connections_total[$__rate_interval]))", "{{side}}")],
            ),
            Panel(
                "Reloads",
                [
                    Query("sum by (outcome) (increase(gateway_reloads_total[$__rate_interval]))", "models {{outcome}}"),
                    Query(
                        "sum by (outcome) (increase(gateway_key_reloads_total[$__rate_interval]))", "keys {{outcome}}"
                    ),
                ],
            ),
            Panel(
                "Uncounted requests, lost exposures",
                [
                    Query("sum(rate(gateway_quota_errors_total[$__rate_interval]))", "quota storage"),
                    Query("sum(rate(gateway_exposures_dropped_total[$__rate_interval]))", "exposure log"),
                ],
            ),
        ],
    ),
    Row(
        "Models that run elsewhere",
        [
            Panel(
                "Requests to servers",
                [Query(rate("gateway_upstream_requests_total", "model, server, outcome"), "{{server}} {{outcome}}")],
                unit="reqps",
            ),
            Panel("Latency of servers", quantiles("gateway_upstream_seconds", "server"), unit="s"),
            Panel("Texts on their way", [Query(f"gateway_upstream_texts{{{_MODEL}}}", "{{model}} {{server}}")]),
            Panel("Servers that take part", [Query(f"gateway_upstream_up{{{_MODEL}}}", "{{model}} {{server}}")]),
            Panel("Sent again", [Query(rate("gateway_upstream_retries_total", "model"), "{{model}}")], unit="reqps"),
        ],
    ),
    Row(
        "Machine",
        [
            Panel("GPU memory", [Query("gateway_gpu_memory_bytes", "{{device}} {{kind}}")], unit="bytes"),
            Panel("GPU utilization", [Query("gateway_gpu_utilization_ratio", "{{device}}")], unit="percentunit"),
            Panel(
                "Resident memory", [Query('process_resident_memory_bytes{job="gateway"}', "{{instance}}")], unit="bytes"
            ),
            Panel(
                "CPU",
                [Query('rate(process_cpu_seconds_total{job="gateway"}[$__rate_interval])', "{{instance}}")],
                unit="short",
            ),
            Panel("Open files", [Query('process_open_fds{job="gateway"}', "{{instance}}")]),
        ],
    ),
]


def expressions() -> list[str]:
    """Return every expression of the dashboard."""
    return [query.expression for row in ROWS for panel in row.panels for query in panel.queries]


def render() -> str:
    """Return the dashboard as Grafana reads it."""
    dashboard = {
        "uid": "embedding-gateway",
        "title": "Embedding gateway",
        "tags": ["embeddings"],
        "schemaVersion": 41,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": _layout(),
    }
    return json.dumps(dashboard, indent=1, ensure_ascii=False) + "\n"


def _variables() -> list[dict[str, Any]]:
    models = "label_values(gateway_model_state, model)"
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "model",
            "label": "Model",
            "type": "query",
            "datasource": _DATASOURCE,
            "definition": models,
            "query": {"query": models, "refId": "models"},
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]


def _layout() -> list[dict[str, Any]]:
    """Place the panels of each row from left to right."""
    placed: list[dict[str, Any]] = []
    x = y = 0
    for row in ROWS:
        y += _HEIGHT if x else 0
        x = 0
        placed.append(
            {"type": "row", "title": row.title, "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1}, "panels": []}
        )
        y += 1
        for panel in row.panels:
            if x + panel.width > _WIDTH:
                x, y = 0, y + _HEIGHT
            placed.append(_panel(panel) | {"gridPos": {"x": x, "y": y, "w": panel.width, "h": _HEIGHT}})
            x += panel.width
    return [{"id": number, **panel} for number, panel in enumerate(placed, start=1)]


def _panel(panel: Panel) -> dict[str, Any]:
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 20} if panel.is_stacked else {"fillOpacity": 0}
    steps = [{"value": value, "color": color} for value, color in panel.thresholds]
    defaults: dict[str, Any] = {"unit": panel.unit, "custom": custom if panel.kind == "timeseries" else {}}
    if steps:
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"showLegend": panel.kind == "timeseries"}} if panel.kind == "timeseries" else {},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend or "__auto",
                **({"format": "table", "instant": True} if panel.kind == "table" else {}),
            }
            for number, query in enumerate(panel.queries)
        ],
    }


def main(arguments: Sequence[str]) -> int:
    """Write the dashboard, or check it."""
    if "--check" in arguments:
        return 0 if DASHBOARD.read_text(encoding="utf-8") == render() else 1
    DASHBOARD.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
