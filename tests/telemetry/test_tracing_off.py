"""Without ``OTEL_*`` tracing costs a request nothing: no module is loaded, and no span is created."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from gateway.telemetry import tracing

SCRIPT = """
import asyncio, json, os, sys, httpx
from pathlib import Path
from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.otel import read_trace_settings
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.telemetry import trace_export, tracing

async def main():
    entry = ModelEntry(id="mini", source="./mini", enabled=True)
    registry = Registry(path=Path("models.yaml"), version=1, models=(entry,))
    deployment = Deployment(registry, Settings(), make_backend=lambda entry: FakeBackend(fake_info(entry.id)))
    await deployment.start()
    transport = httpx.ASGITransport(create_app(deployment))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.post("/v1/embeddings", json={"model": "mini", "input": "a"})
    await deployment.stop()
    loaded = [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "grpc"))]
    print(json.dumps({"status": answer.status_code, "loaded": loaded, "is_off": tracing._tracer is None}))

with trace_export.sending(read_trace_settings(os.environ)):
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("environ", "is_off"),
    [
        ({}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_TRACES_EXPORTER": "console"}, False),
    ],
    ids=["nothing set", "no exporter", "disabled", "on"],
)
def test_nothing_is_loaded_unless_it_is_asked_for(environ: dict[str, str], is_off: bool) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True)

    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"status"')))
    assert report["status"] == 200
    assert report["is_off"] is is_off
    assert (report["loaded"] == []) is is_off


def test_off_a_request_makes_nothing() -> None:
    scope = {"path": "/v1/embeddings", "method": "POST"}
    request = tracing.request_span(scope, SimpleNamespace(), "id", untraced=())  # type: ignore[arg-type]
    embeddings = tracing.embeddings_span(model="jina", provider="infinity", num_texts=1, encoding=None)
    headers: dict[str, str] = {}
    tracing.inject(headers)

    assert request is embeddings  # one and the same for all
    assert headers == {}
    with request as span:
        assert span is None
