"""The names that the Datadog Agent's OpenMetrics check (V2) gives to the gateway's metrics, with the settings used here.

The rules are in the documentation (https://docs.datadoghq.com/integrations/guide/prometheus-metrics/) and in
``datadog_checks.base.checks.openmetrics.v2``; ``tests/datadog`` holds these functions against that check. With
``raw_metric_prefix: gateway_`` and ``namespace: embedding_gateway``:

- a counter ``gateway_texts_total`` becomes ``embedding_gateway.texts.count``;
- a gauge ``gateway_queue_texts`` becomes ``embedding_gateway.queue_texts``;
- a histogram ``gateway_upstream_seconds``, with ``histogram_buckets_as_distributions`` and
  ``collect_counters_with_distributions``, becomes the distribution ``embedding_gateway.upstream_seconds`` and the counters
  ``embedding_gateway.upstream_seconds.sum`` and ``.count``.
"""

from __future__ import annotations

from typing import Final

NAMESPACE: Final = "embedding_gateway"
PREFIX: Final = "gateway_"
SERVICE: Final = "embedding-gateway"
HEALTH_CHECK: Final = f"{NAMESPACE}.openmetrics.health"
RENAMED_LABELS: Final = {"version": "gateway_version", "source": "model_source", "device": "accelerator"}
"""Labels whose names mean something else in Datadog: https://docs.datadoghq.com/getting_started/tagging/."""


def datadog_metric(series: str) -> str:
    """Return the name in Datadog of a series that Prometheus calls ``series``, or of a histogram."""
    name = series.removeprefix(PREFIX)
    for suffix, datadog_suffix in (("_total", ".count"), ("_sum", ".sum"), ("_count", ".count")):
        if name.endswith(suffix):
            return f"{NAMESPACE}.{name.removesuffix(suffix)}{datadog_suffix}"
    return f"{NAMESPACE}.{name}"


def datadog_tag(label: str) -> str:
    """Return the key of the tag that a label becomes."""
    return RENAMED_LABELS.get(label, label)
