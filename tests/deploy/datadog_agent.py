"""Run Datadog's own code, in its separate environment: the Agent's OpenMetrics check, and the models of its API.

Reads from standard input, as JSON, pairs of an instance of the check and a page of metrics, and objects for the API. Writes
the metrics that the check sends, and the fields that the API does not know.
"""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

# The check's stub refuses the tags that a deployment sets, such as `service`.
os.environ["DDEV_SKIP_GENERIC_TAGS_CHECK"] = "true"

from datadog_api_client import Configuration
from datadog_api_client.model_utils import ModelComposed, ModelNormal, validate_and_convert_types
from datadog_api_client.v1.models import Dashboard, LogsPipeline, Monitor, ServiceLevelObjectiveRequest
from datadog_checks.base import OpenMetricsBaseCheckV2
from datadog_checks.base.stubs import aggregator

MODELS = {
    "dashboard": Dashboard,
    "monitor": Monitor,
    "objective": ServiceLevelObjectiveRequest,
    "pipeline": LogsPipeline,
}


def scraped(instance: dict[str, Any], exported: str) -> dict[str, Any]:
    """Run the check against a server that exports this text; return the metrics that it sends."""
    aggregator.reset()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(exported.encode())

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        instance["openmetrics_endpoint"] = f"http://127.0.0.1:{server.server_port}/metrics"
        problem = OpenMetricsBaseCheckV2("openmetrics", {}, [instance]).run()
        server.shutdown()
    kinds = {aggregator.MONOTONIC_COUNT: "count", aggregator.GAUGE: "gauge"}
    return {
        "problem": problem,
        "metrics": {
            name: {"kind": kinds[found[0].type], "tags": found[0].tags}
            for name in aggregator.metric_names
            if (found := aggregator.metrics(name))
        },
        "distributions": {
            name: {"kind": "distribution", "tags": buckets[0].tags}
            for name, buckets in aggregator._histogram_buckets.items()
        },
        "service_checks": {name: found[0].status for name, found in aggregator._service_checks.items()},
        "series": [(one.name, one.tags) for name in aggregator.metric_names for one in aggregator.metrics(name)],
    }


def problems(kind: str, value: Any) -> list[str]:
    """Return the parts of an object that the model of the API does not define."""
    model = validate_and_convert_types(value, (MODELS[kind],), ["it"], True, True, Configuration())
    return list(_unknown(model, kind))


def _unknown(value: Any, path: str) -> Iterator[str]:
    if getattr(value, "_unparsed", False):
        yield f"{path}: no {type(value).__name__}"
    elif isinstance(value, ModelNormal):
        for key, part in value._data_store.items():
            if key not in value.openapi_types:
                yield f"{path}.{key}: no such key"
            yield from _unknown(part, f"{path}.{key}")
    elif isinstance(value, ModelComposed):
        for part in value._composed_instances:
            yield from _unknown(part, path)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _unknown(part, f"{path}[{number}]")


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    answer = {
        "scraped": {name: scraped(instance, exported) for name, (instance, exported) in asked["scrapes"].items()},
        "problems": {name: problems(kind, value) for name, (kind, value) in asked["objects"].items()},
    }
    json.dump(answer, sys.stdout)
