"""The standard ``OTEL_*`` variables, as far as traces go: are any wanted, and is anything wrong with them?

OpenTelemetry's SDK reads them itself. It is not told what is found here; but where a value is wrong, it would log a
warning and do something else, or fail at the first span, and an operator is to be told at the start. What may hold a
secret, headers and endpoints, is not repeated; the SDK's warnings would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from gateway.config.wording import did_you_mean, enumerate_names, quote
from gateway.errors import ConfigError, Problem
from gateway.telemetry.trace_export import GRPC, HTTP, TraceSettings

_EXPORTERS: Final = ("otlp", "console", "none")
_RATIO_SAMPLERS: Final = ("traceidratio", "parentbased_traceidratio")
_SAMPLERS: Final = ("always_on", "always_off", "parentbased_always_on", "parentbased_always_off", *_RATIO_SAMPLERS)
_COMPRESSIONS: Final = ("none", "gzip", "deflate")
_COUNTS: Final = (
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
)
_FILES: Final = ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
# As the SDK reads them: a name as in HTTP, and a value that may be percent-encoded, or at least needs it not.
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\s*=[ !#-+\--:<-\[\]-~]*")
_ATTRIBUTE: Final = re.compile(r"[^=]+=.*")

_Problems: TypeAlias = Iterator[tuple[str, str]]
"""Pairs of a variable and what to say of it."""


def read_trace_settings(environ: Mapping[str, str]) -> TraceSettings:
    """Read what the environment says of traces.

    Args:
        environ: the environment; an empty variable counts as unset.

    Raises:
        ConfigError: a variable has a value that cannot be used; lists all of them.
    """
    given = {name: value.strip() for name, value in environ.items() if value.strip()}
    problems = list(_propagator_problems(given))  # the web framework reads this one, whether there are traces or not
    exporters = _exporters(given)
    if exporters:
        problems += _problems(given, exporters)
    if problems:
        raise ConfigError([Problem("environment", 0, 0, name, message) for name, message in problems])
    return TraceSettings(tuple(exporters), _otlp(given, "PROTOCOL")[1] or HTTP)


def _exporters(given: Mapping[str, str]) -> list[str]:
    """Return the names in ``OTEL_TRACES_EXPORTER``, right or wrong; an endpoint alone means OTLP."""
    if given.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return []
    if named := given.get("OTEL_TRACES_EXPORTER"):
        return [name for part in named.split(",") if (name := part.strip()) != "none"]
    return ["otlp"] if _otlp(given, "ENDPOINT")[1] else []


def _otlp(given: Mapping[str, str], setting: str) -> tuple[str, str]:
    """Return name and value of a variable that there is for traces and for all signals; the value may be empty."""
    own, common = f"OTEL_EXPORTER_OTLP_TRACES_{setting}", f"OTEL_EXPORTER_OTLP_{setting}"
    return (own, given[own]) if own in given else (common, given.get(common, ""))


def _problems(given: Mapping[str, str], exporters: list[str]) -> _Problems:
    for name in exporters:
        if name not in _EXPORTERS:
            yield "OTEL_TRACES_EXPORTER", _one_of(_EXPORTERS, name)
    sampler = given.get("OTEL_TRACES_SAMPLER", _SAMPLERS[0]).lower()
    if sampler not in _SAMPLERS:
        yield "OTEL_TRACES_SAMPLER", _one_of(_SAMPLERS, sampler)
    ratio = given.get("OTEL_TRACES_SAMPLER_ARG", "1")
    if sampler in _RATIO_SAMPLERS and not _is_number(ratio, lambda share: 0 <= share <= 1):
        yield "OTEL_TRACES_SAMPLER_ARG", f"must be a number from 0 to 1, got {quote(ratio)}"
    for name in _COUNTS:
        if name in given and not (given[name].isdecimal() and int(given[name])):
            yield name, f"must be a whole number above 0, got {quote(given[name])}"
    if not _are_pairs(given.get("OTEL_RESOURCE_ATTRIBUTES", ""), _ATTRIBUTE):
        yield "OTEL_RESOURCE_ATTRIBUTES", "must be pairs such as `name=value,name=value`"
    if "otlp" in exporters:
        yield from _otlp_problems(given)


def _otlp_problems(given: Mapping[str, str]) -> _Problems:
    name, protocol = _otlp(given, "PROTOCOL")
    if protocol not in ("", HTTP, GRPC):
        yield name, _one_of((HTTP, GRPC), protocol)
    name, endpoint = _otlp(given, "ENDPOINT")
    if endpoint and not _is_endpoint(endpoint if "://" in endpoint or protocol != GRPC else f"http://{endpoint}"):
        yield name, f"must be a URL such as `http://127.0.0.1:{4317 if protocol == GRPC else 4318}`"
    name, timeout = _otlp(given, "TIMEOUT")
    if timeout and not _is_number(timeout, lambda seconds: 0 < seconds < float("inf")):
        yield name, f"must be a number of seconds above 0, got {quote(timeout)}"
    name, compression = _otlp(given, "COMPRESSION")
    if compression and compression.lower() not in _COMPRESSIONS:
        yield name, _one_of(_COMPRESSIONS, compression)
    name, headers = _otlp(given, "HEADERS")
    if not _are_pairs(headers, _HEADER):
        yield name, "must be pairs such as `name=value,name=value`, with the values percent-encoded"
    for setting in _FILES:
        name, file = _otlp(given, setting)
        if file and not Path(file).is_file():
            yield name, f"there is no file {quote(file)}"


def _propagator_problems(given: Mapping[str, str]) -> _Problems:
    if named := given.get("OTEL_PROPAGATORS"):
        known = sorted({"none", *(found.name for found in entry_points(group="opentelemetry_propagator"))})
        for name in named.split(","):
            if name.strip() not in known:
                yield "OTEL_PROPAGATORS", _one_of(known, name.strip())


def _one_of(known: Iterable[str], got: str) -> str:
    return f"must be one of {enumerate_names(known)}, got {quote(got)}{did_you_mean(got, known)}"


def _are_pairs(text: str, pair: re.Pattern[str]) -> bool:
    return all(pair.fullmatch(part.strip()) for part in text.split(",") if part.strip())


def _is_number(text: str, accepts: Callable[[float], bool]) -> bool:
    try:
        return accepts(float(text))
    except ValueError:
        return False


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # its port is no number
        return False
