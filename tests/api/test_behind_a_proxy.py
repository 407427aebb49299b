"""HEAD requests and path prefixes, as balancers, probes and proxies send them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import httpx
import pytest

from gateway.config.settings import load_settings
from gateway.errors import ConfigError
from gateway.telemetry import metrics

Connect = Callable[..., Awaitable[httpx.AsyncClient]]

KEY = "sk-of-the-tests"
READ = [
    "/health",
    "/health/live",
    "/health/ready",
    "/health/startup",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/v1/models",
    "/models",
    "/v1/models/mini",
    "/v1/spaces",
    "/info",
    "/tei/mini/info",
    "/tei/mini/health",
    "/api/tags",
    "/static-offline-docs/swagger-ui.css",
]


@pytest.mark.parametrize("path", READ)
async def test_head_is_get_without_the_body(client: httpx.AsyncClient, path: str) -> None:
    read, head = await client.get(path), await client.head(path)

    assert (head.status_code, head.content) == (read.status_code, b"")
    assert read.status_code == 200
    assert head.headers.get("content-type") == read.headers.get("content-type")
    if path != "/metrics":
        assert head.headers["content-length"] == read.headers["content-length"]


async def test_head_has_the_headers_of_get(connect: Connect) -> None:
    loading = await connect(has_started=False)

    assert (await loading.head("/health/ready")).status_code == 503
    assert (await loading.head("/v1/nothing")).status_code == 404
    assert (await loading.head("/v1/models/nothing")).status_code == 404
    refused = await loading.head("/v1/embeddings")
    assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "POST", b"")


async def test_head_counts_for_the_path_that_was_asked(client: httpx.AsyncClient) -> None:
    def count() -> float:
        labels = {"path": "/v1/models", "status": "200"}
        return metrics.REGISTRY.get_sample_value("gateway_requests_total", labels) or 0

    before = count()
    await client.head("/v1/models")

    assert count() == before + 1


PREFIXED = [({"root_path": "/ai/embed"}, {}), ({}, {"x-forwarded-prefix": "/ai/embed"})]


@pytest.mark.parametrize(("settings", "headers"), PREFIXED, ids=["setting", "header"])
@pytest.mark.parametrize("prefix", ["", "/ai/embed"], ids=["taken off", "left on"])
async def test_a_prefix_is_not_part_of_the_path(
    connect: Connect, settings: dict[str, str], headers: dict[str, str], prefix: str
) -> None:
    client = await connect(**settings, api_keys=KEY)
    client.headers.update(headers)
    key = {"authorization": f"Bearer {KEY}"}

    assert (await client.get(f"{prefix}/health/ready")).status_code == 200
    assert (await client.post(f"{prefix}/v1/embeddings", json={"input": "a"})).status_code == 401
    embedded = await client.post(f"{prefix}//v1/embeddings/", json={"input": "a"}, headers=key)
    assert (embedded.status_code, embedded.json()["model"]) == (200, "mini")
    assert len((await client.post(f"{prefix}/tei/mini/embed", json={"inputs": "a"}, headers=key)).json()) == 1
    assert (await client.post(prefix or "/", json={"inputs": "a"}, headers=key)).status_code == 200
    tei_error = await client.post(f"{prefix}/embed", json={}, headers=key)
    assert (tei_error.status_code, tei_error.json()["error_type"]) == (422, "Validation")
    wrong = await client.post(f"{prefix}/v1/embedding", json={}, headers=key)
    assert wrong.json()["message"] == "no such path: /v1/embedding; did you mean /v1/embeddings?"


@pytest.mark.parametrize(("settings", "headers"), PREFIXED, ids=["setting", "header"])
async def test_the_documentation_s_links_have_the_prefix(
    connect: Connect, settings: dict[str, str], headers: dict[str, str]
) -> None:
    client = await connect(**settings)

    document = await client.get("/openapi.json", headers=headers)
    page = await client.get("/docs", headers=headers)

    assert document.json()["servers"] == [{"url": "/ai/embed"}]
    assert "/ai/embed/openapi.json" in page.text
    assert 'src="/ai/embed/static-offline-docs/swagger-ui-bundle.js"' in page.text
    assert (await client.get("/ai/embed/static-offline-docs/swagger-ui.css", headers=headers)).status_code == 200


async def test_without_a_prefix_paths_have_none(client: httpx.AsyncClient) -> None:
    await client.get("/openapi.json", headers={"x-forwarded-prefix": "/elsewhere"})  # leaves nothing behind

    assert "servers" not in (await client.get("/openapi.json")).json()


@pytest.mark.parametrize(
    "prefix", ["nothing", "//", "/a//b", "/<script>", '/"', "/a b", "/" + "a" * 300, "/../a?", "/a/../b", "/a/.", ""]
)
async def test_a_prefix_that_is_not_a_path_is_ignored(client: httpx.AsyncClient, prefix: str) -> None:
    response = await client.get("/openapi.json", headers={"x-forwarded-prefix": prefix})

    assert response.status_code == 200
    assert "servers" not in response.json()


async def test_the_setting_counts_before_the_header(connect: Connect) -> None:
    client = await connect(root_path="/ours/")

    document = await client.get("/openapi.json", headers={"x-forwarded-prefix": "/theirs"})

    assert document.json()["servers"] == [{"url": "/ours"}]


async def test_a_longer_first_part_is_not_the_prefix(connect: Connect) -> None:
    client = await connect(root_path="/v1/emb")

    assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 200


@pytest.mark.parametrize("value", ["ai", "/a b", "/a?b", "http://host/ai"])
def test_an_invalid_root_path_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="GATEWAY_ROOT_PATH: must be a path such as"):
        load_settings({"GATEWAY_ROOT_PATH": value})


def test_idle_connections_outlive_those_of_balancers_by_default() -> None:
    assert load_settings({}).keep_alive_s > 60
    assert load_settings({"GATEWAY_KEEP_ALIVE_S": "2.5"}).keep_alive_s == 2.5
