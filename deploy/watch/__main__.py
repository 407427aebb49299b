"""Write the generated dashboards, monitors and objectives, or check them."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from deploy.watch import datadog, grafana
from deploy.watch.monitors import MONITORS, objectives
from deploy.watch.names import datadog_metric
from gateway.telemetry import metrics

DEPLOY: Final = Path(__file__).resolve().parents[1]
GRAFANA_DASHBOARD: Final = DEPLOY / "grafana" / "dashboards" / "gateway.json"
DATADOG: Final = DEPLOY / "datadog"
PROMETHEUS_RULE: Final = DEPLOY / "kubernetes" / "components" / "monitoring" / "prometheusrule.yaml"
_RULE_HEAD: Final = """\
# Generated from deploy/prometheus/rules.yml by `python -m deploy.watch`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
# A Prometheus may select only rules with a certain label; kube-prometheus-stack's selects `release: NAME`.
metadata:
  name: embedding-gateway
spec:
"""


def files() -> dict[Path, str]:
    """Return the text of every generated file."""
    distributions = {
        datadog_metric(metric.name): datadog.tags_of(metric.labels)
        for metric in metrics.declared()
        if metric.kind == "histogram"
    }
    content: dict[Path, Any] = {
        GRAFANA_DASHBOARD: grafana.dashboard(),
        DATADOG / "dashboard.json": datadog.dashboard(),
        DATADOG / "distributions.json": distributions,
        **{DATADOG / "objectives" / f"{name}.json": objective for name, objective in objectives().items()},
        **{DATADOG / "monitors" / f"{monitor.file}.json": monitor.as_json() for monitor in MONITORS},
    }
    written = {path: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for path, value in content.items()}
    return {**written, PROMETHEUS_RULE: prometheus_rule()}


def prometheus_rule() -> str:
    """Return the rules of Prometheus as an object for its operator."""
    rules = (DEPLOY / "prometheus" / "rules.yml").read_text(encoding="utf-8")
    return _RULE_HEAD + textwrap.indent(rules, "  ")


def stale() -> list[Path]:
    """Return the generated files that are not up to date, and those that nothing generates any more."""
    written = files()
    left = {*(DATADOG / "monitors").glob("*"), *(DATADOG / "objectives").glob("*")} - written.keys()
    old = [path for path, text in written.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return sorted([*old, *left])


def main(arguments: Sequence[str]) -> int:
    """Write the files, or with ``--check`` name those that would change."""
    changed = stale()
    if "--check" in arguments:
        for path in changed:
            print(f"{path.relative_to(DEPLOY.parent)} is not up to date: python -m deploy.watch", file=sys.stderr)
        return 1 if changed else 0
    written = files()
    for path in changed:
        if path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(written[path], encoding="utf-8")
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
