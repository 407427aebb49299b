"""The HTTP contract that every client may rely on: one table for each rule."""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiktoken

from gateway.api import token_ids
from gateway.fleet import Model
from gateway.types import Truncate

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
VectorsOf = Callable[[Sequence[str], int], np.ndarray]
MakeModel = Callable[..., Model]

LONG = "one two three four five six seven eight nine ten"  # two tokens longer than the models take
KEY = "sk-right"


async def embed(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    """Send the body as JSON, with a text if it has no ``input``."""
    return await client.post("/v1/embeddings", json={"input": "a text", **body})


async def send(client: httpx.AsyncClient, body: bytes | str, **headers: str) -> httpx.Response:
    """Send a body unchanged."""
    return await client.post("/v1/embeddings", content=body, headers=headers)


def rows_of(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    "path",
    [
        "/v1/embeddings",
        "/embeddings",
        "/v1/embeddings/",
        "/embeddings/",
        "/v1//embeddings",
        "/v1///embeddings//",
        "/v1/embeddings?api-version=2024-02-01&model=ignored",
    ],
)
async def test_embeddings_are_found_however_a_base_url_and_a_path_are_joined(
    client: httpx.AsyncClient, path: str
) -> None:
    response = await client.post(path, json={"input": "a text"})

    assert response.status_code == 200
    assert response.json()["model"] == "mini"


async def test_two_slashes_in_front_work_too(client: httpx.AsyncClient) -> None:
    url = httpx.URL("http://gateway", raw_path=b"//v1/embeddings")

    assert (await client.post(url, json={"input": "a text"})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "hint"),
    [
        pytest.param("POST", "/v1/embedding", "did you mean /v1/embeddings?", id="nearly right"),
        pytest.param("POST", "/v1/v1/embeddings", "did you mean /v1/embeddings?", id="v1 twice"),
        pytest.param("POST", "/v1/chat/completions", "embeddings are at POST /v1/embeddings", id="not served"),
        pytest.param("GET", "/", "embeddings are at POST /v1/embeddings", id="root"),
        pytest.param("GET", "/v1", "models at GET /v1/models", id="base url"),
        pytest.param("GET", "/static-offline-docs", "models at GET /v1/models", id="a folder of files"),
        pytest.param("GET", "/static-offline-docs/%00", "models at GET /v1/models", id="NUL in a file's name"),
    ],
)
async def test_a_wrong_path_gets_the_right_one(
    client: httpx.AsyncClient, check_error: CheckError, method: str, path: str, hint: str
) -> None:
    response = await client.request(method, path)

    message = check_error(response, 404, "not_found")
    assert message.startswith("no such path: /")
    assert hint in message


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/embeddings", "POST"),
        ("PUT", "/embeddings", "POST"),
        ("OPTIONS", "/v1/embeddings", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/mini", "GET"),
        ("POST", "/health", "GET"),
        ("PUT", "/v1/files", "GET, POST"),
        ("PUT", "/files", "GET, POST"),
        ("PATCH", "/v1/files/file-1", "DELETE, GET"),
        ("DELETE", "/v1/batches", "GET, POST"),
        ("DELETE", "/v1/experiments/a/b", "GET"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_gets_the_right_one(
    client: httpx.AsyncClient, check_error: CheckError, method: str, path: str, allow: str
) -> None:
    response = await client.request(method, path)

    message = check_error(response, 405, "method_not_allowed")
    assert message == f"{method} is not allowed on {path}; use {allow.replace(', ', ' or ')}"
    assert response.headers["allow"] == allow


# ------------------------------------------------------------------------------------------------------ 1, 4: bodies


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="none"),
        pytest.param({"content-type": "application/json"}, id="json"),
        pytest.param({"content-type": "application/json; charset=latin-1"}, id="wrong charset"),
        pytest.param({"content-type": "text/plain"}, id="text"),
        pytest.param({"content-type": "application/x-www-form-urlencoded"}, id="form"),
        pytest.param({"content-type": "multipart/form-data"}, id="multipart without a boundary"),
        pytest.param({"content-type": "nonsense"}, id="nonsense"),
        pytest.param({"x-unknown": "1", "accept": "text/html"}, id="unknown headers"),
    ],
)
async def test_a_body_is_json_with_any_content_type(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await send(client, '{"input": "é"}'.encode(), **headers)

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"


async def test_unknown_fields_are_ignored(client: httpx.AsyncClient) -> None:
    response = await embed(client, extra_body={"a": [1]}, stream=True, Input=1, user="me")

    assert response.status_code == 200


@pytest.mark.parametrize(
    "field",
    [
        "model", "dimensions", "output_dimension", "encoding_format", "embedding_type", "encoding_type",
        "output_dtype", "task", "input_type", "prompt_name", "task_type", "normalized", "normalize", "truncate",
        "late_chunking", "outputs", "user", "unknown",
    ],
)  # fmt: skip
async def test_null_means_absent(client: httpx.AsyncClient, field: str) -> None:
    absent, null = await embed(client), await embed(client, **{field: None})

    assert null.status_code == 200
    assert null.json() == absent.json()


@pytest.mark.parametrize("field", ["task", "input_type"])
async def test_an_empty_task_means_absent(client: httpx.AsyncClient, field: str) -> None:
    response = await embed(client, model="jina", **{field: ""})

    assert response.status_code == 200
    assert response.headers["x-gateway-task"] == "text-matching"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param(rb'{"input": "a\u0000b"}', "a\0b", id="NUL"),
        pytest.param(b'\xef\xbb\xbf{"input": "a"}', "a", id="BOM before the body"),
        pytest.param(rb'{"input": "\ufeffa"}', "\ufeffa", id="BOM in a text"),
        pytest.param('{"input": "👍🏽"}'.encode(), "👍🏽", id="emoji"),
        pytest.param(rb'{"input": "\ud83d\ude00"}', "😀", id="surrogate pair"),
        pytest.param(rb'{"input": "a\ud83d"}', "a\ufffd", id="lone high surrogate"),
        pytest.param(rb'{"input": "\ude00a"}', "\ufffda", id="lone low surrogate"),
        pytest.param(rb'{"input": "\ude00\ud83d"}', "\ufffd\ufffd", id="surrogates the wrong way round"),
        pytest.param(rb'{"input": "\ud83d\ud83d\ude00"}', "\ufffd😀", id="a lone surrogate next to a pair"),
        pytest.param(rb'{"input": "\ufeff\ud83d"}', "\ufeff\ufffd", id="BOM in a text with a lone surrogate"),
        pytest.param(rb'{"input": [{"text": "\ud83d"}], "\ud83d": 1}', "\ufffd", id="lone surrogates anywhere"),
        pytest.param(b' \n{"input" :\t"a"}\r\n', "a", id="white space around"),
        pytest.param(b'{"input": "b", "input": "a"}', "a", id="a field twice: the last"),
    ],
)
async def test_every_text_that_json_can_hold_is_embedded(
    client: httpx.AsyncClient, vectors_of: VectorsOf, body: bytes, text: str
) -> None:
    response = await send(client, body)

    np.testing.assert_allclose(rows_of(response), unit(vectors_of([text], 8)), rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(b"", "the request body is empty", id="empty"),
        pytest.param(b" ", "not valid JSON", id="white space"),
        pytest.param(b'\xef\xbb\xbf{"input": "a"', "not valid JSON", id="cut off"),
        pytest.param(b'{"input": "a"} x', "not valid JSON", id="something behind"),
        pytest.param(b"{'input': 'a'}", "not valid JSON", id="single quotes"),
        pytest.param(b'{"input": "a",}', "not valid JSON", id="trailing comma"),
        pytest.param(b'{"input": "a\nb"}', "not valid JSON", id="raw line break in a text"),
        pytest.param(rb'{"input": "\u00"}', "not valid JSON", id="half an escape"),
        pytest.param(b"input=a", "not valid JSON", id="a form"),
        pytest.param(b'{"input": "a", "x": NaN}', "not valid JSON", id="NaN"),
        pytest.param(b'{"input": "a", "x": Infinity}', "not valid JSON", id="Infinity"),
        pytest.param(b'{"input": "a", "x": -Infinity}', "not valid JSON", id="-Infinity"),
        pytest.param(rb'{"input": "\ud83d", "x": NaN}', "not valid JSON", id="NaN and a lone surrogate"),
        pytest.param(b'{"input": "a", "dimensions": 1e999}', "not valid JSON", id="a number beyond double"),
        pytest.param(b'{"input": ' + b"9" * 5000 + b"}", "not valid JSON", id="5,000 digits"),
        pytest.param(
            rb'{"input": "\ud83d", "x": ' + b"9" * 5000 + b"}", "not valid JSON", id="5,000 digits, surrogate"
        ),
        pytest.param(b'{"input": "\xe9"}', "UTF-8", id="latin-1"),
        pytest.param(b'{"input": "\xed\xa0\xbd"}', "UTF-8", id="a surrogate as bytes"),
        pytest.param(b'{"input": "\xff \\ud83d"}', "UTF-8: byte 11 is 0xff", id="latin-1 and a lone surrogate"),
        pytest.param('{"input": "a"}'.encode("utf-16"), "UTF-8", id="UTF-16"),
        pytest.param(b'{"input": ' + b"[" * 100_000, "50000 lists and objects", id="100,000 lists deep"),
        pytest.param(b'{"input": ' + b"[" * 2_000, "nested too deep", id="2,000 lists deep"),
        pytest.param(rb'{"input": "\ud83d", "x": ' + b"[" * 2_000, "nested too deep", id="deep, surrogate"),
        pytest.param(
            rb'{"a": "\ud83d", "x": ' + b"[" * 200 + b"]" * 200 + b"}", "`input` is required", id="200 lists deep"
        ),
        pytest.param(b"[]", "must be a JSON object, got an empty list", id="list"),
        pytest.param(b'["a", "b"]', "must be a JSON object, got a list of 2", id="texts"),
        pytest.param(b'"a"', "must be a JSON object, got the string 'a'", id="string"),
        pytest.param(b"1", "must be a JSON object, got the number 1", id="number"),
        pytest.param(b"null", "must be a JSON object, got null", id="null"),
    ],
)
async def test_a_body_that_is_not_a_json_object_is_refused(
    client: httpx.AsyncClient, check_error: CheckError, body: bytes, message: str
) -> None:
    response = await send(client, body)

    param = "input" if "`input`" in message else None
    assert message in check_error(response, 400, "invalid_input", param=param)


