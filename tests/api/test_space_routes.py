"""``/v1/spaces``: every space that a request can get vectors of, and the names that lead there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from gateway.fleet import Model
from gateway.routing.spaces import is_same_space
from gateway.types import ModelState

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
MakeModel = Callable[..., Model]
Card = dict[str, Any]


async def spaces(client: httpx.AsyncClient, path: str = "/v1/spaces") -> list[Card]:
    body = (await client.get(path)).json()
    assert body["object"] == "list"
    return body["data"]


def members(cards: list[Card]) -> list[tuple[str, str | None, int]]:
    """Return model, task and dimensions of each member."""
    return sorted((one["model"], one["task"] or "", card["dimensions"]) for card in cards for one in card["members"])


def members_of(cards: list[Card], task: str | None) -> list[Card]:
    return [member for card in cards for member in card["members"] if member["task"] == task]


@pytest.mark.parametrize("path", ["/spaces", "/v1/spaces/"])
async def test_the_paths_are_one(client: httpx.AsyncClient, path: str) -> None:
    assert await spaces(client, path) == await spaces(client)


async def test_each_model_task_and_size_is_in_one_space(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()["data"]

    cards = await spaces(client)

    assert members(cards) == sorted(
        (model["id"], task, size) for model in models for task in model["tasks"] or [""] for size in model["dimensions"]
    )
    assert len({card["id"].rpartition("@")[2] for card in cards}) == len(cards) == 1 + 4 * 3 + 1


async def test_a_card_describes_the_vectors(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()["data"]

    first, *_, last = await spaces(client)

    assert len(first.pop("fingerprint")) == 64
    assert first == {
        "id": models[0]["space"],
        "object": "space",
        "dimensions": 8,
        "outputs": ["dense"],
        "precision": "float",
        "normalized": True,
        "pooling": "mean",
        "members": [{"model": "mini", "task": None, "state": "ready", "names": ["mini", "default"], "experiments": []}],
    }
    assert (last["dimensions"], last["normalized"]) == (10, False)


async def test_query_and_passage_share_a_space(client: httpx.AsyncClient) -> None:
    shared = [card for card in await spaces(client) if len(card["members"]) > 1]

    assert [card["dimensions"] for card in shared] == [32, 16, 8]
    for card in shared:
        assert [member["task"] for member in card["members"]] == ["retrieval.query", "retrieval.passage"]


async def test_two_models_with_the_same_weights_share_their_spaces(connect: Connect, make_model: MakeModel) -> None:
    twins = [make_model(name, fingerprint="f" * 64, dimensions=(8, 4)) for name in ("gpu", "cpu")]
    client = await connect(*twins, make_model("other", dimensions=(8, 4)), aliases={"name": "cpu"})

    cards = await spaces(client)

    assert [[(one["model"], one["names"]) for one in card["members"]] for card in cards] == [
        [("gpu", ["gpu"]), ("cpu", ["cpu", "name"])],
        [("gpu", ["gpu"]), ("cpu", ["cpu", "name"])],
        [("other", ["other"])],
        [("other", ["other"])],
    ]


async def test_vectors_of_different_lengths_or_instructions_share_none(connect: Connect, make_model: MakeModel) -> None:
    same = {"fingerprint": "f" * 64}
    models = [
        make_model("plain", **same),
        make_model("raw", **same, is_normalized=False),
        make_model("told", **same, instruction="search: "),
    ]

    cards = await spaces(await connect(*models, aliases={}))

    assert [[member["model"] for member in card["members"]] for card in cards] == [["plain"], ["raw"], ["told"]]


async def test_every_name_leads_where_the_space_says(client: httpx.AsyncClient) -> None:
    cards = await spaces(client)
    num_asked = 0
    for card in cards:
        for member in card["members"]:
            for name in member["names"]:
                body = {"model": name, "input": "a", "dimensions": card["dimensions"]}
                answer = await client.post("/v1/embeddings", json=body)
                assert is_same_space(answer.headers["x-gateway-space"], card["id"]), (name, card)
                assert answer.headers["x-gateway-model"] == member["model"]
                num_asked += 1
    assert num_asked == 2 + 3 * (5 + 1 + 1) + 1  # mini and default; jina with tasks, without one, its alias; team/small


async def test_an_alias_keeps_its_task(connect: Connect, make_model: MakeModel) -> None:
    tasks = {"retrieval.query": "query: ", "retrieval.passage": "", "separation": "separate: "}
    models = [make_model("m", tasks=tasks, default_task="separation"), make_model("plain")]
    aliases = {"usual": "m", "ask": ("m", "search_query"), "bare": ("plain", "query")}

    cards = await spaces(await connect(*models, aliases=aliases))

    assert [(member["task"], member["names"]) for card in cards for member in card["members"]] == [
        ("retrieval.query", ["m:retrieval.query", "ask"]),
        ("retrieval.passage", ["m:retrieval.passage"]),
        ("separation", ["m", "m:separation", "usual"]),
        (None, ["plain", "bare"]),
    ]


async def test_a_request_without_a_task_has_its_own_space_if_the_model_has_no_default(
    connect: Connect, make_model: MakeModel
) -> None:
    """The vectors of such a request belong to no task of the model."""
    model = make_model("m", tasks={"retrieval.query": "query: "})
    client = await connect(model, aliases={"usual": "m", "ask": ("m", "query")})
    answer = await client.post("/v1/embeddings", json={"model": "m", "input": "a"})

    cards = await spaces(client)

    (bare,) = members_of(cards, None)
    (query,) = members_of(cards, "retrieval.query")
    assert (bare["names"], query["names"]) == (["m", "usual"], ["m:retrieval.query", "ask"])
    assert answer.headers["x-gateway-space"] == next(card["id"] for card in cards if bare in card["members"])


async def test_only_loaded_models_have_spaces(connect: Connect, make_model: MakeModel) -> None:
    models = [make_model("ready"), make_model("broken", state=ModelState.FAILED, reason="failed to load: no weights")]

    assert members(await spaces(await connect(*models, aliases={}))) == [("ready", "", 8)]


async def test_a_model_that_is_being_replaced_is_shown_as_such(connect: Connect, make_model: MakeModel) -> None:
    model = make_model("m")
    client = await connect(model, aliases={})
    model.report(ModelState.RECOVERING, "a batch hung")

    (card,) = await spaces(client)

    assert [member["state"] for member in card["members"]] == ["recovering"]
