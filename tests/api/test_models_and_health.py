"""The gateway's information about itself: its models, its health, its metrics, its documentation."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.fleet import Model
from gateway.types import ModelState, Output

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
MakeModel = Callable[..., Model]

STATES = [
    pytest.param(ModelState.DISABLED, "no accelerator is present", id="disabled"),
    pytest.param(ModelState.LOADING, "", id="loading"),
    pytest.param(ModelState.FAILED, "failed to load: no weights", id="failed"),
    pytest.param(ModelState.STOPPED, "the gateway is shutting down", id="stopped"),
]


# ----------------------------------------------------------------------------------------------------------- models


async def test_models_are_listed_in_the_order_of_the_registry(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()

    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["mini", "jina", "team/small"]


async def test_models_that_are_ready_are_listed_first(connect: Connect, make_model: MakeModel) -> None:
    """Clients that fill a menu from the list may show only its first entries."""
    off, late = make_model("off", state=ModelState.DISABLED), make_model("late", state=ModelState.LOADING)
    client = await connect(off, make_model("a"), late, make_model("b"), aliases={})

    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["a", "b", "off", "late"]


async def test_a_card_has_the_facts_that_a_client_needs_to_choose(client: httpx.AsyncClient) -> None:
    card = (await client.get("/v1/models/jina")).json()

    spaces = card.pop("spaces")
    assert card == {
        "id": "jina",
        "object": "model",
        "kind": "embed",
        "created": 1,
        "owned_by": "infinity",
        "stats": {},
        "source": "jinaai/jina-v3",
        "revision": "0" * 40,
        "license": None,
        "state": "ready",
        "reason": None,
        "aliases": ["jina-query"],
        "width": 32,
        "dimensions": [32, 16, 8],
        "max_tokens": 8,
        "max_model_len": 8,
        "tasks": ["retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"],
        "default_task": "text-matching",
        "outputs": ["dense"],
        "rerank": {},
        "normalized": True,
        "labels": [],
        "label_function": None,
        "space": spaces["text-matching"],
        "device": "cpu",
        "dtype": "float32",
        "notes": [],
        "replicas": [],
        "cache": False,
    }
    assert list(spaces) == card["tasks"]
    assert spaces["retrieval.query"] == spaces["retrieval.passage"]
    assert len(set(spaces.values())) == 4


async def test_a_card_of_a_model_has_the_remarks_about_its_devices(connect: Connect, make_model: MakeModel) -> None:
    notes = ("cuda:1 (NVIDIA GeForce GT 1030) is left out: torch for CUDA 13.0 has no kernels for it",)
    client = await connect(make_model("m3", device="cuda:0", notes=notes), aliases={})

    card = (await client.get("/v1/models/m3")).json()

    assert (card["device"], card["notes"]) == ("cuda:0", list(notes))


async def test_a_model_without_tasks_has_one_space(client: httpx.AsyncClient) -> None:
    card = (await client.get("/v1/models/mini")).json()
    answer = await client.post("/v1/embeddings", json={"input": "a", "model": "mini"})

    assert (card["tasks"], card["default_task"], card["spaces"]) == ([], None, {})
    assert card["space"] == answer.headers["x-gateway-space"]


async def test_the_list_holds_the_same_cards(client: httpx.AsyncClient) -> None:
    cards = (await client.get("/v1/models")).json()["data"]

    assert cards == [(await client.get(f"/v1/models/{card['id']}")).json() for card in cards]


async def test_outputs_are_shown(connect: Connect, make_model: MakeModel) -> None:
    client = await connect(make_model("m3", outputs=(Output.DENSE, Output.SPARSE)), aliases={})

    assert (await client.get("/v1/models/m3")).json()["outputs"] == ["dense", "sparse"]


@pytest.mark.parametrize("prefix", ["/v1/models", "/models", "/v1//models/"])
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("mini", "mini"),
        ("team/small", "team/small"),
        ("team%2Fsmall", "team/small"),
        ("team%2fsmall/", "team/small"),
        ("jina-query", "jina"),
        ("default", "mini"),
        ("owner/mini", "mini"),
        ("jinaai%2Fjina-v3", "jina"),
        ("jina:query", "jina"),
        ("jina%3Aretrieval.passage", "jina"),
    ],
)
async def test_a_model_is_found_by_every_name_that_embeds(
    client: httpx.AsyncClient, prefix: str, name: str, model: str
) -> None:
    response = await client.get(f"{prefix}/{name}")

    assert response.status_code == 200
    assert response.json()["id"] == model


@pytest.mark.parametrize("name", ["jina", "jina-query", "jina:query", "jina:search_document", "mini", "mini:query"])
async def test_the_space_of_a_card_is_the_one_that_the_name_embeds_into(client: httpx.AsyncClient, name: str) -> None:
    card = (await client.get(f"/v1/models/{name}")).json()
    answer = await client.post("/v1/embeddings", json={"input": "a", "model": name})

    assert card["space"] == answer.headers["x-gateway-space"]
    assert card["default_task"] == answer.headers.get("x-gateway-task")


@pytest.mark.parametrize("name", ["maxi", "team", "MINI", "small", "jina-query/x", "%00", "%F0%9F%91%8D"])
async def test_an_unknown_model_gets_all_names(client: httpx.AsyncClient, check_error: CheckError, name: str) -> None:
    message = check_error(await client.get(f"/v1/models/{name}"), 404, "model_not_found", param="model")

    assert message.startswith("no model is called ")
    assert message.endswith("; available: mini, jina, team/small, default, jina-query")


async def test_a_task_that_a_model_does_not_have_is_refused(client: httpx.AsyncClient, check_error: CheckError) -> None:
    message = check_error(await client.get("/v1/models/jina:image"), 400, "invalid_input", param="task")

    assert message.startswith("unknown task 'image' for model 'jina'")


# ----------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize(("state", "reason"), STATES)
async def test_a_model_that_is_not_ready_is_shown_with_its_reason(
    connect: Connect, make_model: MakeModel, state: ModelState, reason: str
) -> None:
    client = await connect(make_model("late", state=state, reason=reason), make_model("mini"), aliases={})

    card = (await client.get("/v1/models/late")).json()

    assert (card["state"], card["reason"], card["created"]) == (state.value, reason or None, 0)
    assert (card["width"], card["space"], card["dimensions"], card["spaces"]) == (None, None, [], {})
    assert [card["state"] for card in (await client.get("/v1/models")).json()["data"]] == ["ready", state.value]
    assert (await client.get("/health/ready")).json()["models"] == [
        {"id": "late", "state": state.value, "reason": reason or None},
        {"id": "mini", "state": "ready", "reason": None},
    ]


async def test_a_loading_model_asks_to_come_back(
    connect: Connect, make_model: MakeModel, check_error: CheckError
) -> None:
    client = await connect(make_model("late", state=ModelState.LOADING), aliases={"default": "late"})

    response = await client.post("/v1/embeddings", json={"input": "a"})

    message = check_error(response, 503, "model_not_ready", type_="server_error")
    assert message == "model 'late' is still loading"
    assert 1 <= int(response.headers["retry-after"]) <= 120
    assert "x-should-retry" not in response.headers


async def test_a_failed_model_asks_not_to_come_back(
    connect: Connect, make_model: MakeModel, check_error: CheckError
) -> None:
    late = make_model("late", state=ModelState.FAILED, reason="failed to load: no weights")
    client = await connect(late, make_model("mini"), aliases={"default": "late"})

    response = await client.post("/v1/embeddings", json={"input": "a"})

    message = check_error(response, 503, "model_unavailable", type_="server_error")
    assert message == "model 'late' failed to load: no weights"
    assert response.headers["x-should-retry"] == "false"


async def test_a_stopped_model_asks_to_come_back(
    connect: Connect, make_model: MakeModel, check_error: CheckError
) -> None:
    late = make_model("late", state=ModelState.STOPPED, reason="the gateway is shutting down")
    client = await connect(late, aliases={"default": "late"})

    response = await client.post("/v1/embeddings", json={"input": "a"})

    message = check_error(response, 503, "model_unavailable", type_="server_error")
    assert message == "model 'late' is stopped: the gateway is shutting down"
    assert 1 <= int(response.headers["retry-after"]) <= 120


async def test_a_disabled_model_is_not_there_and_says_why(
    connect: Connect, make_model: MakeModel, check_error: CheckError
) -> None:
    late = make_model("late", state=ModelState.DISABLED, reason="no accelerator is present")
    client = await connect(late, aliases={"default": "late"})

    response = await client.post("/v1/embeddings", json={"input": "a"})

    message = check_error(response, 404, "model_disabled", param="model")
    assert message == "model 'late' is disabled: no accelerator is present"


# ----------------------------------------------------------------------------------------------------------- health


async def test_a_living_process_reports_that_it_lives(connect: Connect, make_model: MakeModel) -> None:
    client = await connect(make_model(state=ModelState.LOADING), has_started=False, aliases={})

    response = await client.get("/health/live")

    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/health/", "/health//ready/"])
@pytest.mark.parametrize(
    ("states", "has_started", "is_ready"),
    [
        pytest.param([ModelState.READY], True, True, id="ready"),
        pytest.param([ModelState.READY, ModelState.LOADING], False, False, id="one is still loading"),
        pytest.param([ModelState.READY, ModelState.FAILED], True, True, id="one has failed"),
        pytest.param([ModelState.READY, ModelState.DISABLED], True, True, id="one is disabled"),
        pytest.param([ModelState.FAILED], True, False, id="all have failed"),
        pytest.param([ModelState.DISABLED], True, False, id="all are disabled"),
        pytest.param([ModelState.STOPPED], True, False, id="stopped"),
    ],
)
async def test_traffic_is_taken_when_loading_has_ended_and_a_model_answers(
    connect: Connect, make_model: MakeModel, path: str, states: list[ModelState], has_started: bool, is_ready: bool
) -> None:
    models = [make_model(f"m{i}", state=state) for i, state in enumerate(states)]
    client = await connect(*models, has_started=has_started, aliases={})

    response = await client.get(path)

    assert response.status_code == (200 if is_ready else 503)
    assert response.json()["status"] == ("ready" if is_ready else "not_ready")
    assert ("retry-after" in response.headers) is not is_ready


# ---------------------------------------------------------------------------------------------------------- metrics


async def samples_of(client: httpx.AsyncClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_requests_texts_and_tokens_are_counted(client: httpx.AsyncClient) -> None:
    before = await samples_of(client)

    await client.post("/v1/embeddings", json={"input": ["a b", "one two three four five six seven eight nine"]})
    await client.post("/v1/embeddings", json={"input": []})

    after = await samples_of(client)
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert grown["gateway_requests_total", (("path", "/v1/embeddings"), ("status", "200"))] == 1
    assert grown["gateway_requests_total", (("path", "/v1/embeddings"), ("status", "400"))] == 1
    assert grown["gateway_request_duration_seconds_count", (("path", "/v1/embeddings"),)] == 2
    errors = {labels: num for (name, labels), num in grown.items() if name == "gateway_errors_total" and num}
    assert errors == {(("code", "invalid_input"),): 1}
    labels = {"arm": "", "experiment": "", "model": "mini", "task": ""}

    def of_mini(name: str, **more: str) -> float:
        return grown[name, tuple(sorted((labels | more).items()))]

    assert of_mini("gateway_embed_requests_total", outcome="ok") == 1
    assert of_mini("gateway_embed_duration_seconds_count") == 1
    assert of_mini("gateway_texts_total") == 2
    assert of_mini("gateway_tokens_total") == 2 + 8
    assert of_mini("gateway_truncated_texts_total") == 1
    for stage in ("tokenize", "queue", "inference"):
        assert of_mini("gateway_stage_duration_seconds_count", stage=stage) == 1


async def test_invented_names_of_clients_are_not_labels(client: httpx.AsyncClient) -> None:
    """Each value of a label is kept forever."""
    for path in ("/made-up", "/v1/made-up", "/v1/models/made-up", "/health/made-up", "/static-offline-docs/made-up"):
        await client.get(path)
        await client.request("MADEUP", path)
    await client.request("MADEUP", "/v1/embeddings")
    for field in ("model", "task", "user", "encoding_format"):
        await client.post("/v1/embeddings", json={"input": "a", field: "made-up"})
    await client.get("/v1/models", headers={"x-request-id": "made-up", "authorization": "Bearer made-up"})

    text = (await client.get("/metrics")).text

    assert "made-up" not in text
    assert "MADEUP" not in text
    assert 'path="other",status="404"' in text


async def test_no_requests_are_in_flight_after_all_were_answered(client: httpx.AsyncClient) -> None:
    await client.post("/v1/embeddings", json={"input": 1})

    samples = await samples_of(client)

    assert samples["gateway_requests_in_flight", ()] == 1  # the one that asks


# ---------------------------------------------------------------------------------------------------- documentation


async def test_the_documentation_needs_no_other_server(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")

    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert re.findall(r"(?:https?:)?//[^\s\"'<>]+", page.text) == []
    assets = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
    assert len(assets) >= 3
    for asset in assets:
        response = await client.get(asset)
        assert response.status_code == 200
        assert len(response.content) > 100


async def test_the_documentation_reads_the_schema_of_this_server(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text

    assert "url: '/openapi.json'" in page


async def test_the_schema_shows_each_path_once(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()

    assert schema["openapi"].startswith("3.1")
    assert [path for path in schema["paths"] if not path.startswith(("/tei/", "/api/", "/openai/"))] == [
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/v1/classify",
        "/v1/tokenize",
        "/v1/spaces",
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/cancel",
        "/v1/experiments/{experiment_id}/assignment",
        "/v1/experiments/{experiment_id}/preview",
        "/v1/experiments/{experiment_id}/outcomes",
        "/v1/experiments",
        "/v1/experiments/{experiment_id}/units",
        "/v1/experiments/{experiment_id}",
        "/v1/live",
        "/v1/shadows",
        "/v1/errors",
        "/health/live",
        "/health/ready",
        "/health",
        "/health/startup",
        "/metrics",
        "/metrics/replicas",
        "/admin/reload",
        "/admin/errors",
        "/admin/cards",
        "/admin/models/{model}/verify",
        "/admin/models/{model}/load",
        "/admin/models/{model}/unload",
        "/admin/experiments/{experiment_id}/weights",
        "/admin/experiments/{experiment_id}/end",
        "/admin/experiments/{experiment_id}/count-again",
        "/admin/comparisons",
        "/admin/comparisons/{name}",
        "/admin/comparisons/{name}/stop",
        "/admin/comparisons/{name}/answer",
        "/admin/comparisons/{name}/events",
        "/admin/data-sets",
        "/admin/data-sets/{name}",
        "/admin/duels",
        "/admin/duels/{comparison}/{duel}",
        "/admin/duels/{comparison}/{duel}/votes",
        "/admin/duels/{comparison}/{duel}/undo",
        "/admin/duels/{comparison}/{duel}/end",
        "/admin/duels/{comparison}/{duel}/qrels",
        "/admin/comparisons/{name}/grading",
        "/admin/comparisons/{name}/grades",
        "/admin/comparisons/{name}/grades/undo",
        "/admin/comparisons/{name}/verdict",
    ]
    ids = [operation["operationId"] for path in schema["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)


async def test_every_reference_in_the_schema_leads_somewhere(client: httpx.AsyncClient) -> None:
    response = await client.get("/openapi.json")

    names = set(re.findall(r'"\$ref":"#/components/schemas/(\w+)"', response.text.replace(" ", "")))
    assert names
    assert names <= set(response.json()["components"]["schemas"])
