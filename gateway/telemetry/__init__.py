"""Metrics and logs, each declared once: ``metrics`` for Prometheus, ``logs`` for structured lines."""
