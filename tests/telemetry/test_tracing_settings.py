"""The ``OTEL_*`` variables: whether traces are on, and the messages for wrong values."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gateway.config.otel import read_trace_settings
from gateway.errors import ConfigError
from gateway.telemetry.trace_export import TraceSettings

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
GRPC = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
OFF = TraceSettings(())


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, OFF),
        ({"OTEL_SERVICE_NAME": "embeddings", "OTEL_TRACES_SAMPLER": "always_on"}, OFF),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, OFF),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, OFF),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "TRUE"}, OFF),
        (ENDPOINT, TraceSettings(("otlp",), "http/protobuf")),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://a:4318/v1/traces"}, TraceSettings(("otlp",))),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, TraceSettings(("otlp",))),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, TraceSettings(("otlp", "console"))),
        ({**ENDPOINT, **GRPC}, TraceSettings(("otlp",), "grpc")),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317", **GRPC}, TraceSettings(("otlp",), "grpc")),
        ({**ENDPOINT, **GRPC, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, TraceSettings(("otlp",))),
        (
            {**ENDPOINT, "OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"},
            TraceSettings(("otlp",)),
        ),
        ({**ENDPOINT, "OTEL_PROPAGATORS": "tracecontext,baggage"}, TraceSettings(("otlp",))),
        (
            {**ENDPOINT, "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20a, x-tenant = b c,"},
            TraceSettings(("otlp",)),
        ),
        ({**ENDPOINT, "OTEL_RESOURCE_ATTRIBUTES": "service.version=1,url=a=b"}, TraceSettings(("otlp",))),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_CERTIFICATE": __file__}, TraceSettings(("otlp",))),
    ],
)
def test_the_variables_that_turn_traces_on(environ: dict[str, str], expected: TraceSettings) -> None:
    settings = read_trace_settings(environ)

    assert settings.exporters == expected.exporters
    if settings.exporters:
        assert settings.protocol == expected.protocol


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_TRACES_EXPORTER", "oltp", "did you mean `otlp`?"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "must be one of `http/protobuf`, `grpc`, got `http/json`"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "GRPC", "did you mean `grpc`?"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "127.0.0.1:4318", "must be a URL such as `http://127.0.0.1:4318`"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://:4318", "must be a URL"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:http", "must be a URL"),
        ("OTEL_TRACES_SAMPLER", "sometimes", "must be one of `always_on`"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5", "must be a number from 0 to 1, got `1.5`"),
        ("OTEL_TRACES_SAMPLER_ARG", "ten percent", "must be a number from 0 to 1"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization Bearer", "must be pairs such as `name=value,name=value`"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=b,authorization", "must be pairs"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/ca.pem", "there is no file `/no/ca.pem`"),
        ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", "/no/key.pem", "there is no file"),
        ("OTEL_PROPAGATORS", "tracecontext,b4", "must be one of `baggage`"),
    ],
)
def test_a_wrong_value_gives_one_line(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_trace_settings({**ENDPOINT, "OTEL_TRACES_SAMPLER": "parentbased_traceidratio", name: value})

    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"environment: {name}: ")
    assert message in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "htp://user:secret@collector"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization: Bearer secret"),
    ],
)
def test_a_secret_in_a_wrong_value_is_not_repeated(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_trace_settings({**ENDPOINT, name: value})

    assert "secret" not in str(raised.value)


def test_without_traces_wrong_values_do_not_matter() -> None:
    assert read_trace_settings({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_PROTOCOL": "-"}).exporters == ()


@pytest.mark.parametrize("name", ["OTEL_PROPAGATORS", "OTEL_TRACES_EXPORTER"])
def test_serve_ends_with_that_line(name: str) -> None:
    """Also where the web framework would fail to be imported: it reads ``OTEL_PROPAGATORS``."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "serve"],
        env={**os.environ, name: "made-up"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"environment: {name}: must be one of ")
