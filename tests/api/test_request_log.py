"""The log line of a refused request has the request's options and the reason, and never a text."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from gateway.config.registry import Experiment
from gateway.telemetry import metrics

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
Line = MutableMapping[str, Any]


async def logged(client: httpx.AsyncClient, path: str, body: object) -> Line:
    with capture_logs() as lines:
        await client.post(path, json=body)
    (line,) = [line for line in lines if line["event"] == "request"]
    return line


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "minni", "input": "a"}),
        ("/v1/rerank", {"model": "minni", "query": "a", "documents": ["b"]}),
        ("/api/embed", {"model": "minni", "input": "a"}),
        ("/tei/minni/embed", {"inputs": "a"}),
        ("/tei/minni/tokenize", {"inputs": "a"}),
    ],
)
async def test_the_model_has_the_name_in_the_request(connect: Connect, path: str, body: object) -> None:
    line = await logged(await connect(), path, body)

    assert line["model"] == "minni"
    assert line["error_code"] == "model_not_found"
    assert "'minni'" in line["reason"]


async def test_a_long_name_is_cut(connect: Connect) -> None:
    line = await logged(await connect(), "/v1/embeddings", {"model": "m" * 5000, "input": "a"})

    assert line["model"] == "m" * 100
    assert len(line["reason"]) <= 300


async def test_the_field_at_fault_is_named(connect: Connect) -> None:
    line = await logged(await connect(), "/v1/embeddings", {"model": "mini", "input": "a", "dimensions": 7})

    assert (line["param"], line["error_code"], line["model"]) == ("dimensions", "unsupported_dimensions", "mini")
    assert "7" in line["reason"]


async def test_an_unknown_path_is_logged(connect: Connect) -> None:
    line = await logged(await connect(), "/v1/embeding", {})

    assert line["path"] == "other"  # which metrics go by
    assert "no such path: /v1/embeding" in line["reason"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", "a secret text"),
        ("/v1/embeddings", {"model": "mini", "input": {"a secret text": 1}}),
        ("/v1/embeddings", {"model": "mini", "input": "x", "dimensions": "a secret text"}),
        ("/v1/rerank", {"model": "mini", "query": "q", "documents": "a secret text"}),
        ("/v1/embeddings", {"model": "mini", "input": ["x", {"a secret text": 1}]}),
    ],
)
async def test_no_text_is_in_the_reason(connect: Connect, path: str, body: object) -> None:
    line = await logged(await connect(), path, body)

    assert line["status"] == 400
    assert line["reason"]
    assert "secret" not in str(line)


async def test_an_answered_request_has_no_reason(connect: Connect) -> None:
    line = await logged(await connect(), "/v1/embeddings", {"input": "a"})

    assert line["model"] == "mini"
    assert not {"reason", "param", "error_code"} & line.keys()
    assert {name for name in line if name.endswith("_ms")} == {
        *("queue_ms", "tokenize_ms", "inference_ms", "serialize_ms")
    }


async def test_only_failed_requests_are_counted_as_errors(connect: Connect) -> None:
    def counted() -> set[str]:
        [errors] = [one for one in metrics.REGISTRY.collect() if one.name == "gateway_errors"]
        return {sample.labels["code"] for sample in errors.samples}

    await logged(await connect(), "/v1/embeddings", {"input": "a"})

    assert "None" not in counted()


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics"])
async def test_probes_and_scrapes_are_not_among_the_lines_of_requests(connect: Connect, path: str) -> None:
    client = await connect()
    with capture_logs() as lines:
        await client.get(path)

    assert [line["log_level"] for line in lines if line["event"] == "request"] == ["debug"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/tei/exp%2Fada/embeds"),
        ("GET", "/tei/exp%2Fada/embed"),
        ("GET", "/tei/exp%2Fada"),
        ("POST", "/openai/deployments/exp/ada/embedding"),
        ("GET", "/v1/experiments/exp/ada/assignment"),
        ("GET", "/v1/experiments/exp/ada"),
        ("POST", "/v1/experiments/exp/ada/preview"),
        ("GET", "/v1/models/exp/ada/more"),
    ],
)
async def test_no_unit_in_a_wrong_path_is_in_the_reason(connect: Connect, method: str, path: str) -> None:
    arms = ({"model": "mini", "weight": 1}, {"model": "jina", "weight": 1})
    experiment = {"id": "exp", "kind": "cross_space", "unit": ("model",), "arms": arms}
    client = await connect(experiments=[Experiment.model_validate(experiment)])

    with capture_logs() as lines:
        answer = await client.request(method, path, json={"weights": {}} if method == "POST" else None)

    (line,) = [one for one in lines if one["event"] == "request"]
    assert answer.is_client_error
    assert "ada" not in json.dumps(line | {"request_id": ""})  # which is random, and may contain it
    assert line["reason"]


async def test_a_preflight_request_is_recorded_like_any_other(connect: Connect) -> None:
    """A page that is refused shows its developer nothing but that; the operator has to see the request."""
    client = await connect(cors_origins="https://app.example.com", api_keys=["secret-key"])

    def counted() -> list[float]:
        known = metrics.values(metrics.REQUESTS)
        return [known.get(("other", status), 0) for status in ("200", "400")]

    before = counted()
    with capture_logs() as lines:
        answers = [
            await client.options(
                "/v1/embeddings", headers={"origin": f"https://{host}", "access-control-request-method": "POST"}
            )
            for host in ("app.example.com", "evil.example.com")
        ]

    noted = [(line["method"], line["status"], line["request_id"]) for line in lines if line["event"] == "request"]
    assert noted == [("OPTIONS", answer.status_code, answer.headers["x-request-id"]) for answer in answers]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert counted() == [number + 1 for number in before]
