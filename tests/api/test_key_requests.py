"""Keys over HTTP: their models, their quotas per minute, and their rotation while requests arrive."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from gateway.access import keyring
from gateway.access.keyring import key_digest
from gateway.config.registry import Experiment

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
Serve = Callable[..., contextlib.AbstractContextManager[tuple[str, int]]]
ALIASES = {"default": "mini", "search": "jina:retrieval.query"}


def write(path: Path, **keys: str) -> Path:
    """Put a file of keys in place: by the client's name its key, and after a comma the rest of its entry."""
    lines = []
    for name, more in keys.items():
        key, _, rest = more.partition(",")
        lines.append(f"- {{name: {name}, sha256: {key_digest(key)}{', ' if rest else ''}{rest}}}\n")
    new = path.with_suffix(".new")
    new.write_text("version: 1\nkeys:\n" + "".join(lines))
    return new.replace(path)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def embed(client: httpx.AsyncClient, key: str, model: str | None = None, text: str = "a b") -> httpx.Response:
    return await client.post("/v1/embeddings", json={"input": text, "model": model}, headers=bearer(key))


# ------------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("allowed", "model"),
    [
        ("mini", "mini"),
        ("mini", "default"),
        ("mini", None),
        ("mini", "owner/mini"),
        ("default", "default"),
        ("default", None),
        ("jina", "jina:retrieval.query"),
    ],
)
async def test_a_key_is_for_a_model_by_any_of_its_names(
    connect: Connect, tmp_path: Path, allowed: str, model: str | None
) -> None:
    file = write(tmp_path / "keys.yaml", a=f"key,models: [{allowed}]")
    client = await connect(api_keys_file=file)

    assert (await embed(client, "key", model)).status_code == 200


@pytest.mark.parametrize(
    ("allowed", "model"),
    [("mini", "jina"), ("default", "mini"), ("jina", None), ("x", "mini"), ("jina", "owner/mini")],
)
async def test_it_is_for_no_other(
    connect: Connect, check_error: CheckError, tmp_path: Path, allowed: str, model: str | None
) -> None:
    client = await connect(api_keys_file=write(tmp_path / "keys.yaml", a=f"key,models: [{allowed}]"))

    message = check_error(
        await embed(client, "key", model), 403, "model_not_allowed", param="model", type_="permission_error"
    )

    assert message == f"this API key may not use model {model or 'default'!r}"


async def test_spaces_and_experiments_are_shown_to_those_who_may_use_them(
    connect: Connect, check_error: CheckError, tmp_path: Path
) -> None:
    arms = ({"model": "mini", "weight": 1}, {"model": "jina", "weight": 1})
    split = Experiment.model_validate({"id": "exp", "kind": "cross_space", "unit": ("api_key",), "arms": arms})
    file = write(tmp_path / "keys.yaml", a="one,models: [mini]", b="two,models: [exp, jina]")
    client = await connect(api_keys_file=file, experiments=[split])

    async def shown(key: str) -> tuple[set[str], list[str]]:
        spaces = (await client.get("/v1/spaces", headers=bearer(key))).json()["data"]
        experiments = (await client.get("/v1/experiments", headers=bearer(key))).json()["data"]
        return {member["model"] for space in spaces for member in space["members"]}, [one["id"] for one in experiments]

    assert await shown("one") == ({"mini"}, [])
    assert await shown("two") == ({"mini", "jina"}, ["exp"])  # in either arm
    assert (await client.get("/v1/experiments/exp", headers=bearer("two"))).status_code == 200
    refused = await client.get("/v1/experiments/exp", headers=bearer("one"))
    check_error(refused, 403, "model_not_allowed", type_="permission_error", param="model")


async def test_only_its_models_are_listed(connect: Connect, check_error: CheckError, tmp_path: Path) -> None:
    client = await connect(api_keys_file=write(tmp_path / "keys.yaml", a="key,models: [jina]", b="all"))

    async def listed(key: str) -> list[str]:
        return [card["id"] for card in (await client.get("/v1/models", headers=bearer(key))).json()["data"]]

    assert await listed("key") == ["jina"]
    assert await listed("all") == ["mini", "jina", "team/small"]
    assert (await client.get("/v1/models/jina", headers=bearer("key"))).status_code == 200
    check_error(
        await client.get("/v1/models/mini", headers=bearer("key")),
        403,
        "model_not_allowed",
        param="model",
        type_="permission_error",
    )


