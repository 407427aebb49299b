"""Tasks, sizes and outputs, asked for over HTTP and computed by the real engine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import pytest
import pytest_asyncio
import torch

from gateway.backends.infinity import InfinityBackend
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, Output, SparseVector, Timings
from tests.models.checkpoints import JINA_TASKS, MAX_TOKENS, TEXTS
from tests.models.in_process import Connect, connect_in_module, entry  # noqa: F401

# One gateway serves all tests that only read: engines take longer to start than to answer.
pytestmark = pytest.mark.asyncio(loop_scope="module")

Load = Callable[..., Any]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
Tokenize = Callable[..., list[int]]
PeftStates = Callable[[Sequence[int], str | None], torch.Tensor]
Reference = Callable[[str, str | None], np.ndarray]

TASKS = tuple(JINA_TASKS.values())
INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
}
SIZES = (64, 48, 32, 16, 8)
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(["dense", "sparse", "multivector"], size)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(jina: Path, m3: Path, connect: Connect) -> httpx.AsyncClient:
    """Return a client of a gateway over both models; an alias selects one task."""
    return await connect(
        entry("jina", jina, default_task="text-matching", dimensions=SIZES),
        entry("m3", m3, outputs=("dense", "sparse", "multivector")),
        aliases={"queries": ("jina", "retrieval.query"), "default": ("jina", None)},
    )


@pytest.fixture(scope="module")
def reference(jina: Path, peft_states: PeftStates, tokenize: Tokenize) -> Reference:
    """Return the function that computes a text's finished vector with PEFT."""

    def vector(text: str, task: str | None) -> np.ndarray:
        pooled = peft_states(tokenize(jina, INSTRUCTIONS.get(task or "", "") + text), task).mean(0).numpy()
        return pooled / np.linalg.norm(pooled)

    return vector


async def embed(client: httpx.AsyncClient, texts: Sequence[str] = TEXTS, **fields: object) -> httpx.Response:
    response = await client.post("/v1/embeddings", json={"input": list(texts), **fields})
    assert response.status_code == 200, response.text
    return response


def vectors_of(response: httpx.Response) -> np.ndarray:
    return np.array([row["embedding"] for row in response.json()["data"]], np.float32)


# ------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        *(({"model": "jina", "task": task}, task) for task in TASKS),
        *(({"model": f"jina:{task}"}, task) for task in TASKS),
        ({"model": "jina"}, "text-matching"),
        ({}, "text-matching"),
        ({"model": "queries"}, "retrieval.query"),
        ({"model": "queries", "task": "search_query"}, "retrieval.query"),
        ({"model": "jina", "input_type": "document"}, "retrieval.passage"),
        ({"model": "jina:clustering"}, "separation"),
    ],
    ids=str,
)
async def test_a_task_by_any_of_its_names(
    client: httpx.AsyncClient, reference: Reference, tokenize: Tokenize, jina: Path, fields: dict[str, str], task: str
) -> None:
    response = await embed(client, **fields)

    np.testing.assert_allclose(vectors_of(response), [reference(text, task) for text in TEXTS], atol=5e-5)
    assert response.headers["x-gateway-task"] == task
    lengths = [len(tokenize(jina, INSTRUCTIONS.get(task, "") + text)) for text in TEXTS]
    assert response.json()["usage"]["prompt_tokens"] == sum(lengths)
    assert response.headers["x-gateway-truncated"] == str(lengths.index(MAX_TOKENS))


async def test_the_runtime_that_auto_chooses_serves_mixed_tasks_of_many_requests(
    jina: Path, connect: Connect, reference: Reference
) -> None:
    client = await connect(entry("jina", jina, runtime="auto"))
    asked = [(text, task) for text in TEXTS for task in TASKS]

    responses = await asyncio.gather(*(embed(client, [text], model="jina", task=task) for text, task in asked))

    vectors = np.concatenate([vectors_of(response) for response in responses])
    np.testing.assert_allclose(vectors, [reference(text, task) for text, task in asked], atol=5e-5)


async def test_without_a_default_task_no_adapter_is_used(jina: Path, connect: Connect, reference: Reference) -> None:
    client = await connect(entry("jina", jina))

    response = await embed(client, model="jina")

    np.testing.assert_allclose(vectors_of(response), [reference(text, None) for text in TEXTS], atol=5e-5)
    assert "x-gateway-task" not in response.headers


