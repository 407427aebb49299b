"""Embedding requests in Ollama's and Azure's formats, and the list of models as Infinity's clients read it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

import httpx
import numpy as np
import pytest

from gateway.fleet import Model
from gateway.types import ModelState

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
MakeModel = Callable[..., Model]

LONG = "a b c d e f g h i j"  # ten words; the models take eight


# ----------------------------------------------------------------------------------------------------------- Ollama


@pytest.mark.parametrize("text", ["one text", ["one text", ""]])
@pytest.mark.parametrize("model", ["team/small", "team/small:latest"])
async def test_ollama_embeds(client: httpx.AsyncClient, text: str | list[str], model: str) -> None:
    body = {"model": model, "input": text, "options": {"num_ctx": 9}, "keep_alive": "5m"}

    response = await client.post("/api/embed", json=body)

    answer = response.json()
    assert set(answer) == {"model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"}
    assert answer["model"] == model
    assert np.shape(answer["embeddings"]) == (1 if isinstance(text, str) else 2, 10)
    np.testing.assert_allclose(np.linalg.norm(answer["embeddings"], axis=1), 1, rtol=1e-5)
    assert answer["prompt_eval_count"] == 2
    assert answer["total_duration"] > 1000  # nanoseconds
    assert response.headers["x-gateway-space"]


async def test_ollama_dimensions_and_truncation(client: httpx.AsyncClient) -> None:
    cut = await client.post("/api/embed", json={"model": "jina", "input": LONG, "dimensions": 8})
    refused = await client.post("/api/embed", json={"model": "jina", "input": LONG, "truncate": False})

    assert np.shape(cut.json()["embeddings"]) == (1, 8)
    assert cut.headers["x-gateway-truncated"] == "0"
    assert refused.status_code == 400
    assert "8 tokens" in refused.json()["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "mini"}, 400),
        ({"model": "mini", "input": []}, 400),
        ({"model": "mini", "input": ["a"] * 3}, 400),
        ({"model": "mini", "input": [[1]]}, 400),
        ({"model": "nothing", "input": "a"}, 404),
    ],
    ids=str,
)
async def test_ollama_errors_are_a_string(connect: Connect, body: dict, status: int) -> None:
    client = await connect(max_inputs=2)

    response = await client.post("/api/embed", json=body)

    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert isinstance(response.json()["error"], str)


async def test_ollama_lists_the_names_that_clients_may_use(connect: Connect, make_model: MakeModel) -> None:
    client = await connect(
        make_model("up"), make_model("down", state=ModelState.LOADING), aliases={"default": "up", "late": "down"}
    )

    models = (await client.get("/api/tags")).json()["models"]

    assert [model["name"] for model in models] == ["up", "default"]
    assert models[0]["model"] == "up"
    assert datetime.fromisoformat(models[0]["modified_at"])
    assert isinstance(models[0]["size"], int)


# ------------------------------------------------------------------------------------------------------------ Azure


@pytest.mark.parametrize("name", ["team/small", "team%2Fsmall"])
async def test_azure_s_deployment_is_the_model(client: httpx.AsyncClient, name: str) -> None:
    response = await client.post(
        f"/openai/deployments/{name}/embeddings?api-version=2024-02-01", json={"input": "a", "model": "made-up"}
    )

    assert response.status_code == 200
    assert response.json()["model"] == "team/small"


async def test_azure_s_header_is_a_key(connect: Connect, check_error: CheckError) -> None:
    client = await connect(api_keys=["sk-one"])
    path, body = "/openai/deployments/mini/embeddings", {"input": "a"}

    assert (await client.post(path, json=body, headers={"api-key": "sk-one"})).status_code == 200
    both = {"authorization": "Bearer ", "api-key": "sk-one"}
    assert (await client.post(path, json=body, headers=both)).status_code == 200
    for wrong in ({"api-key": "sk-two"}, {"api-key": ""}, {"authorization": "Bearer sk-two", "api-key": "sk-one"}):
        refused = await client.post(path, json=body, headers=wrong)
        check_error(refused, 401, "invalid_api_key", type_="authentication_error")


async def test_azure_s_newer_path(client: httpx.AsyncClient) -> None:
    response = await client.post("/openai/v1/embeddings", json={"input": "a", "model": "mini"})

    assert response.json()["model"] == "mini"


# --------------------------------------------------------------------------------------------------------- Infinity


async def test_cards_have_the_fields_that_infinitys_clients_need(client: httpx.AsyncClient) -> None:
    cards = (await client.get("/models")).json()["data"]

    assert {"mini", "jina"} <= {card["id"] for card in cards}
    for card in cards:
        assert card["stats"] == {}
        assert card["owned_by"] == "infinity"
        assert card["object"] == "model"


@pytest.mark.parametrize("path", ["/api/pull", "/api/embeddings", "/api/show"])
async def test_ollamas_other_paths_are_refused_in_ollamas_form(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"model": "mini"})

    assert response.status_code == 404
    assert response.json()["error"].startswith(f"no such path: {path}; ")
