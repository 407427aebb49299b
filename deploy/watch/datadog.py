"""Datadog's form of the dashboard: https://docs.datadoghq.com/api/latest/dashboards/."""

from __future__ import annotations

import re
from typing import Any, Final

from deploy.watch.datadog_query import Formula, formula
from deploy.watch.expressions import Level, Panel, Row, Series
from deploy.watch.names import SERVICE, datadog_tag
from deploy.watch.rows import ROWS

_UNITS: Final[dict[str, dict[str, str]]] = {
    "per_second": {"unit_name": "request", "per_unit_name": "second"},
    "seconds": {"unit_name": "second"},
    "share": {"unit_name": "fraction"},
    "bytes": {"unit_name": "byte"},
}
_PALETTES: Final = {"red": "white_on_red", "orange": "white_on_yellow", "green": "white_on_green"}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Datadog's API takes it."""
    return {
        "title": "Embedding gateway",
        "description": "The gateway's work, model by model. From the same definitions as Grafana's dashboard.",
        "layout_type": "ordered",
        "reflow_type": "auto",
        "template_variables": [
            {"name": "env", "prefix": "env", "available_values": [], "defaults": ["*"]},
            {"name": "service", "prefix": "service", "available_values": [], "defaults": [SERVICE]},
            {"name": "model", "prefix": "model", "available_values": [], "defaults": ["*"]},
        ],
        "widgets": [_group("State", _state()), *(_row(row) for row in ROWS)],
    }


def _state() -> list[dict[str, Any]]:
    """Return the widgets that only Datadog has: monitors, objectives, and the log."""
    monitors = {
        "type": "manage_status",
        "title": "Monitors",
        "query": f'tag:("service:{SERVICE}")',
        "summary_type": "monitors",
        "sort": "status,asc",
        "display_format": "countsAndList",
        "color_preference": "text",
        "hide_zero_counts": True,
    }
    objectives = {
        "type": "slo_list",
        "title": "Objectives, 30 days",
        "requests": [
            {"request_type": "slo_list", "query": {"query_string": f'tags:("service:{SERVICE}")', "limit": 10}}
        ],
    }
    log = {
        "type": "list_stream",
        "title": "Errors in the log",
        "requests": [
            {
                "response_format": "event_list",
                "columns": [
                    {"field": "status_line", "width": "auto"},
                    {"field": "timestamp", "width": "auto"},
                    {"field": "content", "width": "full"},
                ],
                "query": {
                    "data_source": "logs_stream",
                    "query_string": "source:embedding-gateway $env $service status:error",
                    "indexes": [],
                },
            }
        ],
    }
    return [{"definition": definition} for definition in (monitors, objectives, log)]


def _row(row: Row) -> dict[str, Any]:
    return _group(row.title, [{"definition": _widget(panel)} for panel in row.panels])


def _group(title: str, widgets: list[dict[str, Any]]) -> dict[str, Any]:
    return {"definition": {"type": "group", "layout_type": "ordered", "title": title, "widgets": widgets}}


def _widget(panel: Panel) -> dict[str, Any]:
    match panel.kind:
        case "plot":
            return _plot(panel)
        case "number" if any(series.name for series in panel.series):
            return _table(panel)  # a number for each value of a tag
        case "number":
            return _number(panel)
        case "table":
            return _table(panel)


def _plot(panel: Panel) -> dict[str, Any]:
    requests = [
        {
            "response_format": "timeseries",
            "queries": _queries(form),
            "formulas": [_formula(form, panel, series)],
            "display_type": "area" if panel.is_stacked else "line",
        }
        for series, form in ((series, formula(series.expression)) for series in panel.series)
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "show_legend": True,
        "legend_layout": "auto",
        "legend_columns": ["avg", "max", "value"],
        "requests": requests,
    }


def _number(panel: Panel) -> dict[str, Any]:
    (series,) = panel.series
    form = formula(series.expression)
    # Counters over all the time shown, so that the share is that of all requests; gauges as they are now.
    aggregator = "last" if isinstance(series.expression, Level) else "avg"
    colors = [
        {"comparator": ">=", "value": 0.0 if start is None else start, "palette": _PALETTES[color]}
        for start, color in reversed(panel.thresholds)  # the first that fits counts
    ]
    return {
        "type": "query_value",
        "title": panel.title,
        "autoscale": True,
        "precision": 3,
        "requests": [
            {
                "response_format": "scalar",
                "queries": _queries(form, aggregator),
                "formulas": [_formula(form, panel, series)],
                **({"conditional_formats": colors} if colors else {}),
            }
        ],
    }


def _table(panel: Panel) -> dict[str, Any]:
    (series,) = panel.series
    form = formula(series.expression)
    return {
        "type": "query_table",
        "title": panel.title,
        "requests": [
            {
                "response_format": "scalar",
                "queries": _queries(form, "last"),
                "formulas": [{**_formula(form, panel, series), "alias": "replicas"}],
            }
        ],
    }


def _queries(form: Formula, aggregator: str | None = None) -> list[dict[str, str]]:
    extra = {"aggregator": aggregator} if aggregator else {}
    return [
        {"data_source": "metrics", "name": name, "query": query, **extra}
        for name, query in zip("ab", form.queries, strict=False)
    ]


def _formula(form: Formula, panel: Panel, series: Series) -> dict[str, Any]:
    written: dict[str, Any] = {"formula": form.formula}
    if alias := alias_of(series.name):
        written["alias"] = alias
    if unit := _UNITS.get(panel.unit):
        written["number_format"] = {"unit": {"type": "canonical_unit", **unit}}
    return written


def alias_of(name: str) -> str:
    """Return the constant part of a series' name. Datadog adds the values of the tags by itself."""
    words = re.sub(r"\{\w+\}", " ", name).split()
    return "" if words == ["to"] else " ".join(words)


def tags_of(labels: tuple[str, ...]) -> list[str]:
    """Return the tags of a distribution that a query can use: its labels, and those that the Agent adds."""
    return sorted({*(datadog_tag(label) for label in labels), "service", "env", "version", "instance", "host"})
