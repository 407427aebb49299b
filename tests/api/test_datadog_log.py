"""The log has the fields that Datadog's log pipeline and facets read."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from structlog.testing import capture_logs

from tests.deploy.deployment_files import DEPLOY, ROOT

PIPELINE = json.loads((DEPLOY / "datadog" / "log-pipeline.json").read_text())
FACETS = json.loads((DEPLOY / "datadog" / "facets.json").read_text())
# For requests that these tests do not send: to an experiment, to a task, with a trace.
OTHERS = {"task", "experiment", "arm", "trace_id", "span_id"}


async def logged(connect: Callable[..., Awaitable[httpx.AsyncClient]]) -> set[str]:
    """Return the attributes of the lines of an answered and a refused request."""
    client = await connect()
    with capture_logs() as lines:
        await client.post("/v1/embeddings", json={"model": "mini", "input": "a"})
        await client.post("/v1/embeddings", json={"model": "mini", "input": "a", "dimensions": 7})
    return {name for line in lines for name in line} - {"log_level"}


def used(processor: dict[str, Any]) -> set[str]:
    """Return the attributes that a processor reads."""
    return {*processor.get("sources", []), *re.findall(r"[a-z]\w*", processor.get("expression", ""))}


async def test_every_attribute_exists(connect: Callable[..., Awaitable[httpx.AsyncClient]]) -> None:
    # structlog's processors add the rest; `exception` is in the line of an unexpected error.
    known = await logged(connect) | OTHERS | {"level", "timestamp", "logger", "exception"}
    read = {name for processor in PIPELINE["processors"] for name in used(processor)}
    gone = {
        name
        for processor in PIPELINE["processors"]
        if not processor.get("preserve_source", True)
        for name in used(processor)
    }
    made = {processor["target"] for processor in PIPELINE["processors"] if "target" in processor}

    assert read <= known
    assert {facet["path"] for facet in FACETS} <= {f"@{name}" for name in (known - gone) | made}


def test_the_other_attributes_are_written() -> None:
    text = "".join((ROOT / "gateway" / name).read_text() for name in ("http/middleware.py", "telemetry/logs.py"))

    assert all(f'"{name}"' in text for name in OTHERS - {"trace_id", "span_id"})
    assert "trace_ids" in text
    assert "TimeStamper" in text
    assert "add_log_level" in text
