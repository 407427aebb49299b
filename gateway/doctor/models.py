"""Check the registry and each of its models: its download, its memory, and the reasons why it would not be served."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.backends.enabled import why_disabled
from gateway.cli.tables import Plan, Plans, describe_forecast, make_plans
from gateway.config.licenses import forbids_commercial_use
from gateway.config.registry import ModelEntry, Registry, load_registry
from gateway.doctor.finding import Check, Detail, Finding, Status
from gateway.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from gateway.engine.forecast import Forecast

# Reading weights' headers and hashing files takes seconds each, and the hub may be slow for each model.
_LIMIT_S = 120.0
_STATUS = {
    "yes": Status.OK,
    "on demand": Status.OK,
    "elsewhere": Status.NOTE,
    "off": Status.NOTE,
    "after a download": Status.NOTE,
    "no": Status.TODO,
}


def registry_check(path: Path) -> tuple[Check, list[Registry]]:
    """Return the check of a registry, and a list to which it adds the registry if that is valid."""
    read: list[Registry] = []
    return Check("registry", lambda: list(_registry(path, read)), 10.0), read


def _registry(path: Path, read: list[Registry]) -> Iterator[Finding]:
    details: dict[str, Detail] = {"path": str(path.resolve())}
    try:
        registry = load_registry(path, os.environ)
    except ConfigError as error:
        yield Finding("registry", Status.TODO, str(error), f"correct {path}", details)
        return
    read.append(registry)
    number = len(registry.models)
    yield Finding("registry", Status.OK, f"{path}: valid, {number} model{'' if number == 1 else 's'}", details=details)


def model_check(registry: Registry) -> Check:
    """Return the check of the models of a registry; loads and downloads nothing."""
    return Check("models", lambda: list(_models(registry)), _LIMIT_S)


def _models(registry: Registry) -> Iterator[Finding]:
    plans = make_plans(registry)
    for entry in registry.models:
        plan = plans.get(entry.id)
        if plan is not None:
            yield _model(entry, plan)
    yield from _registry_findings(plans)


def _model(entry: ModelEntry, plan: Plan) -> Finding:
    status, forecast = _STATUS[plan.verdict], plan.forecast
    heading = (
        f"{entry.id} ({plan.verdict}): {entry.written_source}{f' at {entry.revision[:12]}' if entry.revision else ''}"
    )
    license_name = (forecast.license if forecast else "") or entry.license or ""
    details: dict[str, Detail] = {
        "id": entry.id,
        "verdict": plan.verdict,
        "source": entry.written_source,
        "revision": entry.revision,
        "license": license_name or None,
        "lines": list(plan.lines),
    }
    lines = list(plan.lines)
    mend = f"correct `{entry.id}` in models.yaml, or turn it off: `enabled: false`" if status is Status.TODO else ""
    if plan.verdict == "off" and (once := _forecast_if_accepted(entry)) is not None:
        forecast = once
        lines += describe_forecast(once)
        mend = "if you may use it under this license, `license_accepted: true` in models.yaml"
    if forecast is not None:
        details |= {
            "devices": list(forecast.devices),
            "dtype": forecast.dtype,
            "is_cached": forecast.info is not None,
            "download_bytes": forecast.download_bytes,
            "memory_bytes": None if forecast.memory is None else forecast.memory.total_bytes,
        }
        if forecast.is_refused:
            status = Status.TODO
            mend = f"correct `{entry.id}` in models.yaml, or HF_TOKEN"
        elif forecast.download_note:  # the hub did not answer
            status = Status.TODO
            mend = (
                f"reach the hub for `gateway download {entry.id}`, or copy its folder of the cache from another machine"
            )
    licensed = [f"license {license_name}"] if license_name and not (forecast and forecast.info is None) else []
    return Finding("model", status, "\n".join([heading, *lines, *licensed]), mend, details)


def _forecast_if_accepted(entry: ModelEntry) -> Forecast | None:
    """Return a model's forecast with its license accepted; ``None`` if the license is no obstacle, or it is unknown."""
    if entry.is_remote or entry.accepts_license or not forbids_commercial_use(entry.license or ""):
        return None
    from gateway.engine.forecast import Forecaster

    accepted = entry.model_copy(update={"license_accepted": True})
    try:
        return None if why_disabled(accepted) else Forecaster().forecast(accepted)
    except LoadError:
        return None


def _registry_findings(plans: Plans) -> Iterator[Finding]:
    """Yield the broken rules between models, and the notes about all models."""
    for problem in plans.broken:
        yield Finding("models", Status.TODO, problem)
    for note in plans.notes:
        yield Finding("models", Status.NOTE, note)