# ------------------------------------------------------------------------------------------------------------ quotas


async def test_requests_of_a_minute_are_used_up(connect: Connect, check_error: CheckError, tmp_path: Path) -> None:
    file = write(tmp_path / "keys.yaml", a="key,requests_per_minute: 2", b="other")
    client = await connect(api_keys_file=file)

    answers = [await embed(client, "key") for _ in range(2)]
    refused = await embed(client, "key")

    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0"]
    message = check_error(refused, 429, "rate_limit_exceeded", type_="rate_limit_error")
    assert message.startswith("rate limit reached for a (2 requests per minute); retry in ")
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert 50 < int(refused.headers["retry-after"]) <= 60
    other = await embed(client, "other")
    assert other.status_code == 200
    assert not [name for name in other.headers if name.startswith("x-ratelimit")]


async def test_bad_requests_count_as_well(connect: Connect, tmp_path: Path) -> None:
    client = await connect(api_keys_file=write(tmp_path / "keys.yaml", a="key,requests_per_minute: 1"))

    bad = await client.post("/v1/embeddings", content=b"{", headers=bearer("key"))

    assert (bad.status_code, bad.headers["x-ratelimit-remaining-requests"]) == (400, "0")
    assert (await embed(client, "key")).status_code == 429


async def test_tokens_of_a_minute_are_used_up(connect: Connect, check_error: CheckError, tmp_path: Path) -> None:
    client = await connect(api_keys_file=write(tmp_path / "keys.yaml", a="key,tokens_per_minute: 5"))

    answers = [await embed(client, "key", text="one two three") for _ in range(2)]

    assert [answer.json()["usage"]["total_tokens"] for answer in answers] == [3, 3]
    assert [answer.headers["x-ratelimit-remaining-tokens"] for answer in answers] == ["2", "0"]
    check_error(await embed(client, "key"), 429, "rate_limit_exceeded", type_="rate_limit_error")


