"""TEI's dialect: its fields, shapes, headers and errors, at the root and for each model."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.backends.fleet import Model
from gateway.embedding import Embeddings, EmbedJob, Output, SparseVector

# What TEI 1.9 answers, put down from its published OpenAPI document (docs/openapi.json of the project).
NUMBER = {"type": "number"}
SHAPES: dict[str, dict[str, Any]] = {
    "embed": {"type": "array", "minItems": 1, "items": {"type": "array", "items": NUMBER}},
    "embed_sparse": {
        "type": "array",
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "value"],
                "properties": {"index": {"type": "integer", "minimum": 0}, "value": NUMBER},
                "additionalProperties": False,
            },
        },
    },
    "similarity": {"type": "array", "items": NUMBER},
    "error": {
        "type": "object",
        "required": ["error", "error_type"],
        "properties": {
            "error": {"type": "string"},
            "error_type": {"enum": ["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]},
        },
    },
    "info": {
        "type": "object",
        "required": [
            "model_id",
            "model_dtype",
            "model_type",
            "max_concurrent_requests",
            "max_input_length",
            "max_batch_tokens",
            "max_client_batch_size",
            "auto_truncate",
            "tokenization_workers",
            "version",
        ],
        "properties": {
            "model_id": {"type": "string"},
            "model_sha": {"type": ["string", "null"]},
            "model_dtype": {"type": "string"},
            "model_type": {"type": "object", "minProperties": 1, "maxProperties": 1},
            "max_input_length": {"type": "integer", "minimum": 1},
            "max_client_batch_size": {"type": "integer", "minimum": 1},
            "auto_truncate": {"type": "boolean"},
        },
    },
}

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
MakeModel = Callable[..., Model]
VectorsOf = Callable[[Sequence[str], int], np.ndarray]


def unit(vectors: np.ndarray) -> np.ndarray:
    normalised: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised


async def post(client: httpx.AsyncClient, path: str, status: int = 200, **body: object) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    jsonschema.validate(response.json(), SHAPES["error" if status != 200 else path.rpartition("/")[2]])
    return response.json()


@pytest.mark.parametrize(("path", "width"), [("/embed", 8), ("/tei/mini/embed", 8), ("/tei/jina/embed", 16)])
async def test_texts_are_embedded_and_normalised(
    client: httpx.AsyncClient, vectors_of: VectorsOf, path: str, width: int
) -> None:
    found = np.array(await post(client, path, inputs=["a b", "c"]))

    assert found.shape == (2, len(found[0]))
    np.testing.assert_allclose(found, unit(vectors_of(["a b", "c"], len(found[0]))), rtol=1e-5)


async def test_one_text_is_a_batch_of_one(client: httpx.AsyncClient) -> None:
    assert len(await post(client, "/embed", inputs="alone")) == 1


async def test_vectors_can_be_had_as_they_were_pooled(client: httpx.AsyncClient, vectors_of: VectorsOf) -> None:
    found = np.array(await post(client, "/embed", inputs=["a b"], normalize=False))

    np.testing.assert_allclose(found, vectors_of(["a b"], found.shape[1]), rtol=1e-5)


async def test_a_prompt_is_a_task(client: httpx.AsyncClient) -> None:
    response = await client.post("/tei/jina/embed", json={"inputs": "x", "prompt_name": "query"})

    assert response.status_code == 200
    assert response.headers["x-gateway-task"] == "retrieval.query"


async def test_what_an_answer_says_of_itself(client: httpx.AsyncClient) -> None:
    response = await client.post("/embed", json={"inputs": ["one two", "three"]})

    assert response.headers["x-compute-tokens"] == "3"
    assert response.headers["x-compute-characters"] == "12"
    assert response.headers["x-gateway-model"] == "mini"
    assert "@" in response.headers["x-gateway-space"]
    assert all(
        response.headers[f"x-{name}-time"].isdecimal() for name in ("total", "tokenization", "queue", "inference")
    )


async def test_similarity_is_the_cosine(client: httpx.AsyncClient, vectors_of: VectorsOf) -> None:
    sentences = ["a b", "c", "d e f"]
    found = await post(client, "/similarity", inputs={"source_sentence": "a b", "sentences": sentences})

    width = len((await post(client, "/embed", inputs="x"))[0])
    vectors = unit(vectors_of(sentences, width))
    np.testing.assert_allclose(found, vectors @ vectors[0], atol=1e-5)


class SparseBackend(FakeBackend):
    """Gives a word's length as the weight of its place."""

    async def embed(self, job: EmbedJob) -> Embeddings:
        rows = [np.array([len(word) for word in text.split()], np.float32) for text in job.texts]
        sparse = [SparseVector(np.arange(len(row), dtype=np.int64), row) for row in rows]
        return dataclasses.replace(await super().embed(job), sparse=sparse)