# --------------------------------------------------------------------------------------------------------- 2: input


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        pytest.param("a b", ["a b"], id="a text"),
        pytest.param(["a", "b c"], ["a", "b c"], id="texts"),
        pytest.param([{"text": "a"}, {"text": "b"}], ["a", "b"], id="objects"),
        pytest.param(["a", {"text": "b", "more": 1}], ["a", "b"], id="mixed"),
        pytest.param("", [""], id="an empty text"),
        pytest.param(["", " \n\t", "\u3000"], ["", " \n\t", "\u3000"], id="blank texts"),
        pytest.param(["a", "a"], ["a", "a"], id="a text twice"),
        pytest.param([str(i) for i in range(2048)], [str(i) for i in range(2048)], id="2,048 texts"),
    ],
)
async def test_every_form_of_input_is_read(
    client: httpx.AsyncClient, vectors_of: VectorsOf, value: Any, texts: list[str]
) -> None:
    response = await embed(client, input=value)

    np.testing.assert_allclose(rows_of(response), unit(vectors_of(texts, 8)), rtol=1e-5)
    assert [item["index"] for item in response.json()["data"]] == list(range(len(texts)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param([], "`input` is an empty list; send at least one text", id="no texts"),
        pytest.param(["a"] * 2049, "`input` has 2049 items; the limit is 2048", id="2,049 texts"),
        pytest.param(None, "`input` is required", id="null"),
        pytest.param(1, "`input` must be a string or a list of strings, got the number 1", id="number"),
        pytest.param(True, "`input` must be a string or a list of strings, got true", id="bool"),
        pytest.param({}, "`input` must be a string or a list of strings, got an empty object", id="object"),
        pytest.param({"text": "a"}, "got an object with 'text'", id="an object that is not in a list"),
        pytest.param(["a", None], "`input[1]` must be a string, {\"text\": string} or a list of token ids, got null",
                     id="null among texts"),
        pytest.param(["a", 1], "`input[1]` must be a string", id="number among texts"),
        pytest.param([1, "a"], "`input[0]` must be a string", id="text among token ids"),
        pytest.param([1.5], "`input[0]` must be a string, {\"text\": string} or a list of token ids, got the number 1.5",
                     id="float"),
        pytest.param([True], "`input[0]` must be a string, {\"text\": string} or a list of token ids, got true",
                     id="bool in a list"),
        pytest.param([[True, 1]], "`input[0]` must be a string", id="bool among token ids"),
        pytest.param([[1, True]], "`input[0]` must be a string", id="bool after a token id"),
        pytest.param([["a"]], "`input[0]` must be a string", id="texts in a list in a list"),
        pytest.param([[]], "got an empty list", id="no token ids"),
        pytest.param([[[1]]], "got a list of 1", id="token ids too deep"),
        pytest.param([{}], "got an empty object", id="empty object"),
        pytest.param([{"text": None}], "got an object with 'text'", id="object with null"),
        pytest.param([{"text": 1}], "got an object with 'text'", id="object with a number"),
        pytest.param([{"image": "x"}], "got an object with 'image'", id="object without a text"),
    ],
)  # fmt: skip
async def test_any_other_input_is_refused(
    client: httpx.AsyncClient, check_error: CheckError, value: Any, message: str
) -> None:
    response = await embed(client, input=value)

    assert message in check_error(response, 400, "invalid_input", param="input")


