"""Metrics, logs and traces: ``metrics`` for Prometheus, ``logs`` for structured lines, ``tracing`` for OpenTelemetry."""