async def test_an_unknown_task_is_a_400_with_the_list(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/embeddings", json={"model": "jina", "input": "fox", "task": "code"})

    assert response.status_code == 400
    assert all(task in response.json()["message"] for task in TASKS)


async def test_spaces_are_those_of_the_model_card(client: httpx.AsyncClient) -> None:
    card = (await client.get("/v1/models/jina")).json()

    spaces = {
        task: (await embed(client, ["fox"], model="jina", task=task)).headers["x-gateway-space"] for task in TASKS
    }

    assert card["spaces"] == spaces
    assert card["space"] == spaces["text-matching"]
    assert spaces["retrieval.query"] == spaces["retrieval.passage"]
    assert len(set(spaces.values())) == 4
    other = (await embed(client, ["fox"], model="m3")).headers["x-gateway-space"]
    assert other not in spaces.values()


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", SIZES)
async def test_a_matryoshka_size_is_sliced_and_normalized_again(
    client: httpx.AsyncClient, reference: Reference, size: int
) -> None:
    response = await embed(client, model="jina", task="separation", dimensions=size)

    expected = np.stack([reference(text, "separation")[:size] for text in TEXTS])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors_of(response), expected, atol=1e-4)


async def test_each_size_has_its_own_space(client: httpx.AsyncClient) -> None:
    spaces = [
        (await embed(client, ["fox"], model="jina", dimensions=size)).headers["x-gateway-space"] for size in SIZES
    ]

    assert len(set(spaces)) == len(SIZES)


async def test_m3_has_its_native_size_only(client: httpx.AsyncClient) -> None:
    await embed(client, ["fox"], model="m3", dimensions=64)

    response = await client.post("/v1/embeddings", json={"model": "m3", "input": "fox", "dimensions": 32})

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_dimensions"
    assert "returns vectors of 64 dimensions" in response.json()["message"]


# ----------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("outputs", SUBSETS, ids=str)
async def test_outputs_are_in_one_answer_as_asked(
    client: httpx.AsyncClient, m3: Path, load: Load, outputs: Sequence[str]
) -> None:
    expected = load(m3, "reference").encode(TEXTS, outputs=[tuple(Output)] * len(TEXTS))

    response = await embed(client, model="m3", outputs=list(outputs))

    names = {"dense": "embedding", "sparse": "sparse", "multivector": "multivector"}
    for index, (row, one) in enumerate(zip(response.json()["data"], expected, strict=True)):
        assert set(row) == {"object", "index", *(names[output] for output in outputs)}
        assert (row["object"], row["index"]) == ("embedding", index)
        if "dense" in outputs:
            np.testing.assert_allclose(row["embedding"], one.dense[0] / np.linalg.norm(one.dense[0]), atol=5e-5)
        if "sparse" in outputs:
            assert set(row["sparse"]) == {"indices", "values"}
            assert row["sparse"]["indices"] == one.sparse.indices.tolist()
            np.testing.assert_allclose(row["sparse"]["values"], one.sparse.values, atol=1e-3)
        if "multivector" in outputs:
            np.testing.assert_allclose(row["multivector"], one.multivector, atol=5e-4)


@pytest.mark.parametrize("outputs", [None, *SUBSETS], ids=str)
@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_every_answer_fits_the_openapi_schema(
    client: httpx.AsyncClient, outputs: Sequence[str] | None, encoding: str
) -> None:
    document = (await client.get("/openapi.json")).json()
    answer = document["paths"]["/v1/embeddings"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]

    response = await embed(client, model="m3", outputs=outputs, encoding_format=encoding)

    jsonschema_rs.validate({**answer, "components": document["components"]}, response.json())


async def test_un_pooled_states_are_peft_s_own(
    client: httpx.AsyncClient, jina: Path, peft_states: PeftStates, tokenize: Tokenize
) -> None:
    answers = await asyncio.gather(
        *(client.post("/tei/jina/embed_all", json={"inputs": TEXTS, "prompt_name": task}) for task in TASKS)
    )

    for task, answer in zip(TASKS, answers, strict=True):
        for states, text in zip(answer.json(), TEXTS, strict=True):
            expected = peft_states(tokenize(jina, INSTRUCTIONS.get(task, "") + text), task)
            np.testing.assert_allclose(np.array(states), expected, atol=5e-4)
        assert answer.headers["x-gateway-task"] == task
    assert (
        len({answer.headers["x-gateway-space"] for answer in answers}) == len(TASKS) - 1
    )  # query and passage share one


