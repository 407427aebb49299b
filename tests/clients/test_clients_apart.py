"""Clients that run in separate environments: they get the same vectors and scores as any other client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.clients.apart.environment import ENVIRONMENTS, ClientError, Environment, running
from tests.clients.gateway_process import (
    MODEL,
    PROMPTED,
    RERANKER,
    SHORT_WIDTH,
    WIDTH,
    Gateway,
)
from tests.peers import is_missing

pytestmark = pytest.mark.slow

TEXTS = ["hello world", "日本 😀", "two\nlines", ""]
QUERY = "Which city is the capital of Germany?"
DOCUMENTS = ["fox", "Berlin is the capital of Germany.", "near vectors mean near texts", "again and again", "東京"]


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    with started("clients-apart", tmp_path_factory) as environment:
        yield environment


@pytest.fixture(scope="module")
def infinity_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    with started("infinity-client", tmp_path_factory) as environment:
        yield environment


def started(name: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not (ENVIRONMENTS / name).exists():
        is_missing("the clients are not installed: make install-clients")
    return running(name, tmp_path_factory.mktemp(name))


def vectors_of(gateway: Gateway, texts: list[str], **fields: object) -> np.ndarray:
    """Ask the gateway without any client: ``(n, d)``."""
    answer = httpx.post(f"{gateway.base_url}/embeddings", json={"model": MODEL, "input": texts, **fields})
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]])


def ranks_of(gateway: Gateway, **fields: object) -> list[list[Any]]:
    """Ask the gateway without any client: index, score and text of each result."""
    body = {"model": RERANKER, "query": QUERY, "documents": DOCUMENTS, **fields}
    answer = httpx.post(f"{gateway.base_url}/rerank", json=body)
    assert answer.status_code == 200, answer.text
    return [[one["index"], one["relevance_score"], one["document"]["text"]] for one in answer.json()["results"]]


def assert_same(vectors: object, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(vectors), expected, atol=2e-5)


def assert_ranked(ranks: list[list[Any]], expected: list[list[Any]], *, has_texts: bool = True) -> None:
    assert [index for index, _, _ in ranks] == [index for index, _, _ in expected]
    np.testing.assert_allclose([score for _, score, _ in ranks], [score for _, score, _ in expected], atol=1e-5)
    assert [text for _, _, text in ranks] == [text if has_texts else None for _, _, text in expected]


def test_the_scores_can_tell_documents_apart(gateway: Gateway) -> None:
    scores = [score for _, score, _ in ranks_of(gateway)]

    assert min(np.abs(np.diff(scores))) > 1e-3
    assert [index for index, _, _ in ranks_of(gateway)] != list(range(len(DOCUMENTS)))


# ---------------------------------------------------------------------------------------------------------- LiteLLM


@pytest.mark.parametrize(
    ("prefix", "path"),
    [
        ("openai", "/v1"),
        ("hosted_vllm", "/v1"),
        ("infinity", ""),
        ("infinity", "/v1"),
        ("jina_ai", "/v1"),
    ],
)
def test_litellm_embeds(clients: Environment, gateway: Gateway, prefix: str, path: str) -> None:
    vectors = clients.call("litellm_embed", model=f"{prefix}/{MODEL}", api_base=gateway.root_url + path, texts=TEXTS)

    assert_same(vectors, vectors_of(gateway, TEXTS))


def test_litellm_asks_as_it_asks_tei(clients: Environment, gateway: Gateway) -> None:
    url = f"{gateway.root_url}/tei/{MODEL}/embed"

    # Without the last, it looks the model up on the Hugging Face hub.
    vectors = clients.call("litellm_embed", model=f"huggingface/{MODEL}", api_base=url, texts=TEXTS, input_type="embed")

    assert_same(vectors, vectors_of(gateway, TEXTS))


@pytest.mark.parametrize(("prefix", "path"), [("hosted_vllm", "/v1"), ("infinity", ""), ("jina_ai", "/v1")])
def test_litellm_asks_for_shorter_vectors(clients: Environment, gateway: Gateway, prefix: str, path: str) -> None:
    vectors = clients.call(
        "litellm_embed",
        model=f"{prefix}/{PROMPTED}",
        api_base=gateway.root_url + path,
        texts=TEXTS,
        dimensions=SHORT_WIDTH,
    )

    assert_same(vectors, vectors_of(gateway, TEXTS, model=PROMPTED, dimensions=SHORT_WIDTH))


def test_litellm_passes_a_task_on(clients: Environment, gateway: Gateway) -> None:
    vectors = clients.call(
        "litellm_embed",
        model=f"jina_ai/{PROMPTED}",
        api_base=gateway.base_url,
        texts=TEXTS,
        task="retrieval.query",
    )

    assert_same(vectors, vectors_of(gateway, ["query: " + text for text in TEXTS]))


@pytest.mark.parametrize(
    ("prefix", "path"),
    [
        ("cohere", ""),
        ("cohere", "/v2/rerank"),
        ("jina_ai", ""),
        ("jina_ai", "/v1"),
        ("infinity", ""),
        ("hosted_vllm", "/v1"),
        ("huggingface", ""),
        ("huggingface", f"/tei/{RERANKER}"),
    ],
)
def test_litellm_reranks(clients: Environment, gateway: Gateway, prefix: str, path: str) -> None:
    ranks = clients.call(
        "litellm_rerank",
        model=f"{prefix}/{RERANKER}",
        api_base=gateway.root_url + path,
        query=QUERY,
        documents=DOCUMENTS,
        top_n=3,
    )

    assert_ranked(ranks, ranks_of(gateway, top_n=3))


def test_litellm_runs_a_batch(clients: Environment, gateway: Gateway) -> None:
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/embeddings", "body": {"model": MODEL, "input": text}}
        for i, text in enumerate(TEXTS)
    ]
    content = "\n".join(map(json.dumps, lines))

    batch = clients.call("litellm_batch", api_base=gateway.base_url, content=content, endpoint="/v1/embeddings")

    assert batch["status"] == "completed"
    assert batch["id"] in batch["listed"]
    rows = [json.loads(line) for line in batch["output"].splitlines()]
    assert [row["custom_id"] for row in rows] == [f"r{i}" for i in range(len(TEXTS))]
    vectors = [row["response"]["body"]["data"][0]["embedding"] for row in rows]
    assert_same(vectors, vectors_of(gateway, TEXTS))


def test_litellm_shows_the_error(clients: Environment, gateway: Gateway) -> None:
    with pytest.raises(ClientError, match="dimensions"):
        clients.call(
            "litellm_embed", model=f"infinity/{MODEL}", api_base=gateway.base_url, texts=["a"], dimensions=SHORT_WIDTH
        )


# ------------------------------------------------------------------------------------------------------------ Cohere


@pytest.mark.parametrize(("version", "path"), [(1, ""), (2, ""), (2, "/v1")])
def test_cohere_reranks(clients: Environment, gateway: Gateway, version: int, path: str) -> None:
    ranks = clients.call(
        "cohere_rerank",
        version=version,
        url=gateway.root_url + path,
        model=RERANKER,
        query=QUERY,
        documents=DOCUMENTS,
        top_n=2,
    )

    assert_ranked(ranks, ranks_of(gateway, top_n=2), has_texts=False)


def test_cohere_s_older_fields(clients: Environment, gateway: Gateway) -> None:
    documents = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:]]

    ranks = clients.call("cohere_rerank_v1", url=gateway.root_url, model=RERANKER, query=QUERY, documents=documents)

    assert_ranked(ranks, ranks_of(gateway))


# ------------------------------------------------------------------------------------------------------------ Chroma


@pytest.mark.parametrize("path", ["/embed", f"/tei/{MODEL}/embed"])
def test_chroma_asks_as_it_asks_tei(clients: Environment, gateway: Gateway, path: str) -> None:
    vectors = clients.call("chroma_server", url=gateway.root_url + path, texts=TEXTS)

    assert_same(vectors, vectors_of(gateway, TEXTS))


def test_a_task_in_the_path_for_chroma(clients: Environment, gateway: Gateway) -> None:
    vectors = clients.call("chroma_server", url=f"{gateway.root_url}/tei/{PROMPTED}:query/embed", texts=TEXTS)

    assert_same(vectors, vectors_of(gateway, TEXTS, model=PROMPTED, task="query"))


def test_chroma_asks_as_it_asks_openai(clients: Environment, gateway: Gateway) -> None:
    vectors = clients.call("chroma_openai", url=gateway.base_url, model=MODEL, texts=TEXTS)

    assert_same(vectors, vectors_of(gateway, [text.replace("\n", " ") for text in TEXTS]))


def test_chroma_asks_as_it_asks_ollama(clients: Environment, gateway: Gateway) -> None:
    vectors = clients.call("chroma_ollama", url=gateway.root_url, model=MODEL, texts=TEXTS)

    assert_same(vectors, vectors_of(gateway, TEXTS))


def test_chroma_asks_as_it_asks_jina(clients: Environment, gateway: Gateway) -> None:
    documents, queries = clients.call(
        "chroma_jina",
        url=f"{gateway.base_url}/embeddings",
        model=PROMPTED,
        texts=TEXTS,
        query=QUERY,
        task="retrieval.passage",
        late_chunking=False,
        truncate=True,
        dimensions=SHORT_WIDTH,
        embedding_type="float",
        normalized=True,
        query_config={"task": "retrieval.query"},
    )

    fields: dict[str, Any] = {"model": PROMPTED, "dimensions": SHORT_WIDTH}
    assert_same(documents, vectors_of(gateway, TEXTS, task="passage", **fields))
    assert_same(queries, vectors_of(gateway, [QUERY], task="query", **fields))


def test_a_chroma_collection_finds_by_meaning(clients: Environment, gateway: Gateway) -> None:
    url = f"{gateway.root_url}/tei/{MODEL}/embed"

    found = clients.call("chroma_collection", url=url, texts=DOCUMENTS, query=QUERY)

    assert found[0] == "Berlin is the capital of Germany."


# ---------------------------------------------------------------------------------------------------------- pymilvus


def test_pymilvus_asks_as_it_asks_tei(clients: Environment, gateway: Gateway) -> None:
    answer = clients.call("pymilvus_tei", url=f"{gateway.root_url}/tei/{MODEL}", texts=TEXTS, query=QUERY)

    assert answer["dim"] == WIDTH
    assert_same(answer["documents"], vectors_of(gateway, TEXTS))
    assert_same(answer["queries"], vectors_of(gateway, [QUERY]))


def test_pymilvus_asks_as_it_asks_openai(clients: Environment, gateway: Gateway) -> None:
    vectors = clients.call("pymilvus_openai", url=gateway.base_url, model=MODEL, texts=TEXTS)

    assert_same(vectors, vectors_of(gateway, TEXTS))


def test_pymilvus_asks_as_it_asks_jina(clients: Environment, gateway: Gateway) -> None:
    url = f"{gateway.base_url}/embeddings"

    answer = clients.call("pymilvus_jina", url=url, model=PROMPTED, texts=TEXTS, query=QUERY)

    assert answer["dim"] == WIDTH
    assert_same(answer["documents"], vectors_of(gateway, TEXTS, model=PROMPTED, task="passage"))
    assert_same(answer["queries"], vectors_of(gateway, [QUERY], model=PROMPTED, task="query"))


def test_pymilvus_reranks_as_with_jina(clients: Environment, gateway: Gateway) -> None:
    url = f"{gateway.base_url}/rerank"

    ranks = clients.call("pymilvus_jina_rerank", url=url, model=RERANKER, query=QUERY, documents=DOCUMENTS, top_n=3)

    assert_ranked(ranks, ranks_of(gateway, top_n=3))


@pytest.mark.parametrize("path", ["", f"/tei/{RERANKER}"])
def test_pymilvus_reranks_as_with_tei(clients: Environment, gateway: Gateway, path: str) -> None:
    ranks = clients.call("pymilvus_tei_rerank", url=gateway.root_url + path, query=QUERY, documents=DOCUMENTS)

    assert_ranked(ranks, ranks_of(gateway))


# --------------------------------------------------------------------------------------------------------- LlamaIndex


@pytest.mark.parametrize("path", ["", f"/tei/{MODEL}"])
def test_llamaindex_asks_as_it_asks_tei(clients: Environment, gateway: Gateway, path: str) -> None:
    documents, queries = clients.call("llamaindex_tei", url=gateway.root_url + path, texts=TEXTS, query=QUERY)

    assert_same(documents, vectors_of(gateway, TEXTS))
    assert_same(queries, vectors_of(gateway, [QUERY]))


def test_llamaindex_asks_as_it_asks_jina(clients: Environment, gateway: Gateway) -> None:
    vectors = clients.call(
        "llamaindex_jina",
        url=f"{gateway.base_url}/embeddings",
        model=PROMPTED,
        texts=TEXTS,
        task="retrieval.passage",
        dimensions=SHORT_WIDTH,
        late_chunking=False,
    )

    assert_same(vectors, vectors_of(gateway, TEXTS, model=PROMPTED, task="passage", dimensions=SHORT_WIDTH))


@pytest.mark.parametrize("path", ["", f"/tei/{RERANKER}"])
def test_llamaindex_reranks_as_with_tei(clients: Environment, gateway: Gateway, path: str) -> None:
    ranks = clients.call(
        "llamaindex_rerank", kind="tei", url=gateway.root_url + path, query=QUERY, documents=DOCUMENTS, top_n=3
    )

    assert_ranked(ranks, ranks_of(gateway, top_n=3))


def test_llamaindex_reranks_as_with_jina(clients: Environment, gateway: Gateway) -> None:
    ranks = clients.call(
        "llamaindex_rerank",
        kind="jina",
        url=gateway.base_url,
        model=RERANKER,
        query=QUERY,
        documents=DOCUMENTS,
        top_n=3,
    )

    assert_ranked(ranks, ranks_of(gateway, top_n=3))


# ----------------------------------------------------------------------------------------------------------- Haystack


def test_haystack_asks_as_it_asks_jina(clients: Environment, gateway: Gateway) -> None:
    documents, queries = clients.call(
        "haystack_jina",
        url=f"{gateway.base_url}/embeddings",
        model=PROMPTED,
        texts=TEXTS,
        query=QUERY,
        tasks=["retrieval.passage", "retrieval.query"],
    )

    assert_same(documents, vectors_of(gateway, TEXTS, model=PROMPTED, task="passage"))
    assert_same(queries, vectors_of(gateway, [QUERY], model=PROMPTED, task="query"))


def test_haystack_ranks_as_with_jina(clients: Environment, gateway: Gateway) -> None:
    url = f"{gateway.base_url}/rerank"

    ranks = clients.call("haystack_jina_rank", url=url, model=RERANKER, query=QUERY, documents=DOCUMENTS, top_n=3)

    assert_ranked(ranks, ranks_of(gateway, top_n=3))


# ------------------------------------------------------------------------------------------------------------- Ollama


def test_ollama_embeds(clients: Environment, gateway: Gateway) -> None:
    vectors = clients.call("ollama_embed", url=gateway.root_url, model=f"{MODEL}:latest", texts=TEXTS)

    assert_same(vectors, vectors_of(gateway, TEXTS))


def test_ollama_lists_the_models(clients: Environment, gateway: Gateway) -> None:
    assert {MODEL, PROMPTED, "default"} <= set(clients.call("ollama_list", url=gateway.root_url))


# ----------------------------------------------------------------------------------------------------------- Infinity


@pytest.mark.parametrize("path", ["", "/v1", "/v1/"])
def test_langchain_asks_as_it_asks_infinity(clients: Environment, gateway: Gateway, path: str) -> None:
    vectors = clients.call("langchain_infinity", url=gateway.root_url + path, model=MODEL, texts=TEXTS)

    assert_same(vectors, vectors_of(gateway, TEXTS))


@pytest.mark.parametrize("path", ["", "/v1"])
@pytest.mark.parametrize("fields", [{"model": MODEL}, {}], ids=["a model", "the default"])
def test_infinity_s_own_client(
    infinity_client: Environment, gateway: Gateway, path: str, fields: dict[str, str]
) -> None:
    url = gateway.root_url + path

    vectors = infinity_client.call("infinity_embed", url=url, texts=TEXTS, **fields)

    assert_same(vectors, vectors_of(gateway, TEXTS))
    assert MODEL in infinity_client.call("infinity_models", url=url)


def test_infinity_s_own_client_reranks(infinity_client: Environment, gateway: Gateway) -> None:
    ranks = infinity_client.call(
        "infinity_rerank", url=gateway.root_url, model=RERANKER, query=QUERY, documents=DOCUMENTS, top_n=3
    )

    assert_ranked(ranks, ranks_of(gateway, top_n=3))