async def test_a_body_without_input_is_refused(client: httpx.AsyncClient, check_error: CheckError) -> None:
    response = await send(client, b"{}")

    assert check_error(response, 400, "invalid_input", param="input") == "`input` is required"


async def test_the_number_of_inputs_can_be_limited(connect: Connect, check_error: CheckError) -> None:
    client = await connect(max_inputs=2)

    assert (await embed(client, input=["a", "b"])).status_code == 200
    message = check_error(await embed(client, input=["a", "b", "c"]), 400, "invalid_input", param="input")
    assert message == "`input` has 3 items; the limit is 2: send several requests"


# ----------------------------------------------------------------------------------------------------- 3: token ids


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        pytest.param([15339, 1917], ["hello world"], id="one list: one input"),
        pytest.param([[15339, 1917]], ["hello world"], id="as LangChain sends one document"),
        pytest.param([[15339], [1917]], ["hello", " world"], id="two documents"),
        pytest.param([[15339.0, 1917.0]], ["hello world"], id="integers written as floats"),
        pytest.param([[15339], "", "b", {"text": "c"}], ["hello", "", "b", "c"], id="mixed with texts"),
        pytest.param([15339] * 3000, ["hello" * 3000], id="more ids than there may be inputs"),
        pytest.param([0, 100255], ["! Conveyor"], id="the first and the last"),
        pytest.param([100257], ["<|endoftext|>"], id="a special token"),
        pytest.param([9468], ["\ufffd"], id="half a character"),
    ],
)
async def test_token_ids_are_decoded_where_the_vocabulary_is_installed(
    connect: Connect, vectors_of: VectorsOf, value: Any, texts: list[str]
) -> None:
    client = await connect()

    response = await embed(client, input=value)

    np.testing.assert_allclose(rows_of(response), unit(vectors_of(texts, 8)), rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        pytest.param([100256], "`input`", id="a gap"),
        pytest.param([100277], "`input`", id="one too high"),
        pytest.param([["a"], [-1]][1:], "`input[0]`", id="negative"),
        pytest.param([[15339], [2**31]], "`input[1]`", id="2**31"),
        pytest.param([[15339], [2**32]], "`input[1]`", id="2**32"),
        pytest.param([2**63], "`input`", id="2**63"),
        pytest.param([[-(2**64)]], "`input[0]`", id="-2**64"),
        pytest.param([1e300], "`input`", id="1e300"),
        pytest.param([-(2**63)], "`input`", id="-2**63"),
    ],
)
async def test_ids_outside_of_the_vocabulary_are_refused(
    connect: Connect, check_error: CheckError, value: Any, where: str
) -> None:
    client = await connect()

    message = check_error(await embed(client, input=value), 400, "invalid_input", param="input")

    assert message.startswith(f"{where} holds token ids that are not in the cl100k_base vocabulary (0 to 100276)")
    assert "check_embedding_ctx_length=False" in message


