"""The page at ``/docs``: its examples work here, with keys too, and it has the paths of other APIs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
OPERATOR = {"api_keys": ["client-key"], "admin_key": "operator-key"}


async def schema_of(client: httpx.AsyncClient) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.get("/openapi.json")).json()
    return answer


async def test_every_example_is_answered(connect: Connect) -> None:
    """Also for other APIs: the values that the page fills in after "Try it out"."""
    client = await connect()
    tried = []
    for path, operations in (await schema_of(client))["paths"].items():
        for method, operation in operations.items():
            parameters = {one["name"]: one["schema"].get("example") for one in operation.get("parameters", ())}
            if path.startswith("/tei/") and path.rsplit("/", 1)[1] in {"embed_sparse", "tokenize", "decode"}:
                continue  # which the models of these tests do not have
            url = path.format_map(parameters)
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            bodies = [one["value"] for one in content.get("examples", {}).values()]
            bodies += [content["example"]] if "example" in content else []
            for body in bodies:
                answer = await client.request(method, url, json=body)
                assert answer.status_code == 200, (path, body, answer.text)
                tried.append(path)

    assert tried.count("/v1/embeddings") >= 3
    assert {"/v1/tokenize", "/tei/{model}/embed", "/api/embed", "/openai/deployments/{model}/embeddings"} <= set(tried)


INPUTS = [
    "a",
    ["a", "b"],
    [{"text": "a"}],
    [{"image": "a"}],
    [{"text": 1}],
    [15339, 1917],
    [[15339], "a"],
    [0],
    [-1],
    [[-1]],
    [100_276],
    [100_277],
    [[100_277]],
    ["a", -1],
    [1.5],
    [True],
    [],
    [[]],
    {},
    1,
    [["a"]],
]


@pytest.mark.parametrize("value", INPUTS, ids=str)
async def test_the_described_input_is_accepted(connect: Connect, value: object) -> None:
    client = await connect()
    schema = await schema_of(client)
    body = schema["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    described = schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]] if "$ref" in body else body
    validator = Draft202012Validator(described["properties"]["input"])
    Draft202012Validator.check_schema(validator.schema)

    answer = await client.post("/v1/embeddings", json={"model": "mini", "input": value})

    assert validator.is_valid(value) is (answer.status_code == 200), answer.text


async def test_each_described_default_is_a_described_value(connect: Connect) -> None:
    schemas = (await schema_of(await connect()))["components"]["schemas"]
    defaults = [
        (name, field, shape)
        for name, schema in schemas.items()
        for field, shape in schema.get("properties", {}).items()
        if "default" in shape and "$ref" not in str(shape)
    ]

    assert len(defaults) > 20
    for name, field, shape in defaults:
        assert Draft202012Validator(shape).is_valid(shape["default"]), (name, field, shape)


async def test_each_path_of_another_api_is_a_route(connect: Connect) -> None:
    client = await connect()
    others = [path for path in (await schema_of(client))["paths"] if path.startswith(("/tei/", "/api/", "/openai/"))]

    assert len(others) == 10
    for path in others:
        answer = await client.options(path.format(model="mini"))
        assert answer.status_code == 405, path  # and not 404


@pytest.mark.parametrize(
    ("settings", "path", "method", "needed"),
    [
        ({}, "/v1/embeddings", "post", []),
        ({}, "/metrics", "get", []),
        ({}, "/admin/reload", "post", [{"Operator's key": []}]),
        (OPERATOR, "/v1/embeddings", "post", [{"API key": []}]),
        (OPERATOR, "/tei/{model}/embed", "post", [{"API key": []}]),
        (OPERATOR, "/metrics", "get", [{"Operator's key": []}]),
        (OPERATOR, "/health/ready", "get", []),
    ],
)
async def test_the_page_has_a_field_for_the_key_that_a_path_needs(
    connect: Connect, settings: dict[str, Any], path: str, method: str, needed: list[dict[str, list[str]]]
) -> None:
    schema = await schema_of(await connect(**settings))

    assert schema["paths"][path][method]["security"] == needed
    assert {one["scheme"] for one in schema["components"]["securitySchemes"].values()} == {"bearer"}
