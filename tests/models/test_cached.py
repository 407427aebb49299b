"""Responses of real engines with a cache: byte for byte those without one, in every dialect that returns vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from gateway.config.cache import CacheConfig
from tests.models.checkpoints import MAX_TOKENS, SENTENCES
from tests.models.in_process import Connect, connect_in_module, entry  # noqa: F401

# One gateway serves all tests: engines take longer to start than to answer.
pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = " ".join(SENTENCES * MAX_TOKENS)
TEXTS = [*SENTENCES[:3], LONG, "", SENTENCES[1]]  # one of them twice
SIZES = (64, 16)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(jina: Path, m3: Path, connect: Connect, tmp_path_factory: pytest.TempPathFactory) -> httpx.AsyncClient:
    """Return a client of a gateway that serves each model twice: as it is, and with a cache."""
    disk = str(tmp_path_factory.mktemp("cache"))
    jina_fields: dict[str, Any] = {"default_task": "text-matching", "dimensions": SIZES}
    m3_fields: dict[str, Any] = {"outputs": ("dense", "sparse", "multivector")}
    return await connect(
        entry("jina", jina, **jina_fields),
        entry("m3", m3, **m3_fields),
        entry("jina-cached", jina, cache=CacheConfig(), **jina_fields),
        entry("m3-cached", m3, cache=CacheConfig(disk=disk), **m3_fields),
        aliases={"default": ("jina-cached", None)},
    )


def plain(response: httpx.Response, name: str) -> bytes:
    """Return the body of a response without the name of its model."""
    assert response.status_code == 200, response.text
    return response.content.replace(json.dumps(name).encode(), b'"model"')


def rows_of(response: httpx.Response) -> list[object]:
    """Return the part of a response for each text."""
    body = response.json()
    if isinstance(body, list):  # TEI
        return body
    if "data" in body:
        return [{**row, "index": 0} for row in body["data"]]
    return list(body.get("embeddings") or [body["embedding"]])


OPENAI = "/v1/embeddings"
REQUESTS = {
    "openai float": (OPENAI, {}),
    "openai base64": (OPENAI, {"encoding_format": "base64"}),
    "openai binary": (OPENAI, {"encoding_format": "binary"}),
    "openai ubinary": (OPENAI, {"encoding_format": "ubinary"}),
    "openai raw": (OPENAI, {"normalized": False}),
    "openai start": (OPENAI, {"truncate": "START"}),
    "ollama": ("/api/embed", {}),
    "tei": ("/tei/{model}/embed", {}),
}
OF_JINA = {
    "matryoshka": (OPENAI, {"dimensions": 16}),
    "task": (OPENAI, {"task": "retrieval.query"}),
    "input type of cohere": (OPENAI, {"input_type": "search_document"}),
}
OF_M3 = {
    **{
        "+".join(outputs): (OPENAI, {"outputs": outputs})
        for outputs in (["sparse"], ["multivector"], ["dense", "sparse"], ["dense", "sparse", "multivector"])
    },
    "tei sparse": ("/tei/{model}/embed_sparse", {}),
}


@pytest.mark.parametrize(
    ("model", "name"),
    [*(("jina", name) for name in (*REQUESTS, *OF_JINA)), *(("m3", name) for name in (*REQUESTS, *OF_M3))],
)
async def test_a_response_is_that_without_a_cache(client: httpx.AsyncClient, model: str, name: str) -> None:
    """Texts are computed one by one, since a batch of others changes the last bits of a vector."""
    path, fields = {**REQUESTS, **OF_JINA, **OF_M3}[name]

    async def ask(model: str, texts: object) -> httpx.Response:
        body = {"model": model, "inputs" if "tei" in path else "input": texts, **fields}
        response = await client.post(path.format(model=model), json=body)
        assert response.status_code == 200, response.text
        return response

    cached, texts = f"{model}-cached", [f"{text} {name}" for text in TEXTS]
    expected = [await ask(model, text) for text in texts]
    for num_hits in (0, 1):
        responses = [await ask(cached, text) for text in texts[:-1]]
        if path == OPENAI:
            assert [plain(response, cached) for response in responses] == [plain(one, model) for one in expected[:-1]]
        assert list(map(rows_of, responses)) == list(map(rows_of, expected[:-1]))
        assert [response.headers["x-gateway-cache"] for response in responses] == [f"{num_hits}/1"] * (len(texts) - 1)
    together, found = await ask(model, texts), await ask(cached, texts)
    assert rows_of(found) == [row for one in expected for row in rows_of(one)]
    assert found.headers["x-gateway-cache"] == "6/6"  # the last text is the second one again
    for header in ("x-gateway-truncated", "x-gateway-task", "x-compute-tokens"):
        assert found.headers.get(header) == together.headers.get(header)
    if path == OPENAI:
        assert found.json()["usage"] == together.json()["usage"]


async def test_scores_by_vectors_are_those_without_a_cache(client: httpx.AsyncClient) -> None:
    """The query is known; the documents are scored as they are computed, and not kept."""
    body = {"query": f"{SENTENCES[0]}?", "documents": SENTENCES[:1]}
    expected = await client.post("/v1/rerank", json={"model": "m3", **body})
    for _ in range(2):
        response = await client.post("/v1/rerank", json={"model": "m3-cached", **body})
        assert response.json()["results"] == expected.json()["results"]
        assert response.json()["usage"] == expected.json()["usage"]


async def test_token_states_are_computed_each_time(client: httpx.AsyncClient) -> None:
    for _ in range(2):
        responses = [
            await client.post(f"/tei/{name}/embed_all", json={"inputs": SENTENCES[0]}) for name in ("m3", "m3-cached")
        ]
        assert responses[0].content == responses[1].content
        assert "x-gateway-cache" not in responses[1].headers


async def test_a_text_that_is_too_long_is_refused_by_its_place(client: httpx.AsyncClient) -> None:
    await client.post("/v1/embeddings", json={"model": "jina-cached", "input": [SENTENCES[0], LONG]})
    body = {"input": [SENTENCES[0], SENTENCES[1], LONG], "truncate": False}
    responses = [await client.post("/v1/embeddings", json={"model": name, **body}) for name in ("jina", "jina-cached")]
    assert [response.status_code for response in responses] == [400, 400]
    assert responses[0].json() == responses[1].json()
    assert "input[2]" in responses[1].json()["error"]["message"]


async def test_late_chunks_are_computed_each_time(client: httpx.AsyncClient) -> None:
    body = {"input": SENTENCES[:3], "late_chunking": True}
    expected = await client.post("/v1/embeddings", json={"model": "jina", **body})
    for _ in range(2):
        response = await client.post("/v1/embeddings", json={"model": "jina-cached", **body})
        assert plain(response, "jina-cached") == plain(expected, "jina")
        assert "x-gateway-cache" not in response.headers


async def test_some_of_the_texts_are_known(client: httpx.AsyncClient) -> None:
    await client.post("/v1/embeddings", json={"model": "m3-cached", "input": ["known already"], "outputs": ["sparse"]})
    response = await client.post("/v1/embeddings", json={"model": "m3-cached", "input": ["known already", "not yet"]})
    assert response.headers["x-gateway-cache"] == "1/2"
    assert response.json()["usage"]["prompt_tokens"] > 0


async def test_the_card_and_the_live_figures_show_the_cache(client: httpx.AsyncClient) -> None:
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    assert {name: card["cache"] for name, card in cards.items()} == {
        "jina": False,
        "m3": False,
        "jina-cached": True,
        "m3-cached": True,
    }
    rates = {model["id"]: model["cache_hit_rate"] for model in (await client.get("/v1/live")).json()["data"]}
    assert rates["jina"] is None
    assert 0 < rates["jina-cached"] < 1
