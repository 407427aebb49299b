"""Grafana's form of the dashboard."""

from __future__ import annotations

import re
from typing import Any, Final

from deploy.watch.expressions import Panel
from deploy.watch.promql import promql
from deploy.watch.rows import ROWS

_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 24, 8  # of the grid, and of a panel
_UNITS: Final = {
    "none": "short",
    "per_second": "reqps",
    "seconds": "s",
    "share": "percentunit",
    "bytes": "bytes",
}
_KINDS: Final = {"plot": "timeseries", "number": "stat", "table": "table"}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    return {
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
    is_plot = panel.kind == "plot"
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 20} if panel.is_stacked else {"fillOpacity": 0}
    steps = [{"value": value, "color": color} for value, color in panel.thresholds]
    defaults: dict[str, Any] = {"unit": _UNITS[panel.unit], "custom": custom if is_plot else {}}
    if steps:
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    return {
        "type": _KINDS[panel.kind],
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"showLegend": True}} if is_plot else {},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _DATASOURCE,
                "expr": promql(series.expression),
                "legendFormat": re.sub(r"\{(\w+)\}", r"{{\1}}", series.name) or "__auto",
                **({"format": "table", "instant": True} if panel.kind == "table" else {}),
            }
            for number, series in enumerate(panel.series)
        ],
    }
