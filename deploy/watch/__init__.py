"""Panels, monitors and objectives, written once for Prometheus with Grafana and for Datadog.

::

    python -m deploy.watch            write the dashboards, Datadog's monitors and its objectives
    python -m deploy.watch --check    fail if one of them is not up to date
"""
