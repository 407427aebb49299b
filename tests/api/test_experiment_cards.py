"""An experiment under ``/v1/models`` and on the paths of other servers: its card has its kind, and does not name a "
"single space."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from gateway.config.registry import Experiment
from gateway.fleet import Model
from gateway.types import ModelKind, ModelState

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
MakeModel = Callable[..., Model]
CheckError = Callable[..., str]
ARMS = ({"name": "a", "model": "mini", "weight": 3}, {"name": "b", "model": "jina", "weight": 1})


def experiment(kind: str = "cross_space", arms: tuple[dict[str, Any], ...] = ARMS) -> Experiment:
    unit = ("header:x-unit",) if kind == "cross_space" else ()
    return Experiment.model_validate({"id": "exp", "kind": kind, "unit": unit, "arms": copy.deepcopy(arms)})


async def card_of(client: httpx.AsyncClient, name: str = "exp") -> dict[str, Any]:
    answer = await client.get(f"/v1/models/{name}")
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("path", ["/v1/models/exp", "/models/exp", "/v1/models"])
async def test_an_experiment_between_spaces_has_none_and_lists_its_arms(connect: Connect, path: str) -> None:
    client = await connect(experiments=[experiment()])
    mini, jina = await card_of(client, "mini"), await card_of(client, "jina")
    body = (await client.get(path)).json()

    card = body if "data" not in body else next(card for card in body["data"] if card["id"] == "exp")

    assert card == {
        "id": "exp",
        "object": "model",
        "kind": "experiment",
        "experiment": "cross_space",
        "arms": [
            {
                "arm": "a",
                "model": "mini",
                "task": None,
                "weight": 3.0,
                "state": "ready",
                "width": 8,
                "max_tokens": 8,
                "space": mini["space"],
            },
            {
                "arm": "b",
                "model": "jina",
                "task": "text-matching",
                "weight": 1.0,
                "state": "ready",
                "width": 32,
                "max_tokens": 8,
                "space": jina["space"],
            },
        ],
        "created": 1,
        "owned_by": "gateway",
        "stats": {},
        "source": None,
        "revision": None,
        "state": "ready",
        "reason": None,
        "aliases": [],
        "width": None,
        "dimensions": [],
        "max_tokens": 8,
        "max_model_len": 8,
        "tasks": [],
        "default_task": None,
        "outputs": ["dense"],
        "rerank": {},
        "labels": [],
        "label_function": None,
        "normalized": True,
        "space": None,
        "spaces": {},
        "device": "cpu",
        "dtype": "float32",
        "notes": [],
        "replicas": [],
        "cache": False,
        "license": None,
    }


async def test_a_card_describes_the_vectors_of_each_arm(connect: Connect) -> None:
    client = await connect(experiments=[experiment()])

    for name in ("exp", "exp:query"):
        spaces = {arm["arm"]: arm["space"] for arm in (await card_of(client, name))["arms"]}
        for number in range(20):
            answer = await client.post(
                "/v1/embeddings", json={"model": name, "input": "a"}, headers={"x-unit": f"{number}"}
            )
            assert answer.headers["x-gateway-space"] == spaces[answer.headers["x-gateway-arm"]]


async def test_a_task_that_an_arm_does_not_have_is_refused(connect: Connect, check_error: CheckError) -> None:
    client = await connect(experiments=[experiment()])

    message = check_error(await client.get("/v1/models/exp:image"), 400, "invalid_input", param="task")

    assert message.startswith("unknown task 'image' for model 'mini'")


async def test_equal_sizes_do_not_make_two_spaces_one(connect: Connect, make_model: MakeModel) -> None:
    """Jina v3 and BGE-M3 have the same width, so no vector store would notice a mix-up."""
    client = await connect(make_model("mini"), make_model("jina"), experiments=[experiment()], aliases={})

    card = await card_of(client)

    assert (card["width"], card["dimensions"], card["space"]) == (8, [8], None)
    assert len({arm["space"] for arm in card["arms"]}) == 2


async def test_an_experiment_within_one_space_names_it(connect: Connect, make_model: MakeModel) -> None:
    twin = {"fingerprint": "f" * 64, "tasks": {"retrieval.query": "q: "}, "default_task": "retrieval.query"}
    models = [make_model("mini", **twin, device="cuda:0"), make_model("jina", **twin)]
    client = await connect(*models, experiments=[experiment("same_space")], aliases={})
    answer = await client.post("/v1/embeddings", json={"model": "exp", "input": "a"})

    card = await card_of(client)

    assert card["space"].rpartition("@")[2] == answer.headers["x-gateway-space"].rpartition("@")[2]
    assert (card["kind"], card["experiment"], card["width"]) == ("experiment", "same_space", 8)
    assert (card["tasks"], card["default_task"]) == (["retrieval.query"], "retrieval.query")
    assert card["spaces"] == {"retrieval.query": card["space"]}
    assert card["device"] is None


@pytest.mark.parametrize("late", [0, 1])
async def test_a_field_that_is_unknown_for_an_arm_is_null(connect: Connect, make_model: MakeModel, late: int) -> None:
    models = [make_model(name) for name in ("mini", "jina")]
    models[late] = make_model(models[late].id, state=ModelState.FAILED, reason="failed to load: no weights")
    client = await connect(*models, experiments=[experiment()], aliases={})

    card = await card_of(client)

    assert (card["state"], card["created"]) == ("failed", 0)
    assert card["reason"] == f"arm {'ab'[late]!r} is failed: failed to load: no weights"
    assert (card["width"], card["max_tokens"], card["dimensions"]) == (None, None, [])
    assert [arm["space"] is None for arm in card["arms"]] == [late == 0, late == 1]


async def test_an_experiment_of_rerankers_has_no_vectors(connect: Connect, make_model: MakeModel) -> None:
    models = [make_model(name, kind=ModelKind.RERANK, width=1) for name in ("mini", "jina")]
    client = await connect(*models, experiments=[experiment()], aliases={})

    card = await card_of(client)

    assert (card["width"], card["dimensions"], card["space"], card["max_tokens"]) == (None, [], None, 256)
    assert card["max_model_len"] == 256
    assert [(arm["width"], arm["space"]) for arm in card["arms"]] == [(None, None)] * 2


# ----------------------------------------------------------------------------------------------- the paths of other servers


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/tei/exp/info", None),
        ("POST", "/tei/exp/tokenize", {"inputs": "a"}),
        ("POST", "/tei/exp/decode", {"ids": [0]}),
        ("POST", "/tei/exp/embed", {"inputs": [[0, 1]]}),
    ],
)
async def test_one_models_tokens_and_limits_are_not_the_experiments(
    connect: Connect, method: str, path: str, body: object
) -> None:
    client = await connect(experiments=[experiment()])

    answer = await client.request(method, path, json=body)

    assert answer.status_code == 422
    assert "'exp' is an experiment between spaces" in answer.json()["error"]
    assert "the arms are: a (model 'mini'), b (model 'jina')" in answer.json()["error"]
    assert "x-gateway-space" not in answer.headers


async def test_within_one_space_they_are(connect: Connect, make_model: MakeModel) -> None:
    models = [make_model(name, fingerprint="f" * 64) for name in ("mini", "jina")]
    client = await connect(*models, experiments=[experiment("same_space")], aliases={})

    assert (await client.get("/tei/exp/info")).json()["max_input_length"] == 256
    assert (await client.post("/tei/exp/tokenize", json={"inputs": "a b"})).status_code == 200


@pytest.mark.parametrize(("state", "status"), [(ModelState.READY, 200), (ModelState.LOADING, 503)])
async def test_an_experiment_is_healthy_when_all_its_arms_are(
    connect: Connect, make_model: MakeModel, state: ModelState, status: int
) -> None:
    models = [make_model("mini"), make_model("jina", state=state)]
    client = await connect(*models, experiments=[experiment()], aliases={})

    assert (await client.get("/tei/exp/health")).status_code == status


async def test_ollamas_list_has_it_without_the_digest_of_any_weights(connect: Connect) -> None:
    client = await connect(experiments=[experiment()])

    tags = {tag["name"]: tag for tag in (await client.get("/api/tags")).json()["models"]}

    assert (tags["exp"]["digest"], tags["exp"]["details"]["format"]) == ("", "experiment")
    assert len(tags["mini"]["digest"]) == 64