async def test_addresses_have_quotas_where_there_are_no_keys(connect: Connect) -> None:
    client = await connect(requests_per_minute=1)

    assert [(await embed(client, "")).status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize(("trusted", "statuses"), [((), [200, 429]), ("127.0.0.0/8", [200, 200])])
def test_an_address_is_believed_from_a_trusted_proxy_alone(serve: Serve, trusted: object, statuses: list[int]) -> None:
    with serve(requests_per_minute=1, trusted_proxies=trusted) as (host, port):
        answers = [
            httpx.post(
                f"http://{host}:{port}/v1/embeddings",
                json={"input": "a", "model": "mini"},
                headers={"x-forwarded-for": f"10.0.0.{number}"},
            )
            for number in range(2)
        ]

    assert [answer.status_code for answer in answers] == statuses


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no socket for both versions of IP")
@pytest.mark.parametrize("trusted", ["127.0.0.0/8", "::1, 127.0.0.1"])
def test_a_proxy_is_trusted_by_its_ipv4_address_where_the_gateway_listens_on_ipv6_too(
    serve: Serve, trusted: object
) -> None:
    with serve(address="::", requests_per_minute=1, trusted_proxies=trusted) as (_host, port):
        answers = [
            httpx.post(
                f"http://127.0.0.1:{port}/v1/embeddings",
                json={"input": "a", "model": "mini"},
                headers={"x-forwarded-for": address},
            )
            for address in ("10.0.0.1", "10.0.0.2", "10.0.0.1")
        ]
        errors = httpx.get(f"http://127.0.0.1:{port}/v1/errors").json()["data"]
        httpx.get(f"http://127.0.0.1:{port}/nowhere")
        latest = httpx.get(f"http://127.0.0.1:{port}/v1/errors").json()["data"][0]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert (errors[0]["client"], latest["client"]) == ("10.0.0.1", "127.0.0.1")


async def test_requests_without_work_are_not_counted(connect: Connect) -> None:
    client = await connect(requests_per_minute=1)

    assert [(await client.get(path)).status_code for path in ("/v1/models", "/health", "/v1/spaces")] == [200] * 3
    assert (await embed(client, "")).status_code == 200


# ---------------------------------------------------------------------------------------------------------- exchange


async def test_keys_are_exchanged_under_load_without_a_refused_request(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old and new key at once, then the new one alone, as the guide says: no client is refused in between."""
    monkeypatch.setattr(keyring, "_CHECK_EVERY_S", 0.005)
    path = tmp_path / "keys.yaml"
    old, new = key_digest("old"), key_digest("new")
    path.write_text(f"version: 1\nkeys: [{{name: a, sha256: {old}}}]")
    client = await connect(api_keys_file=path)
    key, statuses, is_over = "old", [], False

    async def ask() -> None:
        while not is_over:
            statuses.append((await embed(client, key)).status_code)

    async def answered(number: int) -> None:
        wanted = len(statuses) + number
        async with asyncio.timeout(60):
            while len(statuses) < wanted:  # noqa: ASYNC110  eight tasks add to it
                await asyncio.sleep(0)

    clients = [asyncio.create_task(ask()) for _ in range(8)]
    for text in (f"[{old}, {new}]", f"[{old}, {new}] # a broken file: [", f"[{new}]"):
        await answered(20)
        if text.startswith(f"[{new}"):
            async with asyncio.timeout(30):
                while (await embed(client, "new")).status_code != 200:  # noqa: ASYNC110  nothing announces it
                    await asyncio.sleep(0.01)
            key = "new"
            await answered(20)  # those with the old key among the eight have ended
        replacement = path.with_suffix(".new")
        replacement.write_text(f"version: 1\nkeys: [{{name: a, sha256: {text}}}]")
        replacement.replace(path)
    await answered(20)
    async with asyncio.timeout(30):
        while (await embed(client, "old")).status_code != 401:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.01)
    is_over = True
    await asyncio.gather(*clients)

    assert set(statuses) == {200}


# ------------------------------------------------------------------------------------------------- the operator's own


@pytest.mark.parametrize(
    ("settings", "key", "status"),
    [
        ({}, None, 200),
        ({"api_keys": "client-key"}, None, 403),
        ({"api_keys": "client-key"}, "client-key", 403),
        ({"api_keys": "client-key", "admin_key": "operator-key"}, "client-key", 403),
        ({"api_keys": "client-key", "admin_key": "operator-key"}, "operator-key", 200),
        ({"api_keys": "client-key", "admin_key": "operator-key"}, None, 403),
        ({"admin_key": "operator-key"}, None, 200),  # set to be able to reload: Prometheus has no key
        ({"admin_key": "operator-key"}, "other-key", 200),
        ({"admin_key": "operator-key"}, "operator-key", 200),
        ({"admin_port": 9000}, None, 404),
        ({"admin_port": 9000, "api_keys": "client-key", "admin_key": "operator-key"}, "operator-key", 404),
    ],
)
async def test_metrics_are_the_operators_where_api_keys_are_set(
    connect: Connect, settings: dict[str, object], key: str | None, status: int
) -> None:
    client = await connect(**settings)

    assert (await client.get("/metrics", headers=bearer(key) if key else {})).status_code == status


async def test_other_pages_may_ask_only_if_they_are_named(connect: Connect) -> None:
    origin = {"origin": "https://app.example.com"}
    closed, opened = await connect(), await connect(cors_origins="https://app.example.com/", api_keys=["key"])

    assert "access-control-allow-origin" not in (await closed.get("/v1/models", headers=origin)).headers
    refused = await opened.get("/v1/models", headers=origin)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin["origin"])
    preflight = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert (await opened.options("/v1/embeddings", headers=preflight)).status_code == 200
    other = await opened.get("/v1/models", headers={"origin": "https://evil.example.com"})
    assert "access-control-allow-origin" not in other.headers