async def test_multivectors_have_the_limit_of_token_vectors(m3: Path, connect: Connect) -> None:
    client = await connect(entry("m3", m3, outputs=("dense", "multivector")), max_token_vectors=12)

    dense = await embed(client, TEXTS, model="m3")
    refused = await client.post("/v1/embeddings", json={"input": TEXTS, "model": "m3", "outputs": ["multivector"]})

    assert dense.json()["usage"]["total_tokens"] > 12
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_input")
    assert "tokens together, but the limit" in refused.json()["message"]
    assert (await embed(client, ["fox"], model="m3", outputs=["multivector"])).json()["data"]


async def test_numbers_are_float32_in_their_shortest_form(client: httpx.AsyncClient) -> None:
    response = await embed(client, ["fox near"], model="m3", outputs=["dense", "sparse", "multivector"])

    [row] = response.json()["data"]
    numbers = [*row["embedding"], *row["sparse"]["values"], *(x for vector in row["multivector"] for x in vector)]
    assert all(float(str(np.float32(number))) == number for number in numbers)


async def test_base64_is_for_dense_vectors(client: httpx.AsyncClient) -> None:
    fields = {"model": "m3", "outputs": ["dense", "sparse"]}
    plain, coded = await embed(client, **fields), await embed(client, encoding_format="base64", **fields)

    for one, other in zip(plain.json()["data"], coded.json()["data"], strict=True):
        vector = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_allclose(vector, one["embedding"], atol=5e-5)
        assert other["sparse"]["indices"] == one["sparse"]["indices"]


async def test_requests_for_different_outputs_share_batches(client: httpx.AsyncClient) -> None:
    async def ask(outputs: Sequence[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = (await embed(client, model="m3", outputs=list(outputs))).json()["data"]
        return rows

    def num_batches() -> float:
        return metrics.REGISTRY.get_sample_value("gateway_batch_texts_count", {"model": "m3"}) or 0.0

    whole = await ask(SUBSETS[-1])
    before = num_batches()
    answers = await asyncio.gather(*(ask(outputs) for outputs in SUBSETS * 4))

    assert 0 < num_batches() - before < len(answers) / 2
    names = {"dense": "embedding", "sparse": "sparse", "multivector": "multivector"}
    for outputs, rows in zip(SUBSETS * 4, answers, strict=True):
        for row, full in zip(rows, whole, strict=True):
            assert set(row) - {"object", "index"} == {names[output] for output in outputs}
            if "embedding" in row:
                np.testing.assert_allclose(row["embedding"], full["embedding"], atol=5e-5)
            if "sparse" in row:
                assert row["sparse"]["indices"] == full["sparse"]["indices"]
            if "multivector" in row:
                np.testing.assert_allclose(row["multivector"], full["multivector"], atol=5e-4)


async def test_outputs_that_a_model_does_not_have_are_a_400(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/embeddings", json={"model": "jina", "input": "fox", "outputs": ["sparse"]})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "outputs"


@pytest.mark.parametrize("broken", ["sparse", "multivector"])
async def test_numbers_that_are_not_finite_are_never_handed_out(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """JSON has no NaN: it would arrive as null."""
    number = np.full((1, 64), np.nan, np.float32)
    result = Embeddings(
        vectors=np.ones((1, 64), np.float32),
        num_tokens=[3],
        truncated=[],
        timings=Timings(0, 0, 0),
        sparse=[SparseVector(np.array([5]), number[0, :1])] if broken == "sparse" else None,
        multivectors=[number] if broken == "multivector" else None,
    )

    async def embed_badly(_backend: InfinityBackend, _job: EmbedJob) -> Embeddings:
        return result

    monkeypatch.setattr(InfinityBackend, "embed", embed_badly)

    response = await client.post("/v1/embeddings", json={"model": "m3", "input": "fox", "outputs": [broken]})

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "invalid_vectors"