async def test_token_weights_come_in_pairs(connect: Connect, make_model: MakeModel) -> None:
    outputs = (Output.DENSE, Output.SPARSE)
    backend = SparseBackend(fake_info("mini", outputs=outputs))
    client = await connect(make_model("mini", backend=backend, outputs=outputs), aliases={"default": "mini"})

    found = await post(client, "/embed_sparse", inputs=["one three", "a"])

    assert found == [[{"index": 0, "value": 3.0}, {"index": 1, "value": 5.0}], [{"index": 0, "value": 1.0}]]


async def test_what_a_model_is(client: httpx.AsyncClient) -> None:
    for path, model in (("/info", "mini"), ("/tei/jina/info", "jina")):
        info = (await client.get(path)).json()
        jsonschema.validate(info, SHAPES["info"])
        assert info["served_model_name"] == model

    assert (await client.get("/tei/jina/health")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "words"),
    [
        ("/embed", {}, 400, "Validation", "`inputs` is required"),
        ("/embed", {"inputs": []}, 400, "Validation", "`inputs` cannot be empty"),
        ("/embed", {"inputs": [1, 2]}, 400, "Validation", "token ids are not taken"),
        ("/embed", {"inputs": ["x"] * 2049}, 400, "Validation", "batch size 2049 > maximum allowed batch size 2048"),
        ("/embed", {"inputs": "x", "dimensions": 7}, 400, "Validation", "`dimensions` is 7"),
        ("/embed", {"inputs": "x", "truncation_direction": "up"}, 400, "Validation", "must be `left` or `right`"),
        ("/embed", {"inputs": "word " * 300, "truncate": False}, 400, "Validation", "maximum context length"),
        ("/tei/jina/embed", {"inputs": "x", "prompt_name": "nonsense"}, 400, "Validation", "unknown task"),
        ("/tei/nobody/embed", {"inputs": "x"}, 404, "Validation", "no model is called 'nobody'"),
        ("/embed_sparse", {"inputs": "x"}, 400, "Validation", "asks for sparse"),
        ("/similarity", {"inputs": {"source_sentence": "x"}}, 400, "Validation", "`sentences` is required"),
        ("/similarity", {"inputs": "x"}, 400, "Validation", "`inputs` must be an object"),
    ],
)
async def test_errors_have_teis_form_and_say_what_is_wrong(
    client: httpx.AsyncClient, path: str, body: dict[str, object], status: int, kind: str, words: str
) -> None:
    error = await post(client, path, status, **body)

    assert error["error_type"] == kind
    assert words in error["error"]
    assert error["error"] == error["message"]


async def test_a_foreign_vector_is_refused_here_as_well(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/embed", json={"inputs": "x"}, headers={"x-gateway-expect-space": "other@000000000000"}
    )

    assert response.status_code == 412


async def test_openais_paths_keep_openais_errors(client: httpx.AsyncClient) -> None:
    response = await client.post("/embeddings", json={"input": []})

    assert response.json()["error"]["code"] == "invalid_input"
