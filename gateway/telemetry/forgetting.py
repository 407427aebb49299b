"""Remove the series of models, servers and other names that no longer exist."""

from __future__ import annotations

from gateway.telemetry import metrics


def forget_model(model: str) -> None:
    """Remove the series of a model that was removed."""
    _forget(model=model)
    _forget(fallback=model)


def forget_server(model: str, server: str) -> None:
    """Remove the series of a server that no longer runs a model."""
    _forget(model=model, server=server)


def forget_experiment(experiment: str, arm: str | None = None) -> None:
    """Remove the series of an experiment that was removed, or of one of its arms."""
    if arm is None:
        _forget(experiment=experiment)
    else:
        _forget(experiment=experiment, arm=arm)


def forget_shadow(of: str, to: str) -> None:
    """Remove the series of a shadow that was removed."""
    _forget(of=of, to=to)


def forget_capture(name: str) -> None:
    """Remove the series of a capture that was removed."""
    _forget(name=name)


def _forget(**labels: str) -> None:
    metrics.target_metrics.cache_clear()
    for metric, _, _, names, _ in metrics.declared():
        if set(labels) <= set(names):
            metric.remove_by_labels(labels)
