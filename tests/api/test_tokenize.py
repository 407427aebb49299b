"""``POST /v1/tokenize``: the tokens of a text in any model, the instruction of its task, and the place of a cut."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import httpx
import pytest

from gateway.api.tokenize import place_of_cut
from gateway.fleet import Model
from gateway.types import Token

CheckError = Callable[..., str]
Connect = Callable[..., Awaitable[httpx.AsyncClient]]


async def tokenize(client: httpx.AsyncClient, **body: object) -> dict[str, object]:
    answer = await client.post("/v1/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


async def test_tokens_have_ids_places_and_the_template(client: httpx.AsyncClient) -> None:
    body = await tokenize(client, model="mini", input=["über den Bach", ""])

    assert (body["object"], body["model"], body["task"], body["max_tokens"]) == ("list", "mini", None, 8)
    first, second = body["data"]
    assert [(token["text"], token["special"], token["start"], token["stop"]) for token in first["tokens"]] == [
        ("[S]", True, None, None),
        ("über", False, 0, 4),
        ("den", False, 5, 8),
        ("Bach", False, 9, 13),
    ]
    assert (first["index"], first["num_tokens"], first["read_tokens"], first["cut_at"]) == (0, 4, 4, None)
    assert (second["index"], len(second["tokens"])) == (1, 1)


async def test_a_long_text_says_where_it_is_cut(client: httpx.AsyncClient) -> None:
    text = "one two three four five six seven eight nine"

    (found,) = (await tokenize(client, model="mini", input=text, add_special_tokens=False))["data"]

    assert (found["num_tokens"], found["read_tokens"]) == (10, 8)
    assert text[: found["cut_at"]] == "one two three four five six seven"
    assert len(found["tokens"]) == 9


async def test_a_query_is_cut_where_queries_are(connect: Connect, make_model: Callable[..., Model]) -> None:
    """A ColBERT model reads fewer tokens of a query than of a document."""
    tasks = {"retrieval.query": "", "retrieval.passage": ""}
    model = make_model("mini", tasks=tasks, default_task="retrieval.passage", max_tokens=8, max_query_tokens=4)
    client = await connect(model, aliases={})
    text = "one two three four five"

    body = await tokenize(client, model="mini", task="query", input=text)

    assert (body["max_tokens"], body["data"][0]["read_tokens"]) == (4, 4)
    assert text[: body["data"][0]["cut_at"]] == "one two three"
    for task in ("passage", None):
        body = await tokenize(client, model="mini", task=task, input=text)
        assert (body["max_tokens"], body["data"][0]["cut_at"]) == (8, None)


async def test_the_instruction_of_a_task_is_marked(client: httpx.AsyncClient) -> None:
    body = await tokenize(client, model="jina-query", input="ada travels")

    assert body["task"] == "retrieval.query"
    tokens = [
        (token["text"], token["instruction"], token["start"], token["stop"])
        for token in body["data"][0]["tokens"]
        if not token["special"]
    ]
    assert tokens == [("query:", True, None, None), ("ada", False, 0, 3), ("travels", False, 4, 11)]
    by_task = await tokenize(client, model="jina", task="retrieval.query", input="ada travels")
    assert by_task["data"] == body["data"]


async def test_a_token_that_begins_in_the_instruction_has_the_text_of_its_place(
    connect: Connect, make_model: Callable[..., Model]
) -> None:
    client = await connect(make_model("mini", tasks={"retrieval.query": "q:"}), aliases={})
    text = "ada travels"

    (found,) = (await tokenize(client, model="mini", task="query", input=text))["data"]

    tokens = [token for token in found["tokens"] if not token["special"]]
    assert [(token["text"], token["start"], token["stop"]) for token in tokens] == [("ada", 0, 3), ("travels", 4, 11)]


async def test_many_tokens_are_written_whole(client: httpx.AsyncClient) -> None:
    body = await tokenize(client, input=["a b " * 2_500, "c"])

    assert [len(one["tokens"]) for one in body["data"]] == [5_001, 2]


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({"input": []}, 400, "empty_input", "input"),
        ({}, 400, "invalid_input", "input"),
        ({"input": [1, 2]}, 400, "invalid_input", "input"),
        ({"input": "a" * 250_001}, 400, "invalid_input", "250001 characters; the limit is 250000"),
        ({"input": "a", "model": "nothing"}, 404, "model_not_found", "nothing"),
        ({"input": "a", "model": "jina", "task": "cooking"}, 400, "invalid_input", "cooking"),
    ],
)
async def test_wrong_requests_get_an_error_with_the_problem(
    client: httpx.AsyncClient, body: dict[str, object], status: int, code: str, message: str
) -> None:
    answer = await client.post("/v1/tokenize", json=body)

    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert message in answer.json()["message"]


async def test_a_key_is_needed(connect: Connect) -> None:
    client = await connect(api_keys="client-key")
    assert (await client.post("/v1/tokenize", json={"input": "a"})).status_code == 401


def test_a_limit_smaller_than_the_template_cuts_after_the_first_token() -> None:
    tokens = [Token(0, "[S]", is_special=True, start=None, stop=None)] * 3
    tokens += [Token(1, "ab", is_special=False, start=0, stop=2), Token(2, "c", is_special=False, start=3, stop=4)]
    assert place_of_cut(tokens, 2, 0) == 2
    assert place_of_cut(tokens, 5, 0) is None
    assert place_of_cut(tokens[:3], 2, 0) is None
