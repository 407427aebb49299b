"""The standard ``OTEL_*`` variables for traces: whether traces are on, and errors that the SDK would report too late.

OpenTelemetry's SDK reads the variables itself and reports most wrong values at the start. This module checks for values
with which it would start and then fail on every export, sample every trace, or log a secret. Headers and endpoints may hold
secrets, so no message repeats them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from gateway.config.wording import did_you_mean, enumerate_names, quote
from gateway.errors import ConfigError, Problem
from gateway.telemetry.trace_export import GRPC, HTTP, TraceSettings

_EXPORTERS: Final = ("otlp", "console", "none")
_SAMPLERS: Final = (
    "always_on", "always_off", "traceidratio",
    "parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio",
)  # fmt: skip
_FILES: Final = ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
# A header as the SDK reads it: an HTTP header name, and a value that is percent-encoded or printable ASCII.
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\s*=[ !#-+\--:<-\[\]-~]*")

_Problems: TypeAlias = Iterator[tuple[str, str]]
"""Pairs of a variable and a message."""


def read_trace_settings(environ: Mapping[str, str]) -> TraceSettings:
    """Read the variables for traces.

    Args:
        environ: the environment; an empty variable counts as unset.

    Raises:
        ConfigError: a variable has an unusable value; the error lists all such variables.
    """
    variables = {name: value.strip() for name, value in environ.items() if value.strip()}
    problems = list(_propagator_problems(variables))  # the web framework reads this variable, with or without traces
    exporters = _exporters(variables)
    problems += [
        ("OTEL_TRACES_EXPORTER", _one_of(_EXPORTERS, exporter)) for exporter in exporters if exporter not in _EXPORTERS
    ]
    if exporters:
        problems += _sampler_problems(variables)
    if "otlp" in exporters:
        problems += _otlp_problems(variables)
    if problems:
        raise ConfigError([Problem("environment", 0, 0, name, message) for name, message in problems])
    return TraceSettings(tuple(exporters), _otlp(variables, "PROTOCOL")[1] or HTTP)


def _exporters(variables: Mapping[str, str]) -> list[str]:
    """Return the names in ``OTEL_TRACES_EXPORTER``, known or not; an endpoint alone means OTLP."""
    if variables.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return []
    if names := variables.get("OTEL_TRACES_EXPORTER"):
        return [name for part in names.split(",") if (name := part.strip()) != "none"]
    return ["otlp"] if _otlp(variables, "ENDPOINT")[1] else []


def _otlp(variables: Mapping[str, str], setting: str) -> tuple[str, str]:
    """Return the name and value of the traces-specific variable if set, else of the general one, which may be empty."""
    specific, general = f"OTEL_EXPORTER_OTLP_TRACES_{setting}", f"OTEL_EXPORTER_OTLP_{setting}"
    return (specific, variables[specific]) if specific in variables else (general, variables.get(general, ""))


def _sampler_problems(variables: Mapping[str, str]) -> _Problems:
    """Yield values with which the SDK would log a warning and sample every trace."""
    sampler = variables.get("OTEL_TRACES_SAMPLER", _SAMPLERS[0]).lower()
    if sampler not in _SAMPLERS:
        yield "OTEL_TRACES_SAMPLER", _one_of(_SAMPLERS, sampler)
    ratio = variables.get("OTEL_TRACES_SAMPLER_ARG", "1")
    if sampler.endswith("traceidratio") and not _is_ratio(ratio):
        yield "OTEL_TRACES_SAMPLER_ARG", f"must be a number from 0 to 1, got {quote(ratio)}"


def _otlp_problems(variables: Mapping[str, str]) -> _Problems:
    name, protocol = _otlp(variables, "PROTOCOL")
    if protocol not in ("", HTTP, GRPC):
        yield name, _one_of((HTTP, GRPC), protocol)
    name, endpoint = _otlp(variables, "ENDPOINT")
    if endpoint and not _is_endpoint(endpoint if "://" in endpoint or protocol != GRPC else f"http://{endpoint}"):
        yield name, f"must be a URL such as `http://127.0.0.1:{4317 if protocol == GRPC else 4318}`"
    name, headers = _otlp(variables, "HEADERS")
    if not all(_HEADER.fullmatch(part.strip()) for part in headers.split(",") if part.strip()):
        yield name, "must be pairs such as `name=value,name=value`, with the values percent-encoded"
    for setting in _FILES:
        name, file = _otlp(variables, setting)
        if file and not Path(file).is_file():
            yield name, f"there is no file {quote(file)}"


def _propagator_problems(variables: Mapping[str, str]) -> _Problems:
    if names := variables.get("OTEL_PROPAGATORS"):
        known = sorted({"none", *(entry_point.name for entry_point in entry_points(group="opentelemetry_propagator"))})
        for name in names.split(","):
            if name.strip() not in known:
                yield "OTEL_PROPAGATORS", _one_of(known, name.strip())


def _one_of(known: Iterable[str], got: str) -> str:
    return f"must be one of {enumerate_names(known)}, got {quote(got)}{did_you_mean(got, known)}"


def _is_ratio(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # its port is not a number
        return False
