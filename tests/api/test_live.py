"""``/v1/live``, ``/v1/shadows`` and ``/v1/errors``: the current state of a gateway, limited to the models of the key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from gateway.access.keyring import key_digest
from gateway.recent import MAX_ERRORS, NUM_MINUTES, ErrorFacts, RecentErrors, RecentTraffic

Connect = Callable[..., Awaitable[httpx.AsyncClient]]


async def test_live_counts_the_requests_of_each_model(client: httpx.AsyncClient) -> None:
    for text in ("a", "b", "c"):
        await client.post("/v1/embeddings", json={"model": "mini", "input": text})
    await client.post("/v1/embeddings", json={"model": "mini", "input": "a", "dimensions": 3})

    models = {model["id"]: model for model in (await client.get("/v1/live")).json()["data"]}

    assert list(models) == ["mini", "jina", "team/small"]
    mini = models["mini"]
    assert (mini["requests"], mini["errors"], mini["state"]) == (4, 1, "ready")
    assert sum(mini["requests_by_minute"]) == 4
    assert len(mini["requests_by_minute"]) == NUM_MINUTES
    assert 0 < mini["p50_s"] <= mini["p99_s"] < 1
    assert models["jina"]["p50_s"] is None


async def test_errors_are_listed_without_texts_and_equal_ones_count_together(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        await client.post("/v1/embeddings", json={"model": "nothing", "input": "a secret text"})
    last = await client.post("/v1/embeddings", json={"model": "mini", "input": {"text": "a secret text"}})

    errors = (await client.get("/v1/errors")).json()["data"]

    assert [(error["status"], error["code"], error["number"]) for error in errors] == [
        (400, "invalid_input", 1),
        (404, "model_not_found", 3),
    ]
    assert errors[0]["request_id"] == last.headers["x-request-id"]
    assert errors[1]["model"] == "nothing"
    assert "secret" not in str(errors)


async def test_a_key_sees_its_own_errors_and_models(connect: Connect, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        f"version: 1\nkeys:\n  - {{name: one, models: [mini], sha256: {key_digest('key-of-one')}}}\n"
        f"  - {{name: two, sha256: {key_digest('key-of-two')}}}\n"
    )
    client = await connect(api_keys_file=keys, admin_key="operator-key")

    def bearer(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    await client.post("/v1/embeddings", json={"model": "jina", "input": "x"}, headers=bearer("key-of-one"))
    await client.post("/v1/embeddings", json={"model": "none", "input": "x"}, headers=bearer("key-of-two"))

    mine = (await client.get("/v1/errors", headers=bearer("key-of-one"))).json()["data"]
    live = (await client.get("/v1/live", headers=bearer("key-of-one"))).json()["data"]
    everything = (await client.get("/admin/errors", headers=bearer("operator-key"))).json()["data"]

    assert [error["client"] for error in mine] == ["one"]
    assert [model["id"] for model in live] == ["mini"]
    assert {error["client"] for error in everything} == {"one", "two"}
    assert (await client.get("/admin/errors", headers=bearer("key-of-two"))).status_code == 403
    assert (await client.get("/v1/errors")).status_code == 401


async def test_without_shadows_the_list_is_empty(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/shadows")).json() == {"object": "list", "data": []}


def test_only_so_many_errors_are_remembered() -> None:
    errors = RecentErrors()
    for number in range(MAX_ERRORS + 50):
        errors.add(ErrorFacts(404, "model_not_found", "/", f"model-{number}", "client", None), None, f"req-{number}")
        errors.add(ErrorFacts(429, "overloaded", "/", "bge", "loop", None), None, "req")

    known = list(errors)

    assert len(known) == MAX_ERRORS
    assert known[0].number == MAX_ERRORS + 50  # one client in a loop takes one place
    assert known[1].request_id == f"req-{MAX_ERRORS + 49}"


def test_old_minutes_no_longer_count() -> None:
    now = 1_000_000.0
    traffic = RecentTraffic(lambda: now)
    for _ in range(60):
        traffic.record("mini", 0.1, is_error=False)
    traffic.record("mini", 9.0, is_error=True)
    assert traffic.of("mini").requests == 61
    assert traffic.of("mini").p99_s == pytest.approx(0.1, rel=0.03)  # an error has no latency

    now += 60
    assert 0 < traffic.of("mini").requests_per_s <= 61 / 60
    now += 60
    assert traffic.of("mini").requests_per_s == 0
    assert traffic.of("mini").by_minute[-3:] == [61, 0, 0]
    now += 60 * NUM_MINUTES
    later = traffic.of("mini")
    assert (later.requests, later.errors, later.p50_s) == (0, 0, None)


def test_a_model_that_is_gone_is_forgotten() -> None:
    traffic = RecentTraffic()
    for model in ("mini", "jina"):
        traffic.record(model, 0.1, is_error=False)
    traffic.keep({"jina"})
    assert (traffic.of("mini").requests, traffic.of("jina").requests) == (0, 1)


def test_a_client_with_a_new_error_in_each_request_pushes_out_only_its_own() -> None:
    errors = RecentErrors()
    quiet = ErrorFacts(400, "invalid_input", "/v1/embeddings", "mini", "quiet", None)
    errors.add(quiet, None, "1")
    for number in range(3 * MAX_ERRORS):
        errors.add(ErrorFacts(404, "model_not_found", "/v1/embeddings", f"x{number}", "loud", "model"), None, "2")

    found = list(errors)
    assert len(found) == MAX_ERRORS
    assert found[0].facts.asked == f"x{3 * MAX_ERRORS - 1}"
    assert found[-1].facts == quiet
