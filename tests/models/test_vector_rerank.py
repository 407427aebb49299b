"""Sparse, multi-vector and BGE-M3 models over HTTP: their outputs, and /v1/rerank by them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from sentence_transformers import MultiVectorEncoder, SparseEncoder

from gateway.engine.loading import plan_load
from gateway.errors import LoadError
from tests.models.checkpoints import MAX_TOKENS, SENTENCES
from tests.models.in_process import Connect, connect_in_module, entry  # noqa: F401

# One gateway serves all tests: engines take longer to start than to answer.
pytestmark = pytest.mark.asyncio(loop_scope="module")

QUERY = "What is the capital of Germany; near texts?"
DOCUMENTS = [*SENTENCES, "near vectors, near texts " * 30, "", "fox"]
ALL = ("dense", "sparse", "multivector")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(
    m3: Path,
    stanford: Path,
    inference_free: Path,
    make_family: Callable[..., Path],
    connect: Connect,
) -> httpx.AsyncClient:
    """Return a client of a gateway over models with several outputs, with one, and with dense vectors alone."""
    return await connect(
        entry("m3", m3, outputs=ALL),
        entry("weighted", m3, outputs=ALL, rerank={"dense": 0.4, "sparse": 0.2, "multivector": 0.4}),
        entry("colbert", stanford),
        entry("splade", inference_free),
        entry("dense", make_family("bert")),
        entry("cosine", make_family("xlm-roberta"), rerank={"dense": 1}),
    )


async def embed(
    client: httpx.AsyncClient, model: str, texts: list[str], *outputs: str, **fields: Any
) -> dict[str, Any]:
    body = {"model": model, "input": texts, "outputs": outputs or None, **fields}
    response = await client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


async def rerank(client: httpx.AsyncClient, model: str, **fields: Any) -> httpx.Response:
    return await client.post("/v1/rerank", json={"model": model, "query": QUERY, "documents": DOCUMENTS, **fields})


async def scores(client: httpx.AsyncClient, model: str, **fields: Any) -> np.ndarray:
    response = await rerank(client, model, **fields)
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert [one["relevance_score"] for one in results] == sorted(
        (one["relevance_score"] for one in results), reverse=True
    )
    found = {one["index"]: one["relevance_score"] for one in results}
    return np.array([found[i] for i in range(len(DOCUMENTS))])


async def served_scores(
    client: httpx.AsyncClient, model: str, *outputs: str, is_mean: bool = True
) -> dict[str, np.ndarray]:
    """Compute the similarity by each output from the vectors that the gateway serves, as plainly as can be."""
    query = (await embed(client, model, [QUERY], *outputs, task="query"))["data"][0]
    rows = (await embed(client, model, DOCUMENTS, *outputs, task="document"))["data"]
    found: dict[str, list[float]] = {output: [] for output in outputs}
    for row in rows:
        if "dense" in outputs:
            found["dense"].append(float(np.dot(query["embedding"], row["embedding"])))
        if "sparse" in outputs:
            weights = dict(zip(row["sparse"]["indices"], row["sparse"]["values"], strict=True))
            pairs = zip(query["sparse"]["indices"], query["sparse"]["values"], strict=True)
            found["sparse"].append(sum(value * weights.get(index, 0.0) for index, value in pairs))
        if "multivector" in outputs:
            best = [max(float(np.dot(mine, other)) for other in row["multivector"]) for mine in query["multivector"]]
            found["multivector"].append(sum(best) / (len(best) if is_mean else 1))
    return {output: np.array(values) for output, values in found.items()}


# ------------------------------------------------------------------------------------------------------------- rerank


@pytest.mark.parametrize("output", ALL)
async def test_bge_m3_reranks_by_each_of_its_outputs(client: httpx.AsyncClient, output: str) -> None:
    right = (await served_scores(client, "m3", *ALL))[output]

    np.testing.assert_allclose(await scores(client, "m3", score_by=output), right, atol=1e-5)
    np.testing.assert_allclose(await scores(client, "m3", score_by=[output.upper()]), right, atol=1e-5)


async def test_several_outputs_are_weighted_as_flagembedding_does_it(client: httpx.AsyncClient) -> None:
    """``compute_score``: the sum of the scores with their weights, divided by the sum of these."""
    one = await served_scores(client, "m3", *ALL)
    weights = {"dense": 1, "sparse": 0.3, "multivector": 2.5}

    asked = await scores(client, "m3", score_by=weights)
    equally = await scores(client, "m3")
    configured = await scores(client, "weighted")

    np.testing.assert_allclose(asked, sum(weights[name] * one[name] for name in ALL) / 3.8, atol=1e-5)
    np.testing.assert_allclose(equally, (one["dense"] + one["sparse"] + one["multivector"]) / 3, atol=1e-5)
    weighted = 0.4 * one["dense"] + 0.2 * one["sparse"] + 0.4 * one["multivector"]
    np.testing.assert_allclose(configured, weighted, atol=1e-5)
    np.testing.assert_allclose(await scores(client, "weighted", score_by=["sparse", "dense"]), equal(one), atol=1e-5)


def equal(one: dict[str, np.ndarray]) -> np.ndarray:
    mean: np.ndarray = (one["dense"] + one["sparse"]) / 2
    return mean


async def test_a_colbert_reranks_by_maxsim_as_sentence_transformers_does(
    client: httpx.AsyncClient, stanford: Path
) -> None:
    model = MultiVectorEncoder(str(stanford), device="cpu")
    right = model.similarity(model.encode_query([QUERY]), model.encode_document(DOCUMENTS))[0].numpy()

    found = await scores(client, "colbert")

    np.testing.assert_allclose(found, right, atol=1e-4)
    served = await served_scores(client, "colbert", "multivector", is_mean=False)
    np.testing.assert_allclose(found, served["multivector"], atol=1e-5)


async def test_a_sparse_encoder_reranks_by_its_weights(client: httpx.AsyncClient, inference_free: Path) -> None:
    model = SparseEncoder(str(inference_free), device="cpu")
    options = {"convert_to_sparse_tensor": False}
    right = model.encode_query([QUERY], **options) @ model.encode_document(DOCUMENTS, **options).T

    np.testing.assert_allclose(await scores(client, "splade"), right[0].numpy(), atol=1e-5)


async def test_the_registry_lets_a_model_rerank_by_its_dense_vectors(client: httpx.AsyncClient) -> None:
    right = await served_scores(client, "cosine", "dense")

    np.testing.assert_allclose(await scores(client, "cosine"), right["dense"], atol=1e-5)


async def test_requests_with_the_same_texts_and_other_queries_do_not_share_scores(client: httpx.AsyncClient) -> None:
    alone = [await scores(client, "m3", query=query) for query in ("fox", "Berlin", "fox")]

    together = await asyncio.gather(*(scores(client, "m3", query=query) for query in ("fox", "Berlin", "fox")))

    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=1e-3)


async def test_tokens_are_those_of_the_query_and_of_each_text_once(client: httpx.AsyncClient) -> None:
    query = (await embed(client, "m3", [QUERY], "multivector"))["usage"]
    texts = (await embed(client, "m3", DOCUMENTS, "multivector"))["usage"]

    response = await rerank(client, "m3", top_n=2)

    assert len(response.json()["results"]) == 2
    assert response.json()["usage"]["prompt_tokens"] == query["prompt_tokens"] + texts["prompt_tokens"]
    assert response.headers["x-gateway-truncated"] == str(len(SENTENCES))


async def test_a_text_is_cut_at_the_limit_of_the_request(client: httpx.AsyncClient) -> None:
    cut = await rerank(client, "m3", documents=["near vectors mean near texts"], max_tokens_per_doc=2, score_by="dense")
    short = await rerank(client, "m3", documents=["near vectors"], score_by="dense")

    assert cut.json()["results"][0]["relevance_score"] == pytest.approx(short.json()["results"][0]["relevance_score"])
    assert cut.headers["x-gateway-truncated"] == "0"
    refusing = await rerank(client, "m3", documents=["near vectors mean"], max_tokens_per_doc=2, truncate=False)
    assert refusing.status_code == 200


async def test_a_query_that_is_cut_makes_every_score_one_of_a_cut_pair(client: httpx.AsyncClient) -> None:
    response = await rerank(client, "colbert", query=" ".join(SENTENCES), documents=["fox", "Berlin"])

    assert response.headers["x-gateway-truncated"] == "0,1"


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("m3", {"query": "near " * 100}, f"maximum context length is {MAX_TOKENS} tokens, however query[0] has"),
        (
            "m3",
            {"documents": ["fox", "near " * 100]},
            f"maximum context length is {MAX_TOKENS} tokens, however documents[1]",
        ),
        ("colbert", {"query": " ".join(SENTENCES)}, "maximum context length is 12 tokens, however query[0] has"),
    ],
)
async def test_long_texts_are_refused_if_truncate_is_false(
    client: httpx.AsyncClient, model: str, fields: dict[str, Any], message: str
) -> None:
    response = await rerank(client, model, truncate=False, **fields)

    assert response.status_code == 400
    assert message in response.json()["message"]


@pytest.mark.parametrize(
    ("model", "score_by", "message"),
    [
        ("colbert", "dense", "`score_by` asks for dense, but model 'colbert' returns only: multivector"),
        (
            "splade",
            ["sparse", "multivector"],
            "`score_by` asks for multivector, but model 'splade' returns only: sparse",
        ),
        ("m3", "states", "`score_by` must be one or more of `dense`, `sparse`, `multivector`"),
        ("m3", [], "`score_by` must be one or more of"),
        ("m3", {"dense": 0}, "`score_by` must be one or more of"),
        ("m3", {"dense": True}, "`score_by` must be one or more of"),
        ("m3", {"dense": "much"}, "`score_by` must be one or more of"),
        ("m3", 3, "`score_by` must be one or more of"),
        (
            "dense",
            None,
            "model 'dense' embeds texts and does not rerank; models that rerank: m3, weighted, colbert, splade",
        ),
    ],
)
async def test_an_output_that_a_model_cannot_score_by_is_a_400(
    client: httpx.AsyncClient, model: str, score_by: object, message: str
) -> None:
    response = await rerank(client, model, score_by=score_by)

    assert response.status_code == 400
    assert message in response.json()["message"]


async def test_tei_gets_the_same_scores_in_its_form(client: httpx.AsyncClient) -> None:
    right = await scores(client, "colbert")

    response = await client.post("/tei/colbert/rerank", json={"query": QUERY, "texts": DOCUMENTS})

    assert {one["index"]: one["score"] for one in response.json()} == pytest.approx(dict(enumerate(right)), abs=1e-5)


# ------------------------------------------------------------------------------------ models without a dense output


async def test_a_sparse_encoder_answers_sparse_vectors_for_queries_and_documents(
    client: httpx.AsyncClient,
    inference_free: Path,
) -> None:
    model = SparseEncoder(str(inference_free), device="cpu")
    for task, encode in (("query", model.encode_query), ("document", model.encode_document)):
        right = encode([QUERY], convert_to_sparse_tensor=False)[0].numpy()

        [row] = (await embed(client, "splade", [QUERY], "sparse", task=task))["data"]

        assert "embedding" not in row
        found = np.zeros(len(right))
        found[row["sparse"]["indices"]] = row["sparse"]["values"]
        np.testing.assert_allclose(found, right, atol=1e-5)


async def test_tei_gets_sparse_vectors_too(client: httpx.AsyncClient) -> None:
    [row] = (await embed(client, "splade", ["fox"], "sparse"))["data"]

    response = await client.post("/tei/splade/embed_sparse", json={"inputs": "fox"})

    assert [one["index"] for one in response.json()[0]] == row["sparse"]["indices"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/v1/embeddings",
            {},
            "`outputs` asks for dense (as a request without it does), but model 'colbert' returns only: multiv",
        ),
        (
            "/v1/embeddings",
            {"outputs": ["dense", "sparse"]},
            "`outputs` asks for dense, sparse, but model 'colbert' returns only",
        ),
        (
            "/v1/embeddings",
            {"outputs": "multivector", "dimensions": 24},
            "`dimensions` is 24, which sets the size of dense vectors, but model 'colbert' has none",
        ),
        ("/tei/colbert/embed_all", {}, "model 'colbert' has no token states; it returns: multivector"),
        (
            "/tei/colbert/embed",
            {},
            "`outputs` asks for dense (as a request without it does), but model 'colbert' returns only",
        ),
    ],
)
async def test_dense_vectors_of_a_model_without_any_are_a_400(
    client: httpx.AsyncClient, path: str, body: dict[str, object], message: str
) -> None:
    response = await client.post(path, json={"model": "colbert", "input": "fox", "inputs": "fox", **body})

    assert response.status_code in (400, 424)
    assert message in response.text.replace("\\", "")


async def test_cards_and_spaces_list_the_outputs_of_a_model(client: httpx.AsyncClient) -> None:
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    spaces = (await client.get("/v1/spaces")).json()["data"]

    card = cards["colbert"]
    assert (card["kind"], card["width"], card["dimensions"], card["outputs"]) == ("embed", None, [], ["multivector"])
    assert (card["default_task"], card["rerank"]) == ("retrieval.passage", {"multivector": 1.0})
    assert cards["m3"]["rerank"] == dict.fromkeys(ALL, 1.0)
    assert cards["weighted"]["rerank"] == {"dense": 0.4, "sparse": 0.2, "multivector": 0.4}
    assert cards["dense"]["rerank"] == {}
    [space] = [space for space in spaces if space["id"] == card["space"]]
    assert (space["dimensions"], space["outputs"], space["pooling"]) == (None, ["multivector"], "colbert")


async def test_a_request_without_a_model_gets_the_only_one_that_reranks(
    stanford: Path, make_family: Callable[..., Path], connect: Connect
) -> None:
    client = await connect(entry("colbert", stanford), entry("dense", make_family("bert")))

    response = await client.post("/v1/rerank", json={"query": QUERY, "documents": ["fox"]})

    assert response.json()["model"] == "colbert"


async def test_the_registry_cannot_name_an_output_that_is_not_served(m3: Path) -> None:
    with pytest.raises(LoadError, match="rerank names sparse, but the model's outputs are: dense"):
        plan_load(entry("m3", m3, rerank={"sparse": 1}))


async def test_a_name_with_a_space_reranks_by_vectors_of_that_space_alone(client: httpx.AsyncClient) -> None:
    space = (await client.get("/v1/models/m3")).json()["space"]
    own = space.rpartition("@")[2]

    assert np.array_equal(await scores(client, f"m3@{own}"), await scores(client, "m3"))
    refused = await rerank(client, "m3@000000000000")
    assert (refused.status_code, refused.json()["error"]["code"]) == (412, "space_mismatch")
    assert space in refused.json()["error"]["message"]
