"""The client of a gateway: its requests, retries and errors."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from gateway.cli import client as client_module
from gateway.cli.client import GatewayClient, Refused
from gateway.errors import StartError
from tests.cli.cards import make_card

Answer = httpx.Response | Exception
SPACE = {"x-gateway-space": "mini@0123456789ab", "x-gateway-model": "mini"}


def ok(*vectors: list[float], headers: dict[str, str] | None = None) -> httpx.Response:
    rows = [{"embedding": base64.b64encode(np.array(row, "<f4").tobytes()).decode()} for row in vectors]
    return httpx.Response(200, json={"data": rows, "usage": {"prompt_tokens": 7}}, headers=headers or SPACE)


def refusal(status: int, message: str, headers: dict[str, str] | None = None, **error: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, **error}}, headers=headers)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses that were made; they take no time."""
    made: list[float] = []

    async def sleep(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr(client_module.asyncio, "sleep", sleep)
    return made


@pytest.fixture
def ask() -> Callable[..., GatewayClient]:
    """Return a function that makes a client of a gateway which gives these answers, one after the other."""

    def ask(*answers: Answer, requests: list[httpx.Request] | None = None, patience_s: float = 600) -> GatewayClient:
        left = list(answers)

        def answer(request: httpx.Request) -> httpx.Response:
            if requests is not None:
                requests.append(request)
            one = left.pop(0)
            if isinstance(one, Exception):
                raise one
            return one

        http = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://gateway")
        return GatewayClient(http, "http://gateway", patience_s=patience_s)

    return ask


async def test_a_request_has_all_wanted_options(ask: Callable[..., GatewayClient]) -> None:
    requests: list[httpx.Request] = []
    client = ask(ok([1, 2], [3, 4]), ok([1]), requests=requests)
    embedded = await client.embed("mini", ["a", "b"], "retrieval.query", 2, "mini@0123456789ab")
    assert embedded.vectors.tolist() == [[1, 2], [3, 4]]
    assert (embedded.vectors.dtype, embedded.space, embedded.num_tokens) == (np.float32, SPACE["x-gateway-space"], 7)
    await client.embed("mini", ["a"])
    assert json.loads(requests[0].content) == {
        "model": "mini",
        "input": ["a", "b"],
        "encoding_format": "base64",
        "task": "retrieval.query",
        "dimensions": 2,
    }
    assert requests[0].headers["x-gateway-expect-space"] == "mini@0123456789ab"
    assert json.loads(requests[1].content).keys() == {"model", "input", "encoding_format"}
    assert "x-gateway-expect-space" not in requests[1].headers


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            refusal(401, "an API key is required"),
            "the gateway (http://gateway) answers 401: an API key is required; "
            "--api-key-env names the environment variable with the key",
        ),
        (refusal(404, "no model is called 'x'"), "answers 404: no model is called 'x'"),
        (refusal(412, "another space"), "answers 412: another space"),
        (refusal(503, "it failed", {"x-should-retry": "false", "retry-after": "1"}), "answers 503: it failed"),
        (
            httpx.Response(502, text="<html>Bad Gateway"),
            "answers 502: Bad Gateway; is it a gateway? It says: <html>Bad Gateway",
        ),
        (httpx.Response(500), "answers 500: Internal Server Error; is it a gateway?"),
        (httpx.Response(200, text="hello"), "http://gateway is not a gateway: its answer for 'mini' has no vectors"),
        (httpx.Response(200, json=[]), "is not a gateway"),
        (ok([1], headers={"x-other": "1"}), "has no vectors, or does not name their space"),
        (ok([1], [1, 2]), "is not a gateway"),
        (ok([1], [2]), "returned 2 vectors for 1 texts"),
        (httpx.ConnectError("Connection refused"), "no gateway answers at http://gateway: Connection refused"),
        (httpx.ConnectTimeout(""), "no gateway answers at http://gateway: it takes too long"),
        (httpx.UnsupportedProtocol("no http"), "cannot be reached: UnsupportedProtocol"),
    ],
)
async def test_an_error_that_a_retry_cannot_help_is_raised_at_once(
    ask: Callable[..., GatewayClient], pauses: list[float], answer: Answer, message: str
) -> None:
    with pytest.raises(StartError, match=re.escape(message)):
        await ask(answer).embed("mini", ["a"])
    assert pauses == []


@pytest.mark.parametrize(
    ("answers", "expected_pauses"),
    [
        ([refusal(503, "still loading", {"retry-after": "5"})] * 2, [5.0, 5.0]),
        ([refusal(429, "full", {"retry-after": "2"})], [2.0]),
        ([refusal(503, "no idea")] * 7, [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]),
        ([refusal(429, "full", {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"})], [1.0]),
        ([refusal(429, "full", {"retry-after": "0"})], [1.0]),
        ([httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut"), httpx.ReadError("reset")], [1.0, 2.0, 4.0]),
    ],
)
async def test_a_passing_failure_is_waited_out(
    ask: Callable[..., GatewayClient], pauses: list[float], answers: list[Answer], expected_pauses: list[float]
) -> None:
    assert (await ask(*answers, ok([1])).embed("mini", ["a"])).vectors.tolist() == [[1]]
    assert pauses == expected_pauses


async def test_patience_ends(ask: Callable[..., GatewayClient], pauses: list[float]) -> None:
    with pytest.raises(StartError, match=r"answers 503: still loading; gave up after 60 s"):
        await ask(refusal(503, "still loading", {"retry-after": "120"}), patience_s=60).embed("mini", ["a"])
    assert pauses == []


async def test_a_refusal_names_the_field(ask: Callable[..., GatewayClient]) -> None:
    with pytest.raises(Refused) as refused:
        await ask(refusal(400, "two tasks", param="task")).embed("mini", ["a"])
    assert refused.value.param == "task"


async def test_a_card_is_asked_for_by_any_name(ask: Callable[..., GatewayClient]) -> None:
    requests: list[httpx.Request] = []
    sent = make_card("mini", width=4, dimensions=[4, 2])
    answer = httpx.Response(200, json=sent.model_dump() | {"more": 1})
    card = await ask(answer, requests=requests).card("team/mini:a task")
    assert card == sent
    assert requests[0].url.raw_path == b"/v1/models/team/mini:a%20task"


@pytest.mark.parametrize("answer", [httpx.Response(200, text="hello"), httpx.Response(200, json=[])])
async def test_an_answer_that_is_not_a_card_is_an_error(
    ask: Callable[..., GatewayClient], answer: httpx.Response
) -> None:
    with pytest.raises(
        StartError,
        match="http://gateway is not a gateway of this version: its answer to /v1/models/mini cannot be read",
    ):
        await ask(answer).card("mini")