@pytest.fixture(params=["not installed", "missing", "damaged"])
def no_vocabulary(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put another package in the place of the one with the vocabulary."""
    package = tmp_path / "another_vocabulary"
    (package / "data").mkdir(parents=True)
    if request.param == "damaged":
        (package / "data" / "cl100k_base.tiktoken").write_bytes(b"IQ== 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = "no_such_vocabulary" if request.param == "not installed" else package.name
    monkeypatch.setattr(token_ids, "_PACKAGE", name)
    token_ids._load.cache_clear()
    yield
    token_ids._load.cache_clear()


@pytest.mark.usefixtures("no_vocabulary")
@pytest.mark.parametrize("value", [[15339, 1917], [[15339, 1917]], ["a", [15339]], [-1]])
async def test_token_ids_are_refused_without_the_vocabulary(
    client: httpx.AsyncClient, check_error: CheckError, value: Any
) -> None:
    """They are never interpreted as ids of the served model."""
    message = check_error(await embed(client, input=value), 400, "invalid_input", param="input")

    assert "the cl100k_base vocabulary that they belong to is not installed" in message
    assert "check_embedding_ctx_length=False" in message


def test_ids_are_decoded_as_tiktoken_does(tiktoken_cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiktoken_cache_dir))
    reference = tiktoken.get_encoding("cl100k_base")
    ids = [*range(100_256), 100_257, 100_258, 100_259, 100_260, 100_276]

    assert token_ids.TokenIds(ids, "").decode() == reference.decode(ids)
    assert [token_ids.TokenIds([i], "").decode() for i in ids[::97]] == [reference.decode([i]) for i in ids[::97]]


async def test_more_ids_than_a_text_may_have_are_refused_before_they_are_looked_at(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    message = check_error(await embed(client, input=[1] * 100_000 + ["a"]), 400, "invalid_input", param="input")
    assert message == "`input` holds 100001 numbers; the limit is 100000 token ids: send texts"

    message = check_error(await embed(client, input=["a", [1] * 100_001]), 400, "invalid_input", param="input")
    assert message == "`input[1]` holds 100001 numbers; the limit is 100000 token ids: send texts"


# ------------------------------------------------------------------------------------------------- fields: wrong types

WRONG_VALUES = [
    (["model", "task", "input_type"], "a string", [(1, "the number 1"), (True, "true"), ([], "an empty list")]),
    (
        ["dimensions", "output_dimension"],
        "a positive integer",
        [
            (0, "the number 0"),
            (-8, "the number -8"),
            (8.5, "the number 8.5"),
            (True, "true"),
            ("8.5", "the string '8.5'"),
            ("-8", "the string '-8'"),
            ("0", "the string '0'"),
            ("8e0", "the string '8e0'"),
            ("0x8", "the string '0x8'"),
            ("٨", "the string '٨'"),
            ("9" * 39, f"the string '{'9' * 39}'"),
            ("true", "the string 'true'"),
            (" ", "the string ' '"),
            ([8], "a list of 1"),
        ],
    ),
    (
        ["encoding_format", "embedding_type", "encoding_type", "output_dtype"],
        "`float`, `base64`, `int8`, `uint8`, `binary` or `ubinary`",
        [
            ("hex", "the string 'hex'"),
            (1, "the number 1"),
            (["float"], "a list of 1"),
        ],
    ),
    (
        ["normalized", "normalize", "late_chunking"],
        "true or false",
        [
            ("yes", "the string 'yes'"),
            ("2", "the string '2'"),
            (2, "the number 2"),
            (0.5, "the number 0.5"),
            ({}, "an empty object"),
            ([True], "a list of 1"),
        ],
    ),
    (
        ["truncate"],
        "true, false, `END`, `START`, `NONE`, `right` or `left`",
        [
            ("middle", "the string 'middle'"),
            (2, "the number 2"),
            (["END"], "a list of 1"),
        ],
    ),
    (
        ["truncation_direction"],
        "`Left` or `Right`",
        [("up", "the string 'up'"), ("none", "the string 'none'"), (True, "true"), ("true", "the string 'true'")],
    ),
    (
        ["outputs"],
        "a list of `dense`, `sparse`, `multivector`",
        [
            ("colbert", "the string 'colbert'"),
            ([], "an empty list"),
            (["colbert"], "a list of 1"),
            ([1], "a list of 1"),
        ],
    ),
]


@pytest.mark.parametrize(
    ("field", "value", "expected", "got"),
    [
        pytest.param(field, value, expected, got, id=f"{field}={json.dumps(value)}")
        for fields, expected, wrong in WRONG_VALUES
        for field in fields
        for value, got in wrong
    ],
)
async def test_an_error_names_the_wrong_field_and_its_valid_values(
    client: httpx.AsyncClient, check_error: CheckError, field: str, value: Any, expected: str, got: str
) -> None:
    response = await embed(client, **{field: value})

    message = check_error(response, 400, "invalid_input", param=field)
    assert message == f"`{field}` must be {expected}, got {got}"


async def test_a_long_wrong_value_is_cut_in_the_message(client: httpx.AsyncClient, check_error: CheckError) -> None:
    response = await embed(client, truncate="x" * 100_000)

    assert len(check_error(response, 400, "invalid_input", param="truncate")) < 200


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(("dimensions", 16), ("output_dimension", 8), id="dimensions"),
        pytest.param(("encoding_format", "float"), ("embedding_type", "base64"), id="encoding_format, embedding_type"),
        pytest.param(("encoding_format", "float"), ("encoding_type", "binary"), id="encoding_format, encoding_type"),
        pytest.param(("embedding_type", "float"), ("encoding_type", "binary"), id="embedding_type, encoding_type"),
        pytest.param(("task", "separation"), ("input_type", "query"), id="task"),
        pytest.param(("task", "separation"), ("prompt_name", "query"), id="prompt_name"),
        pytest.param(("normalized", True), ("normalize", False), id="normalized"),
    ],
)
async def test_synonyms_that_disagree_are_refused(
    client: httpx.AsyncClient, check_error: CheckError, first: tuple[str, Any], second: tuple[str, Any]
) -> None:
    response = await embed(client, model="jina", **dict([first, second]))

    message = check_error(response, 400, "invalid_input", param=first[0])
    assert f"`{first[0]}` says " in message
    assert f"`{second[0]}` says " in message


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"dimensions": 8, "output_dimension": 8}, id="dimensions"),
        pytest.param({"encoding_format": "base64", "encoding_type": "base64"}, id="encoding"),
        pytest.param({"task": "retrieval.query", "input_type": "retrieval.query"}, id="task"),
        pytest.param({"task": "retrieval.query", "input_type": "search_query"}, id="two names of one task"),
        pytest.param({"input_type": "QUERY", "task_type": "RETRIEVAL_QUERY", "prompt_name": "query"}, id="four fields"),
        pytest.param({"normalized": False, "normalize": False}, id="normalized"),
    ],
)
async def test_synonyms_that_agree_pass(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    assert (await embed(client, model="jina", **fields)).status_code == 200


# --------------------------------------------------------------------------------------------------------- 5: model


@pytest.mark.parametrize(
    ("name", "model", "echo"),
    [
        pytest.param("mini", "mini", "mini", id="id"),
        pytest.param("team/small", "team/small", "team/small", id="id with a slash"),
        pytest.param("owner/mini", "mini", "owner/mini", id="source"),
        pytest.param("jina:query", "jina", "jina:query", id="id:task"),
        pytest.param("jina-query", "jina", "jina", id="alias"),
        pytest.param("default", "mini", "mini", id="default"),
        pytest.param("", "mini", "mini", id="empty"),
    ],
)
async def test_a_concrete_name_is_echoed_and_an_alias_is_resolved(
    client: httpx.AsyncClient, name: str, model: str, echo: str
) -> None:
    response = await embed(client, model=name)

    assert response.headers["x-gateway-model"] == model
    assert response.json()["model"] == echo


async def test_a_body_without_model_is_answered_by_the_configured_default(client: httpx.AsyncClient) -> None:
    assert (await embed(client)).json()["model"] == "mini"


async def test_a_body_without_model_is_refused_where_there_is_no_default(
    connect: Connect, check_error: CheckError
) -> None:
    client = await connect(aliases={})

    message = check_error(await embed(client), 400, "invalid_input", param="model")

    assert message == "`model` is required; one of: mini, jina, team/small"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("text-embedding-3-small", ""),
        ("MINI", " (did you mean 'mini'?)"),
        ("mini ", " (did you mean 'mini'?)"),
        ("openai/jina", " (did you mean 'jina'?)"),
        ("jina-queries:query", " (did you mean 'jina-query'?)"),
        ("\u202emini", " (did you mean 'mini'?)"),
        ("x" * 100, ""),
    ],
)
async def test_an_unknown_model_gets_all_names(
    client: httpx.AsyncClient, check_error: CheckError, name: str, hint: str
) -> None:
    message = check_error(await embed(client, model=name), 404, "model_not_found", param="model")

    assert message == f"no model is called {name!r}{hint}; available: mini, jina, team/small, default, jina-query"


# ---------------------------------------------------------------------------------------------------- 6: dimensions


@pytest.mark.parametrize("field", ["dimensions", "output_dimension"])
@pytest.mark.parametrize(
    ("model", "size", "width"),
    [
        pytest.param("mini", 8, 8, id="native width of a model without a choice"),
        pytest.param("jina", 32, 32, id="native width"),
        pytest.param("jina", 16, 32, id="listed"),
        pytest.param("jina", 8, 32, id="smallest"),
        pytest.param("jina", 16.0, 32, id="an integer written as a float"),
    ],
)
async def test_a_listed_size_is_sliced_and_normalized_again(
    client: httpx.AsyncClient, vectors_of: VectorsOf, field: str, model: str, size: float, width: int
) -> None:
    response = await embed(client, model=model, input=["a", "b"], **{field: size})

    np.testing.assert_allclose(rows_of(response), unit(vectors_of(["a", "b"], width)[:, : int(size)]), rtol=1e-5)


@pytest.mark.parametrize("field", ["dimensions", "output_dimension"])
@pytest.mark.parametrize(
    ("model", "size", "sizes", "width"),
    [
        pytest.param("mini", 4, "8", 8, id="less, of a model without a choice"),
        pytest.param("mini", 1536, "8", 8, id="more"),
        pytest.param("jina", 31, "32, 16, 8", 32, id="not listed"),
        pytest.param("jina", 10**20, "32, 16, 8", 32, id="huge"),
    ],
)
async def test_any_other_size_is_refused_with_the_right_ones(
    client: httpx.AsyncClient, check_error: CheckError, field: str, model: str, size: int, sizes: str, width: int
) -> None:
    response = await embed(client, model=model, **{field: size})

    message = check_error(response, 400, "unsupported_dimensions", param="dimensions")
    assert f"`dimensions` is {size}, but model '{model}' returns vectors of {sizes} dimensions" in message
    assert "`embedder.config.embedding_dims`" in message
    assert f"to {width}" in message


# ------------------------------------------------------------------------------------------------------ 7: encodings


def decode_base64(embedding: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4")


ENCODING_FIELDS = pytest.mark.parametrize(
    "field", ["encoding_format", "embedding_type", "encoding_type", "output_dtype"]
)


@ENCODING_FIELDS
async def test_base64_holds_the_same_float32_as_the_list(client: httpx.AsyncClient, field: str) -> None:
    floats = rows_of(await embed(client, model="jina", input=["a", "b"], **{field: "float"}))

    response = await embed(client, model="jina", input=["a", "b"], **{field: "base64"})

    assert response.status_code == 200
    np.testing.assert_array_equal([decode_base64(item["embedding"]) for item in response.json()["data"]], floats)


@ENCODING_FIELDS
@pytest.mark.parametrize(("encoding", "offset"), [("binary", 128), ("ubinary", 0)])
@pytest.mark.parametrize(("model", "width"), [("jina", 32), ("team/small", 10)])
async def test_binary_has_a_bit_for_each_sign(
    client: httpx.AsyncClient, vectors_of: VectorsOf, field: str, encoding: str, offset: int, model: str, width: int
) -> None:
    response = await embed(client, model=model, input=["a", "b"], **{field: encoding})

    assert response.status_code == 200
    packed = np.packbits(vectors_of(["a", "b"], width) > 0, axis=1).astype(int) - offset
    assert [item["embedding"] for item in response.json()["data"]] == packed.tolist()


async def test_floats_are_the_shortest_that_read_back_as_the_same_float32(
    client: httpx.AsyncClient, vectors_of: VectorsOf
) -> None:
    response = await embed(client, model="team/small", input="a")

    written = re.search(r'"embedding":\[(.*?)\]', response.text)
    assert written is not None
    assert [np.float32(number) for number in written[1].split(",")] == vectors_of(["a"], 10)[0].tolist()
    assert max(map(len, written[1].split(","))) <= len("-0.123456789")


# ---------------------------------------------------------------------------------------------------------- 8: tasks


@pytest.mark.parametrize("field", ["task", "input_type", "prompt_name", "task_type"])
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("retrieval.query", "retrieval.query"),
        ("query", "retrieval.query"),
        ("search_query", "retrieval.query"),
        ("retrieval.passage", "retrieval.passage"),
        ("document", "retrieval.passage"),
        ("passage", "retrieval.passage"),
        ("search_document", "retrieval.passage"),
        ("separation", "separation"),
        ("clustering", "separation"),
        ("classification", "classification"),
        ("text-matching", "text-matching"),
        ("QUERY", "retrieval.query"),
        ("Retrieval.Passage", "retrieval.passage"),
        ("RETRIEVAL_QUERY", "retrieval.query"),
        ("RETRIEVAL_DOCUMENT", "retrieval.passage"),
        ("SEMANTIC_SIMILARITY", "text-matching"),
        ("CLUSTERING", "separation"),
    ],
)
async def test_a_task_is_accepted_by_all_its_names(client: httpx.AsyncClient, field: str, name: str, task: str) -> None:
    with_tasks = await embed(client, model="jina", **{field: name})
    without_tasks = await embed(client, model="mini", **{field: name})

    assert with_tasks.headers["x-gateway-task"] == task
    assert without_tasks.status_code == 200
    assert "x-gateway-task" not in without_tasks.headers


async def test_a_model_s_own_task_is_found_in_any_case(connect: Connect, make_model: MakeModel) -> None:
    """Also one whose name in lower case is a synonym of a task that this model does not have."""
    client = await connect(make_model("mini", tasks={"Clustering": "c: ", "STS": "s: "}), aliases={"default": "mini"})

    for task, own in {"Clustering": "Clustering", "clustering": "Clustering", "sts": "STS"}.items():
        assert (await embed(client, task=task)).headers["x-gateway-task"] == own


async def test_a_task_of_any_name_fits_into_a_header(connect: Connect, make_model: MakeModel) -> None:
    client = await connect(make_model("mini", tasks={"поиск\n": ""}), aliases={"default": "mini"})

    response = await embed(client, task="поиск\n")

    assert response.status_code == 200
    assert urllib.parse.unquote(response.headers["x-gateway-task"]) == "поиск\n"


async def test_without_a_task_the_default_of_the_model_is_used(client: httpx.AsyncClient) -> None:
    assert (await embed(client, model="jina")).headers["x-gateway-task"] == "text-matching"


@pytest.mark.parametrize("field", ["task", "input_type"])
@pytest.mark.parametrize("model", ["mini", "jina"])
async def test_an_unknown_task_is_refused_with_the_list(
    client: httpx.AsyncClient, check_error: CheckError, model: str, field: str
) -> None:
    response = await embed(client, model=model, **{field: "image"})

    message = check_error(response, 400, "invalid_input", param="task")
    assert message.startswith(f"unknown task 'image' for model '{model}'; one of: retrieval.query, retrieval.passage")


async def test_a_task_that_differs_from_the_one_in_the_name_is_refused(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    response = await embed(client, model="jina:query", task="passage")

    message = check_error(response, 400, "invalid_input", param="task")
    assert message == "`model` names the task 'query', and `task` says 'passage': leave one of them out"


# ---------------------------------------------------------- 9, 10: normalized, truncate, late chunking, outputs, user


@pytest.mark.parametrize("field", ["normalized", "normalize"])
@pytest.mark.parametrize(("model", "width"), [("mini", 8), ("team/small", 10)])
@pytest.mark.parametrize("is_normalized", [True, False])
async def test_vectors_are_normalized_or_as_the_model_made_them(
    client: httpx.AsyncClient, vectors_of: VectorsOf, field: str, model: str, width: int, is_normalized: bool
) -> None:
    response = await embed(client, model=model, input="a", **{field: is_normalized})

    raw = vectors_of(["a"], width)
    np.testing.assert_allclose(rows_of(response), unit(raw) if is_normalized else raw, rtol=1e-5)


@pytest.mark.parametrize(
    ("truncate", "expected"),
    [
        pytest.param({}, Truncate.END, id="absent"),
        pytest.param({"truncate": True}, Truncate.END, id="true"),
        pytest.param({"truncate": "END"}, Truncate.END, id="END"),
        pytest.param({"truncate": "right"}, Truncate.END, id="right"),
        pytest.param({"truncate": "START"}, Truncate.START, id="START"),
        pytest.param({"truncate": "left"}, Truncate.START, id="left"),
        pytest.param({"truncate": False}, Truncate.REFUSE, id="false"),
        pytest.param({"truncate": "NONE"}, Truncate.REFUSE, id="NONE"),
    ],
)
async def test_every_form_of_truncate_reaches_the_model(
    connect: Connect, make_model: MakeModel, truncate: dict[str, Any], expected: Truncate
) -> None:
    model = make_model("mini")
    seen = []
    model.backend._on_embed = lambda job: seen.append(job.truncate)
    client = await connect(model, aliases={"default": "mini"})

    assert (await embed(client, **truncate)).status_code == 200
    assert seen == [expected]


@pytest.mark.parametrize("truncate", [{}, {"truncate": True}, {"truncate": "START"}])
async def test_truncated_texts_are_counted_as_they_were_embedded_and_listed(
    client: httpx.AsyncClient, truncate: dict[str, Any]
) -> None:
    response = await embed(client, input=[LONG, "a b", "", LONG], **truncate)

    assert response.status_code == 200
    assert response.headers["x-gateway-truncated"] == "0,3"
    assert response.json()["usage"] == {"prompt_tokens": 8 + 2 + 0 + 8, "total_tokens": 8 + 2 + 0 + 8}


async def test_without_truncated_texts_none_are_listed(client: httpx.AsyncClient) -> None:
    assert "x-gateway-truncated" not in (await embed(client)).headers


@pytest.mark.parametrize(("number", "more"), [(100, ""), (101, ",+1"), (112, ",+12")])
async def test_the_list_of_truncated_texts_fits_into_a_header(
    client: httpx.AsyncClient, number: int, more: str
) -> None:
    response = await embed(client, input=[LONG] * number)

    listed = ",".join(str(i) for i in range(100))
    assert response.headers["x-gateway-truncated"] == f"{listed}{more}"


@pytest.mark.parametrize("truncate", [False, "NONE"])
async def test_a_text_that_must_not_be_truncated_is_refused(
    client: httpx.AsyncClient, check_error: CheckError, truncate: Any
) -> None:
    response = await embed(client, input=["a", LONG], truncate=truncate)

    message = check_error(response, 400, "context_length_exceeded", param="input")
    assert message.startswith("This model's maximum context length is 8 tokens")


async def test_late_chunking_is_refused_where_it_is_not_supported(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    response = await embed(client, late_chunking=True)

    message = check_error(response, 400, "invalid_input", param="late_chunking")
    assert message == "`late_chunking` is not supported by model 'mini': it needs the mean over token states"
    assert (await embed(client, late_chunking=False)).status_code == 200


@pytest.mark.parametrize(
    ("outputs", "missing"),
    [(["sparse"], "sparse"), (["dense", "multivector"], "multivector"), (["sparse", "multivector"], "sparse, multi")],
)
async def test_outputs_that_a_model_does_not_have_are_refused(
    client: httpx.AsyncClient, check_error: CheckError, outputs: list[str], missing: str
) -> None:
    response = await embed(client, outputs=outputs)

    message = check_error(response, 400, "unsupported_output", param="outputs")
    assert message.startswith(f"`outputs` asks for {missing}")
    assert message.endswith("but model 'mini' returns only: dense")


@pytest.mark.parametrize("outputs", [["dense"], ["dense", "dense"]])
async def test_dense_is_the_output_that_every_model_has(client: httpx.AsyncClient, outputs: list[str]) -> None:
    assert (await embed(client, outputs=outputs)).json() == (await embed(client)).json()


@pytest.mark.parametrize("user", ["me", "", 1, {"id": 1}, ["x"]])
async def test_any_user_is_accepted(client: httpx.AsyncClient, user: Any) -> None:
    assert (await embed(client, user=user)).status_code == 200


# -------------------------------------------------------------------------------------------------- the size of a body


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 100):
        yield body[start : start + 100]


def body_of(num_bytes: int) -> bytes:
    return b'{"input": "%s"}' % (b"x" * (num_bytes - len('{"input": ""}')))


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_body_as_large_as_the_limit_passes(connect: Connect, is_declared: bool) -> None:
    client = await connect(max_body_bytes=1000)
    content = body_of(1000) if is_declared else in_chunks(body_of(1000))

    response = await client.post("/v1/embeddings", content=content)

    assert response.status_code == 200


@pytest.mark.parametrize(
    ("is_declared", "size"),
    [pytest.param(True, "1001 bytes", id="declared"), pytest.param(False, "1001 bytes", id="in chunks")],
)
async def test_a_larger_body_is_refused_with_limit_and_size(
    connect: Connect, check_error: CheckError, is_declared: bool, size: str
) -> None:
    client = await connect(max_body_bytes=1000)
    content = body_of(1001) if is_declared else in_chunks(body_of(1001))

    response = await client.post("/v1/embeddings", content=content)

    message = check_error(response, 413, "body_too_large")
    assert f"has {size} or more; the limit is 1000" in message


async def test_a_body_that_never_ends_is_refused_as_soon_as_it_is_too_large(
    connect: Connect, check_error: CheckError
) -> None:
    client = await connect(max_body_bytes=1000)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 600

    response = await client.post("/v1/embeddings", content=endless())

    assert "1200 bytes or more" in check_error(response, 413, "body_too_large")


@pytest.mark.parametrize("declared", ["²", "-1", "1e9", "", "x"])
async def test_a_declared_size_that_is_not_a_number_is_ignored(connect: Connect, declared: str) -> None:
    client = await connect(max_body_bytes=1000)

    response = await send(client, body_of(100), **{"content-length": declared.encode("latin-1")})

    assert response.status_code == 200


async def test_16_mib_are_the_default_limit(client: httpx.AsyncClient, check_error: CheckError) -> None:
    response = await send(client, b"{}", **{"content-length": str(16 * 1024 * 1024 + 1)})

    assert "the limit is 16777216" in check_error(response, 413, "body_too_large")


# ----------------------------------------------------------------------------------------------------------- 11: auth


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": 'Bearer ""'},
        {"authorization": "Bearer sk-any"},
        {"authorization": "Basic dTpw"},
    ],
    ids=lambda headers: headers.get("authorization", "none"),
)
async def test_any_key_and_none_are_accepted_where_no_keys_are_configured(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    response = await client.post("/v1/embeddings", json={"input": "a"}, headers=headers)

    assert response.status_code == 200


async def test_a_key_may_be_of_any_letters(connect: Connect) -> None:
    client = await connect(api_keys="schlüssel-☃")

    response = await client.post(
        "/v1/embeddings", json={"input": "a"}, headers={"authorization": "Bearer schlüssel-☃".encode()}
    )

    assert response.status_code == 200


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY} ", "Bearer sk-second"])
async def test_each_configured_key_is_accepted(connect: Connect, authorization: str) -> None:
    client = await connect(api_keys=f"{KEY},sk-second")

    response = await client.get("/v1/models", headers={"authorization": authorization})

    assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": KEY},
        {"authorization": f" {KEY} "},
        {"x-api-key": KEY},
        {"X-API-KEY": KEY, "authorization": "Bearer"},
        {"api-key": KEY, "x-api-key": '""'},
        {"authorization": f"Basic {base64.b64encode(f'anybody:{KEY}'.encode()).decode()}"},
        {"authorization": f"basic {base64.b64encode(f'{KEY}:'.encode()).decode()}"},
        # A proxy with its own password passes that on; the key is the other one.
        {"authorization": f"Basic {base64.b64encode(b'ann:secret').decode()}", "x-api-key": KEY},
    ],
    ids=str,
)
async def test_a_key_is_found_wherever_clients_put_it(connect: Connect, headers: dict[str, str]) -> None:
    client = await connect(api_keys=KEY)

    assert (await client.get("/v1/models", headers=headers)).status_code == 200
    assert (await client.post("/v1/embeddings", json={"input": "a"}, headers=headers)).status_code == 200
    assert (await client.post("/api/embed", json={"model": "mini", "input": "a"}, headers=headers)).status_code == 200
    assert (await client.post("/tei/mini/embed", json={"inputs": "a"}, headers=headers)).status_code == 200


async def test_bearer_counts_before_the_other_headers(connect: Connect) -> None:
    client = await connect(api_keys=KEY)

    wrong = await client.get("/v1/models", headers={"authorization": "Bearer sk-wrong", "x-api-key": KEY})

    assert wrong.status_code == 401


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        pytest.param({}, "an API key is required: send `Authorization: Bearer KEY`", id="missing"),
        pytest.param({"authorization": ""}, "an API key is required", id="empty header"),
        pytest.param({"authorization": "Bearer"}, "an API key is required", id="empty"),
        pytest.param({"authorization": "Bearer "}, "an API key is required", id="empty, with a space"),
        pytest.param({"authorization": 'Bearer ""'}, "an API key is required", id="empty, in quotes"),
        pytest.param({"authorization": "Basic"}, "an API key is required", id="Basic, empty"),
        pytest.param({"authorization": "Digest abc"}, "an API key is required", id="another scheme"),
        pytest.param({"authorization": "sk-wrong"}, "the API key is not valid", id="wrong, without Bearer"),
        pytest.param({"x-api-key": "sk-wrong"}, "the API key is not valid", id="wrong x-api-key"),
        pytest.param({"authorization": f"Basic {KEY}"}, "an API key is required", id="Basic"),
        pytest.param({"authorization": "Bearer sk-wrong"}, "the API key is not valid", id="wrong"),
        pytest.param({"authorization": f"Bearer {KEY}x"}, "the API key is not valid", id="longer"),
        pytest.param({"authorization": f"Bearer {KEY[:-1]}"}, "the API key is not valid", id="shorter"),
        pytest.param({"authorization": b"Bearer \xff"}, "the API key is not valid", id="not ASCII"),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/embeddings"), ("GET", "/models"), ("GET", "/v1/spaces"), ("GET", "/nothing")]
)
async def test_without_a_configured_key_nothing_is_shown(
    connect: Connect, check_error: CheckError, headers: dict[str, Any], message: str, method: str, path: str
) -> None:
    client = await connect(api_keys=KEY)

    response = await client.request(method, path, headers=headers)

    refusal = check_error(response, 401, "invalid_api_key", type_="authentication_error")
    assert refusal.startswith(message)
    assert KEY not in refusal
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/docs", "/openapi.json"])
async def test_health_and_documentation_need_no_key(connect: Connect, path: str) -> None:
    client = await connect(api_keys=KEY)

    assert (await client.get(path)).status_code == 200


async def test_a_body_that_is_too_large_does_not_bypass_the_key(connect: Connect) -> None:
    client = await connect(api_keys=KEY, max_body_bytes=10)

    assert (await embed(client)).status_code == 401


# ------------------------------------------------------------------------------------------------- 11, 14: headers


@pytest.mark.parametrize("request_id", ["a", "req_1.2-Z", "x" * 128])
@pytest.mark.parametrize("path", ["/v1/models", "/nothing"])
async def test_a_request_id_is_kept(client: httpx.AsyncClient, request_id: str, path: str) -> None:
    response = await client.get(path, headers={"x-request-id": request_id})

    assert response.headers.get_list("x-request-id") == [request_id]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, id="missing"),
        pytest.param({"x-request-id": ""}, id="empty"),
        pytest.param({"x-request-id": "x" * 129}, id="too long"),
        pytest.param({"x-request-id": "a b"}, id="space"),
        pytest.param({"x-request-id": "a\tb"}, id="tab"),
        pytest.param({"x-request-id": b"\xc3\xa9"}, id="not ASCII"),
        pytest.param({"x-request-id": '{"a":1}'}, id="punctuation"),
    ],
)
async def test_an_unfit_request_id_is_replaced(client: httpx.AsyncClient, given: dict[str, Any]) -> None:
    first, second = [(await client.get("/v1/models", headers=given)).headers["x-request-id"] for _ in range(2)]

    assert re.fullmatch(r"req-[0-9a-f]{24}", first)
    assert first != second


async def test_an_answer_says_which_model_task_and_space_its_vectors_are_of(client: httpx.AsyncClient) -> None:
    card = (await client.get("/v1/models/jina")).json()

    headers = (await embed(client, model="jina-query")).headers

    assert headers["x-gateway-model"] == "jina"
    assert headers["x-gateway-task"] == "retrieval.query"
    assert headers["x-gateway-space"] == card["spaces"]["retrieval.query"]
    assert re.fullmatch(r"jina@[0-9a-f]{12}", headers["x-gateway-space"])


async def test_server_timing_has_every_stage_in_milliseconds(client: httpx.AsyncClient) -> None:
    timing = (await embed(client)).headers["server-timing"]

    stages = dict(re.findall(r"(\w+);dur=(\d+\.\d+)", timing))
    assert list(stages) == ["tokenize", "queue", "inference", "serialize", "total"]
    assert 0 < float(stages["total"]) < 60_000


@pytest.mark.parametrize(
    ("asked", "same"),
    [
        pytest.param({"model": "jina"}, {"model": "jinaai/jina-v3", "task": "text-matching"}, id="by another name"),
        pytest.param({"model": "jina:query"}, {"model": "jina", "task": "passage"}, id="query and passage"),
        pytest.param({"model": "jina"}, {"model": "jina", "dimensions": 32}, id="native dimensions said aloud"),
        pytest.param({"model": "mini"}, {"model": "mini", "task": "query"}, id="a task without effect"),
        pytest.param({"model": "mini"}, {"model": "mini", "encoding_format": "base64"}, id="another encoding"),
    ],
)
async def test_vectors_of_the_expected_space_are_given(
    client: httpx.AsyncClient, asked: dict[str, Any], same: dict[str, Any]
) -> None:
    space = (await embed(client, **asked)).headers["x-gateway-space"]

    response = await client.post(
        "/v1/embeddings", json={"input": "a", **same}, headers={"x-gateway-expect-space": space}
    )

    assert response.status_code == 200
    assert response.headers["x-gateway-space"] == space


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"model": "jina", "task": "query"}, id="task"),
        pytest.param({"model": "jina", "dimensions": 16}, id="dimensions"),
        pytest.param({"model": "jina", "normalized": False}, id="normalization"),
        pytest.param({"model": "mini"}, id="model"),
    ],
)
async def test_vectors_of_another_space_are_refused(
    client: httpx.AsyncClient, check_error: CheckError, other: dict[str, Any]
) -> None:
    space = (await embed(client, model="jina")).headers["x-gateway-space"]
    its_space = (await embed(client, **other)).headers["x-gateway-space"]

    response = await client.post(
        "/v1/embeddings", json={"input": "a", **other}, headers={"x-gateway-expect-space": space}
    )

    message = check_error(response, 412, "space_mismatch")
    assert f"the vectors would be in space {its_space}, but the request expects {space}" in message


@pytest.mark.parametrize("blank", ["", "  "])
async def test_a_blank_expectation_is_ignored(client: httpx.AsyncClient, blank: str) -> None:
    response = await client.post(
        "/v1/embeddings", json={"input": "a", "model": "mini"}, headers={"x-gateway-expect-space": blank}
    )

    assert response.status_code == 200


async def test_two_expectations_that_differ_cannot_both_be_met(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    space = (await embed(client, model="mini")).headers["x-gateway-space"]

    async def expect(*spaces: str) -> httpx.Response:
        headers = [("x-gateway-expect-space", each) for each in spaces]
        return await client.post("/v1/embeddings", json={"input": "a", "model": "mini"}, headers=headers)

    assert (await expect(space, space, "")).status_code == 200
    for spaces in ((space, "mini@000000000000"), ("mini@000000000000", space)):
        message = check_error(await expect(*spaces), 400, "invalid_input", param="x-gateway-expect-space")
        assert "is sent 2 times with different spaces" in message


async def test_a_space_that_is_long_is_not_all_repeated(client: httpx.AsyncClient, check_error: CheckError) -> None:
    response = await client.post(
        "/v1/embeddings", json={"input": "a", "model": "mini"}, headers={"x-gateway-expect-space": "s" * 60_000}
    )

    assert len(check_error(response, 412, "space_mismatch")) < 400


# -------------------------------------------------------------------------------------------------- 12, 13: the answer


async def test_an_answer_has_exactly_the_fields_of_openai(client: httpx.AsyncClient, vectors_of: VectorsOf) -> None:
    response = await embed(client, model="jina", input=["a b", "c"])

    body = response.json()
    vectors = [item.pop("embedding") for item in body["data"]]
    assert response.status_code == 200
    assert body == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0}, {"object": "embedding", "index": 1}],
        "model": "jina",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    np.testing.assert_allclose(vectors, unit(vectors_of(["a b", "c"], 32)), rtol=1e-5)


async def test_equal_requests_get_equal_bytes(client: httpx.AsyncClient) -> None:
    assert (await embed(client)).content == (await embed(client)).content
