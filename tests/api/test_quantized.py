"""int8, uint8 and binary vectors: numbers, base64, spaces, and refusals."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from gateway.fleet import Model
from gateway.precision import Precision
from gateway.ranges import Meter
from gateway.vectors import finish, quantize
from tests.api.conftest import TASKS, raw_vectors

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
MakeModel = Callable[..., Model]
CheckError = Callable[..., str]
TEXTS = ["a", "b", "and a third"]
WIDTH, SIZE = 32, 16
FIELDS = ["encoding_format", "embedding_type", "encoding_type", "output_dtype"]
DTYPES = {"int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}


def measured() -> Meter:
    meter = Meter((WIDTH, SIZE), is_normalized=True)
    meter.add(raw_vectors([f"text {i}" for i in range(50)], WIDTH))
    return meter


def expected(precision: str, size: int = WIDTH) -> np.ndarray:
    vectors = finish(raw_vectors(TEXTS, WIDTH), (len(TEXTS), WIDTH), size, normalize=True)
    return quantize(vectors, Precision(precision), measured().ranges()[size])


@pytest.fixture
async def client(connect: Connect, make_random_model: MakeModel) -> httpx.AsyncClient:
    """Return a client of a gateway with a model that is calibrated, and one that is not."""
    sizes = {"width": WIDTH, "dimensions": (WIDTH, SIZE)}
    return await connect(
        make_random_model("mini", ranges=measured().ranges(), tasks=TASKS, default_task="text-matching", **sizes),
        make_random_model("plain", **sizes),
        aliases={},
    )


async def embed(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
    return await client.post("/v1/embeddings", json={"model": "mini", "input": TEXTS, **fields}, headers=headers)


def embeddings_of(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    return [item["embedding"] for item in response.json()["data"]]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("precision", DTYPES)
async def test_a_list_of_integers(client: httpx.AsyncClient, field: str, precision: str) -> None:
    response = await embed(client, **{field: precision})

    assert embeddings_of(response) == expected(precision).tolist()


@pytest.mark.parametrize("precision", DTYPES)
async def test_a_smaller_size_has_its_own_ranges(client: httpx.AsyncClient, precision: str) -> None:
    response = await embed(client, dimensions=SIZE, embedding_type=precision)

    assert embeddings_of(response) == expected(precision, SIZE).tolist()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    ("field", "other"), [("encoding_format", "embedding_type"), ("output_dtype", "encoding_format")]
)
async def test_base64_has_the_bytes_of_the_numbers(
    client: httpx.AsyncClient, precision: str, field: str, other: str
) -> None:
    """Voyage's client requests and decodes it like this."""
    response = await embed(client, **{field: "base64", other: precision})

    decoded = [
        np.frombuffer(base64.b64decode(row, validate=True), DTYPES[precision]) for row in embeddings_of(response)
    ]
    np.testing.assert_array_equal(decoded, expected(precision))


@pytest.mark.parametrize("precision", DTYPES)
async def test_base64_that_openais_clients_would_read_as_float32_is_refused(
    client: httpx.AsyncClient, check_error: CheckError, precision: str
) -> None:
    openai = {"x-stainless-lang": "python"}

    refused = await embed(client, openai, encoding_format="base64", embedding_type=precision)

    message = check_error(refused, 400, "invalid_input", param="encoding_format")
    assert f'pass `encoding_format="{precision}"` to the call' in message
    assert embeddings_of(await embed(client, openai, encoding_format=precision)) == expected(precision).tolist()
    assert isinstance(embeddings_of(await embed(client, openai, encoding_format="base64"))[0], str)


@pytest.mark.parametrize(
    "fields",
    [
        {"encoding_format": "float", "embedding_type": "int8"},
        {"encoding_format": "int8", "output_dtype": "uint8"},
        {"encoding_format": "base64", "embedding_type": "int8", "output_dtype": "float"},
    ],
)
async def test_two_kinds_of_numbers_contradict_each_other(
    client: httpx.AsyncClient, check_error: CheckError, fields: dict[str, str]
) -> None:
    check_error(
        await embed(client, **fields), 400, "invalid_input", param=next(k for k, v in fields.items() if v != "base64")
    )


# -------------------------------------------------------------------------------------------------------------- spaces


async def space_of(client: httpx.AsyncClient, **fields: object) -> str:
    return (await embed(client, **fields)).headers["x-gateway-space"]


async def test_quantized_vectors_are_in_spaces_apart(client: httpx.AsyncClient) -> None:
    floats, signed, unsigned, small = [
        await space_of(client, **fields)
        for fields in (
            {},
            {"embedding_type": "int8"},
            {"embedding_type": "uint8"},
            {"embedding_type": "int8", "dimensions": SIZE},
        )
    ]

    assert len({floats, signed, unsigned, small}) == 4
    assert await space_of(client, embedding_type="binary") == floats
    assert await space_of(client, embedding_type="int8", task="query") == await space_of(
        client, embedding_type="int8", task="document"
    )


async def test_other_ranges_are_another_space(connect: Connect, make_random_model: MakeModel) -> None:
    other = Meter((WIDTH,), is_normalized=True)
    other.add(raw_vectors(["x", "y"], WIDTH))
    spaces = []
    for meter in (measured(), other):
        client = await connect(
            make_random_model("mini", ranges=meter.ranges(), width=WIDTH, dimensions=(WIDTH,)), aliases={}
        )
        spaces.append([await space_of(client), await space_of(client, embedding_type="int8")])

    assert spaces[0][0] == spaces[1][0]
    assert spaces[0][1] != spaces[1][1]


async def test_the_space_can_be_demanded(client: httpx.AsyncClient, check_error: CheckError) -> None:
    floats, signed = await space_of(client), await space_of(client, embedding_type="int8")

    refused = await embed(client, {"x-gateway-expect-space": floats}, embedding_type="int8")

    check_error(refused, 412, "space_mismatch")
    assert (await embed(client, {"x-gateway-expect-space": signed}, embedding_type="int8")).status_code == 200


async def test_the_spaces_are_listed(client: httpx.AsyncClient) -> None:
    cards = (await client.get("/v1/spaces")).json()["data"]

    listed = {
        (card["precision"], card["dimensions"]): card["id"]
        for card in cards
        for member in card["members"]
        if (member["model"], member["task"]) == ("mini", "text-matching")
    }
    assert listed == {
        (precision, size): await space_of(client, dimensions=size, embedding_type=precision)
        for precision in ("float", "int8", "uint8")
        for size in (WIDTH, SIZE)
    }
    assert {card["precision"] for card in cards if card["members"][0]["model"] == "plain"} == {"float"}


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("precision", ["int8", "uint8"])
async def test_without_ranges_the_line_that_fixes_it_is_named(
    client: httpx.AsyncClient, check_error: CheckError, precision: str
) -> None:
    refused = await embed(client, model="plain", encoding_format=precision)

    message = check_error(refused, 400, "invalid_input", param="encoding_format")
    assert "set `ranges: ranges/plain.json` on it in models.yaml" in message
    assert "run `gateway calibrate plain --texts FILE`" in message
    assert (await embed(client, model="plain", embedding_type="binary")).status_code == 200


async def test_ranges_are_for_the_default_length(client: httpx.AsyncClient, check_error: CheckError) -> None:
    refused = await embed(client, embedding_type="int8", normalized=False)

    assert "`normalized` is false" in check_error(refused, 400, "invalid_input", param="normalized")
    assert (await embed(client, embedding_type="int8", normalized=True)).status_code == 200
