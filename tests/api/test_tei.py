"""TEI's paths: its fields, limits, headers and errors, for the default model and for each by its path."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import numpy as np
import pytest

from gateway.api.tei_schema import MAX_CHARACTERS, MAX_IDS
from gateway.backends.fake import FakeBackend, fake_info
from gateway.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InternalError,
    Overloaded,
    RequestError,
    ShuttingDown,
    UnsupportedOutput,
)
from gateway.fleet import Model
from gateway.types import EmbedJob, ModelKind, ModelState, Output
from tests.tei_contract import ERROR, validate, validate_answer

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
MakeModel = Callable[..., Model]
VectorsOf = Callable[..., np.ndarray]

POST_PATHS = ["embed", "embed_sparse", "embed_all", "similarity", "tokenize", "decode"]
LONG = "a b c d e f g h i j"  # ten words; the models take eight


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def answer(response: httpx.Response, name: str) -> object:
    assert response.status_code == 200, response.text
    validate_answer(f"/{name}", 200, response.json())
    return response.json()


def error(response: httpx.Response, status: int, error_type: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    validate(ERROR, body)
    message = body["error"]
    assert body == {"error": message, "error_type": error_type, "message": message, "detail": message}
    return str(message)


class SilentBackend(FakeBackend):
    """Runs a model whose tokens it does not know."""

    def vocabulary(self) -> None:  # type: ignore[override]
        raise UnsupportedOutput("the tokens of this model are not known here")


@pytest.fixture
def sparse_model(make_model: MakeModel) -> Model:
    info = {"outputs": (Output.DENSE, Output.SPARSE)}
    return make_model("m3", backend=FakeBackend(fake_info("m3", **info)), **info)


# ------------------------------------------------------------------------------------------------------------ embed


@pytest.mark.parametrize("inputs", ["one text", ["one text"], ["one text", "", "another"]])
async def test_embed(client: httpx.AsyncClient, vectors_of: VectorsOf, inputs: str | list[str]) -> None:
    texts = [inputs] if isinstance(inputs, str) else inputs

    vectors = answer(await client.post("/embed", json={"inputs": inputs}), "embed")

    np.testing.assert_allclose(vectors, unit(vectors_of(texts, 8)), rtol=1e-5)


@pytest.mark.parametrize("name", ["embed", "embed_all"])
async def test_token_ids_of_the_model_are_read_as_their_text(client: httpx.AsyncClient, name: str) -> None:
    rows = (await client.post("/tokenize", json={"inputs": ["a b", "c"]})).json()
    ab, c = ([token["id"] for token in row] for row in rows)

    mixed = await client.post(f"/{name}", json={"inputs": [ab, "d", c]})
    single = await client.post(f"/{name}", json={"inputs": ab})

    texts = answer(await client.post(f"/{name}", json={"inputs": ["a b", "d", "c"]}), name)
    assert answer(mixed, name) == texts
    assert answer(single, name) == texts[:1]  # type: ignore[index]
    assert mixed.headers["x-compute-characters"] == str(len("a bdc"))


async def test_too_many_token_ids_are_refused(client: httpx.AsyncClient) -> None:
    assert str(MAX_IDS) in error(await client.post("/embed", json={"inputs": [1] * (MAX_IDS + 1)}), 422, "Validation")


@pytest.mark.parametrize(
    "path",
    [
        "/tei/team/small/embed",
        "/tei/team%2Fsmall/embed",
        "/tei/owner/team-small/embed",
        "/tei//team/small//embed/",
    ],
)
async def test_the_path_names_the_model(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"inputs": "x"})

    vectors = answer(response, "embed")
    assert np.shape(vectors) == (1, 10)
    assert np.linalg.norm(vectors) == pytest.approx(1)  # by TEI's default, though the model does not by itself
    assert response.headers["x-gateway-model"] == "team/small"


BODIES: dict[str, dict[str, object]] = {
    "": {"inputs": "x"},
    "invocations": {"inputs": "x"},
    "embed": {"inputs": "x"},
    "embed_all": {"inputs": "x"},
    "similarity": {"inputs": {"source_sentence": "x", "sentences": ["y"]}},
    "tokenize": {"inputs": "x"},
    "decode": {"ids": [1]},
}


@pytest.mark.parametrize("name", BODIES)
async def test_at_the_root_the_body_may_name_the_model(client: httpx.AsyncClient, name: str) -> None:
    named = await client.post(f"/{name}", json={**BODIES[name], "model": "jina"})
    unknown = await client.post(f"/{name}", json={**BODIES[name], "model": "nonsense"})
    blank = await client.post(f"/{name}", json={**BODIES[name], "model": ""})

    assert (named.status_code, named.headers["x-gateway-model"]) == (200, "jina")
    assert (blank.status_code, blank.headers["x-gateway-model"]) == (200, "mini")
    assert "nonsense" in error(unknown, 404, "Validation")


async def test_the_name_in_the_path_precedes_the_one_in_the_body(client: httpx.AsyncClient) -> None:
    """Clients that require a model's name send anything."""
    response = await client.post("/tei/jina/embed", json={"inputs": "x", "model": "any"})

    assert (response.status_code, response.headers["x-gateway-model"]) == (200, "jina")


async def test_normalize_false_gives_the_vectors_as_they_are_pooled(
    client: httpx.AsyncClient, vectors_of: VectorsOf
) -> None:
    response = await client.post("/embed", json={"inputs": "x", "normalize": False})

    np.testing.assert_allclose(answer(response, "embed"), vectors_of(["x"], 8), rtol=1e-6)


async def test_dimensions_are_cut_and_normalized_again(client: httpx.AsyncClient, vectors_of: VectorsOf) -> None:
    response = await client.post("/tei/jina/embed", json={"inputs": "x", "dimensions": 16})

    np.testing.assert_allclose(answer(response, "embed"), unit(vectors_of(["x"], 32)[:, :16]), rtol=1e-5)


@pytest.mark.parametrize("name", ["query", "retrieval.query"])
async def test_a_prompt_name_is_a_task(client: httpx.AsyncClient, name: str) -> None:
    response = await client.post("/tei/jina/embed", json={"inputs": "x", "prompt_name": name})

    answer(response, "embed")
    same = await client.post("/v1/embeddings", json={"input": "x", "model": "jina", "task": "retrieval.query"})
    assert response.headers["x-gateway-task"] == "retrieval.query"
    assert response.headers["x-gateway-space"] == same.headers["x-gateway-space"]


async def test_an_unknown_prompt_name_gets_the_known_ones(client: httpx.AsyncClient) -> None:
    response = await client.post("/tei/jina/embed", json={"inputs": "x", "prompt_name": "nonsense"})

    message = error(response, 422, "Validation")
    assert "nonsense" in message
    assert "retrieval.passage" in message


@pytest.mark.parametrize("fields", [{}, {"truncate": None}, {"truncate": True, "truncation_direction": "Left"}])
async def test_a_long_text_is_cut_unless_the_request_says_no(client: httpx.AsyncClient, fields: dict) -> None:
    response = await client.post("/embed", json={"inputs": ["x", LONG], **fields})

    answer(response, "embed")
    assert response.headers["x-gateway-truncated"] == "1"
    assert response.headers["x-compute-tokens"] == "9"


async def test_truncate_false_refuses_a_long_text(client: httpx.AsyncClient) -> None:
    response = await client.post("/embed", json={"inputs": LONG, "truncate": False})

    assert "8 tokens" in error(response, 422, "Validation")


async def test_headers_have_the_time_and_tokens_of_a_request(client: httpx.AsyncClient) -> None:
    response = await client.post("/embed", json={"inputs": ["one two", "three"]})

    assert response.headers["x-compute-characters"] == "12"
    assert response.headers["x-compute-tokens"] == "3"
    for name in ("x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"):
        assert int(response.headers[name]) >= 0
    assert response.headers["x-gateway-space"]
    assert response.headers["x-request-id"]


# --------------------------------------------------------------------------------------------- sparse, all, similarity


async def test_embed_sparse(connect: Connect, sparse_model: Model) -> None:
    client = await connect(sparse_model, aliases={"default": "m3"})

    response = await client.post("/embed_sparse", json={"inputs": ["a", "b"]})

    row = [{"index": 3, "value": 0.5}, {"index": 70_000, "value": 0.25}]
    assert answer(response, "embed_sparse") == [row, row]
    assert response.headers["x-gateway-space"]
    assert response.headers["x-compute-tokens"] == "2"


async def test_embed_sparse_of_a_model_without_weights_is_tei_s_424(client: httpx.AsyncClient) -> None:
    assert "dense" in error(await client.post("/embed_sparse", json={"inputs": "a"}), 424, "Backend")


@pytest.mark.parametrize("path", ["/embed_all", "/tei/team/small/embed_all"])
async def test_embed_all(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"inputs": ["a b", "c"]})

    assert answer(response, "embed_all") == [[[0, 1], [1, 1]], [[0, 1]]]
    assert response.headers["x-compute-tokens"] == "3"


async def test_states_are_in_their_own_space(client: httpx.AsyncClient) -> None:
    dense = (await client.post("/embed", json={"inputs": "a"})).headers["x-gateway-space"]
    states = (await client.post("/embed_all", json={"inputs": "a"})).headers["x-gateway-space"]

    refused = await client.post("/embed_all", json={"inputs": "a"}, headers={"x-gateway-expect-space": dense})
    same = await client.post("/embed_all", json={"inputs": "a"}, headers={"x-gateway-expect-space": states})

    assert dense != states
    error(refused, 412, "Validation")
    answer(same, "embed_all")


async def test_embed_all_has_its_own_limit(connect: Connect) -> None:
    client = await connect(max_token_vectors=4)

    enough = await client.post("/embed_all", json={"inputs": ["a b", "c d"]})
    too_many = await client.post("/embed_all", json={"inputs": ["a b", "c d", "e"]})
    dense = await client.post("/embed", json={"inputs": ["a b", "c d", "e"]})

    answer(enough, "embed_all")
    assert "5 tokens together, but the limit" in error(too_many, 422, "Validation")
    answer(dense, "embed")


async def test_embed_all_of_a_model_that_runs_elsewhere_is_a_424(connect: Connect, make_model: MakeModel) -> None:
    client = await connect(make_model("far", has_states=False), aliases={"default": "far"})

    assert "un-pooled" in error(await client.post("/embed_all", json={"inputs": "a"}), 424, "Backend")


async def test_states_are_not_an_output_of_openai_s_path(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/embeddings", json={"input": "a", "outputs": ["states"]})

    assert response.status_code == 400
    cards = (await client.get("/v1/models")).json()["data"]
    assert all("states" not in card["outputs"] for card in cards)


@pytest.mark.parametrize("path", ["/similarity", "/tei/jina/similarity"])
async def test_similarity_is_the_cosine(client: httpx.AsyncClient, vectors_of: VectorsOf, path: str) -> None:
    body = {"inputs": {"source_sentence": "a", "sentences": ["b", "a"]}}

    response = await client.post(path, json=body)

    a, b = unit(vectors_of(["a", "b"], 32 if "jina" in path else 8))
    np.testing.assert_allclose(answer(response, "similarity"), [a @ b, 1], rtol=1e-5)
    assert response.headers["x-compute-tokens"] == "3"


async def test_parameters_of_similarity(client: httpx.AsyncClient) -> None:
    inputs = {"source_sentence": LONG, "sentences": ["b"]}
    refused = await client.post("/similarity", json={"inputs": inputs, "parameters": {"truncate": False}})
    asked = await client.post("/tei/jina/similarity", json={"inputs": inputs, "parameters": {"prompt_name": "query"}})

    error(refused, 422, "Validation")
    assert asked.headers["x-gateway-task"] == "retrieval.query"


@pytest.mark.parametrize("inputs", ["a", {}, {"source_sentence": "a"}, {"source_sentence": 1, "sentences": ["a"]}])
async def test_wrong_inputs_of_similarity(client: httpx.AsyncClient, inputs: object) -> None:
    error(await client.post("/similarity", json={"inputs": inputs}), 422, "Validation")


# ----------------------------------------------------------------------------------------------------------- tokens


async def test_tokenize_returns_each_token_s_position(client: httpx.AsyncClient) -> None:
    response = await client.post("/tokenize", json={"inputs": "né  b"})

    assert answer(response, "tokenize") == [
        [
            {"id": 0, "text": "[S]", "special": True, "start": None, "stop": None},
            {"id": 1, "text": "né", "special": False, "start": 0, "stop": 2},
            {"id": 2, "text": "b", "special": False, "start": 4, "stop": 5},
        ]
    ]
    assert response.headers["x-gateway-model"] == "mini"


async def test_tokenize_without_special_tokens(client: httpx.AsyncClient) -> None:
    response = await client.post("/tokenize", json={"inputs": ["a", ""], "add_special_tokens": False})

    rows = answer(response, "tokenize")
    assert [[token["text"] for token in row] for row in rows] == [["a"], []]  # type: ignore[attr-defined]


async def test_tokenize_with_a_prompt(client: httpx.AsyncClient) -> None:
    body = {"inputs": "a", "prompt_name": "query", "add_special_tokens": False}

    rows = answer(await client.post("/tei/jina/tokenize", json=body), "tokenize")

    assert [token["text"] for token in rows[0]] == ["query:", "a"]  # type: ignore[index]


async def test_decode_is_the_way_back(client: httpx.AsyncClient) -> None:
    rows = (await client.post("/tokenize", json={"inputs": ["a b", "c"]})).json()
    ids = [[token["id"] for token in row] for row in rows]

    assert answer(await client.post("/decode", json={"ids": ids}), "decode") == ["a b", "c"]
    assert answer(await client.post("/decode", json={"ids": ids[0]}), "decode") == ["a b"]
    kept = await client.post("/decode", json={"ids": ids[0], "skip_special_tokens": False})
    assert answer(kept, "decode") == ["[S] a b"]
    unknown = await client.post("/decode", json={"ids": [1, 4_000_000_000]})
    assert answer(unknown, "decode") == ["a"]


@pytest.mark.parametrize("ids", ["1", [1, [2]], [-1], [2**32], [1.5], ["a"], [True]])
async def test_wrong_ids(client: httpx.AsyncClient, ids: object) -> None:
    assert "`ids` must be" in error(await client.post("/decode", json={"ids": ids}), 422, "Validation")


async def test_a_request_for_a_huge_answer_is_refused(client: httpx.AsyncClient) -> None:
    long = await client.post("/tokenize", json={"inputs": ["a" * MAX_CHARACTERS, "b"]})
    many = await client.post("/decode", json={"ids": [1] * (MAX_IDS + 1)})

    assert str(MAX_CHARACTERS) in error(long, 422, "Validation")
    assert str(MAX_IDS) in error(many, 422, "Validation")


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"inputs": "a"}), ("/decode", {"ids": [1]})])
async def test_a_backend_that_cannot_tell_its_tokens(
    connect: Connect, make_model: MakeModel, path: str, body: dict
) -> None:
    client = await connect(make_model(backend=SilentBackend(fake_info("mini"))), aliases={"default": "mini"})

    assert "not known" in error(await client.post(path, json=body), 424, "Backend")


# ------------------------------------------------------------------------------------------------------- info, health


async def test_info(connect: Connect) -> None:
    client = await connect(max_inputs=7)

    response = await client.get("/tei/team/small/info")

    body = answer(response, "info")
    assert isinstance(body, dict)
    assert body["served_model_name"] == "team/small"
    assert body["model_sha"] == "0" * 40
    assert body["max_client_batch_size"] == 7
    assert body["max_input_length"] == 256
    assert body["auto_truncate"] is True
    assert body["model_type"] == {"embedding": {"pooling": "mean"}}
    assert response.headers["x-gateway-space"]
    assert answer(await client.get("/info"), "info")["served_model_name"] == "mini"  # type: ignore[index]


async def test_health_of_a_model_needs_no_key(connect: Connect, make_model: MakeModel) -> None:
    client = await connect(
        make_model("up"), make_model("down", state=ModelState.LOADING), aliases={}, api_keys=["sk-one"]
    )

    assert (await client.get("/tei/up/health")).status_code == 200
    error(await client.get("/tei/down/health"), 503, "Unhealthy")
    error(await client.get("/tei/none/health"), 404, "Validation")


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("path", [path for path in POST_PATHS if path != "similarity"])
async def test_an_empty_batch_is_a_400(client: httpx.AsyncClient, path: str) -> None:
    error(await client.post(f"/{path}", json={"inputs": [], "ids": []}), 400, "Empty")


async def test_nothing_to_compare_with_is_a_400(client: httpx.AsyncClient) -> None:
    error(await client.post("/similarity", json={"inputs": {"source_sentence": "a", "sentences": []}}), 400, "Empty")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("embed", {"inputs": ["a"] * 3}),
        ("embed_sparse", {"inputs": ["a"] * 3}),
        ("embed_all", {"inputs": ["a"] * 3}),
        ("tokenize", {"inputs": ["a"] * 3}),
        ("decode", {"ids": [[1]] * 3}),
        ("similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"] * 2}}),
    ],
)
async def test_a_batch_that_is_too_large(connect: Connect, path: str, body: dict) -> None:
    client = await connect(max_inputs=2)

    message = error(await client.post(f"/{path}", json=body), 422, "Validation")

    assert "batch size 3 > maximum allowed batch size 2" in message


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": 1},
        {"inputs": [["a"]]},
        {"inputs": [1, "a"]},
        {"inputs": [-1]},
        {"inputs": [2**32]},
        {"inputs": {"text": "a"}},
        {"inputs": "a", "truncate": "middle"},
        {"inputs": "a", "truncation_direction": "up"},
        {"inputs": "a", "normalize": 2},
        {"inputs": "a", "dimensions": 0},
        {"inputs": "a", "dimensions": 5},
        {"inputs": "a", "prompt_name": 1},
    ],
    ids=str,
)
async def test_wrong_fields_of_embed(client: httpx.AsyncClient, body: dict) -> None:
    error(await client.post("/embed", json=body), 422, "Validation")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
async def test_a_body_that_is_not_an_object(client: httpx.AsyncClient, content: bytes) -> None:
    error(await client.post("/tei/jina/embed", content=content), 422, "Validation")


@pytest.mark.parametrize(
    ("raised", "status", "error_type"),
    [
        (Overloaded("the queue is full", retry_after_s=3), 429, "Overloaded"),
        (InferenceFailed("the forward failed"), 424, "Backend"),
        (InternalError("something"), 500, "Backend"),
        (ShuttingDown("stopping", retry_after_s=5), 503, "Unhealthy"),
        (DeadlineExceeded("too late"), 504, "Backend"),
    ],
)
async def test_errors_of_the_backend(
    connect: Connect, make_model: MakeModel, raised: RequestError, status: int, error_type: str
) -> None:
    def fail(_job: EmbedJob) -> None:
        raise raised

    client = await connect(
        make_model(backend=FakeBackend(fake_info("mini"), on_embed=fail)), aliases={"default": "mini"}
    )

    response = await client.post("/embed", json={"inputs": "a"})

    assert error(response, status, error_type) == raised.message
    assert response.headers.get("retry-after") == (str(raised.retry_after_s) if raised.retry_after_s else None)


async def test_errors_before_the_dialect_have_its_form_too(connect: Connect) -> None:
    client = await connect(api_keys=["sk-one"], max_body_bytes=1024)
    key = {"authorization": "Bearer sk-one"}

    error(await client.post("/embed", json={"inputs": "a"}), 401, "Validation")
    error(await client.get("/embed", headers=key), 405, "Validation")
    error(await client.post("/embed", json={"inputs": "a" * 2000}, headers=key), 413, "Validation")
    error(await client.post("/tei/nothing/embed", json={"inputs": "a"}, headers=key), 404, "Validation")
    error(await client.post("/tei/mini/nothing", json={"inputs": "a"}, headers=key), 404, "Validation")
    wrong_space = {**key, "x-gateway-expect-space": "other@000000000000"}
    error(await client.post("/embed", json={"inputs": "a"}, headers=wrong_space), 412, "Validation")


async def test_quotas_count_every_path(connect: Connect) -> None:
    client = await connect(requests_per_minute=len(POST_PATHS))
    body = {"inputs": "a", "ids": [1]}

    for path in POST_PATHS:
        assert (await client.post(f"/{path}", json=body)).status_code != 429
    error(await client.post("/embed", json=body), 429, "Overloaded")


async def test_without_a_default_model_the_root_asks_for_one(connect: Connect, models: list[Model]) -> None:
    client = await connect(*models, aliases={})

    error(await client.post("/embed", json={"inputs": "a"}), 422, "Validation")
    error(await client.get("/info"), 422, "Validation")


async def test_many_at_a_time_each_get_their_own_tokens(client: httpx.AsyncClient) -> None:
    async def tokens(word: str) -> list[str]:
        response = await client.post("/tokenize", json={"inputs": word, "add_special_tokens": False})
        return [token["text"] for token in response.json()[0]]

    words = [f"w{i}" for i in range(30)]
    assert await asyncio.gather(*map(tokens, words)) == [[word] for word in words]


async def test_openai_s_form_below_a_model_s_path(client: httpx.AsyncClient) -> None:
    """Clients that use it with TEI send no model, or a made-up one."""
    response = await client.post("/tei/team/small/v1/embeddings", json={"input": "a", "model": "tei"})

    assert response.json()["model"] == "team/small"
    wrong = await client.post("/tei/team/small/v1/embeddings", json={})
    assert wrong.json()["error"]["code"] == "invalid_input"


# --------------------------------------------------------------------------------------------------- the root, SageMaker


@pytest.fixture
async def mixed(connect: Connect, models: list[Model], make_model: MakeModel) -> httpx.AsyncClient:
    """Return a client of a gateway with models that embed, and one that reranks."""
    ranks = {"width": 1, "dimensions": (1,), "max_tokens": 8, "kind": ModelKind.RERANK}
    return await connect(*models, make_model("team/ranker", backend=FakeBackend(fake_info("r", **ranks)), **ranks))


@pytest.mark.parametrize("path", ["/", "/invocations", "/tei/mini", "/tei/mini/", "/tei/mini/invocations"])
async def test_the_address_alone_embeds(mixed: httpx.AsyncClient, vectors_of: VectorsOf, path: str) -> None:
    """`HuggingFaceEndpointEmbeddings(model="http://host:8080")` and SageMaker send such requests."""
    vectors = answer(await mixed.post(path, json={"inputs": ["a", "b c"], "normalize": True}), "embed")

    np.testing.assert_allclose(vectors, unit(vectors_of(["a", "b c"], 8)), rtol=1e-5)


@pytest.mark.parametrize("path", ["/tei/team/ranker", "/tei/team%2Franker", "/tei/team/ranker/invocations"])
async def test_the_address_of_a_reranker_reranks(mixed: httpx.AsyncClient, path: str) -> None:
    body = {"query": "fox", "texts": ["dog", "a fox"], "return_text": True}

    results = answer(await mixed.post(path, json=body), "rerank")

    assert [result["text"] for result in results] == ["a fox", "dog"]  # type: ignore[attr-defined]


async def test_the_root_of_a_gateway_that_only_reranks_reranks(connect: Connect, make_model: MakeModel) -> None:
    ranks = {"width": 1, "dimensions": (1,), "kind": ModelKind.RERANK}
    ranker = make_model("ranker", backend=FakeBackend(fake_info("r", **ranks)), **ranks)
    client = await connect(ranker, aliases={})

    assert len(answer(await client.post("/", json={"query": "a", "texts": ["b", "c"]}), "rerank")) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/", {}, 422, "`inputs` is required"),
        ("/", {"inputs": []}, 400, "cannot be empty"),
        ("/invocations", {"query": "a", "texts": ["b"]}, 422, "`inputs` is required"),
        ("/tei/team/ranker", {"inputs": "a"}, 422, "`texts` is required"),
        ("/tei/nothing", {"inputs": "a"}, 404, "no model is called 'nothing'"),
        ("/tei/mini/similar", {"inputs": "a"}, 404, "no such path: /tei/mini/similar"),
        ("/tei/mini/predict", {"inputs": "a"}, 424, "'mini' embeds texts and does not classify"),
        ("/tei/mini/info", {"inputs": "a"}, 405, "use GET"),
    ],
)
async def test_errors_of_an_address_are_tei_s(
    mixed: httpx.AsyncClient, path: str, body: dict, status: int, message: str
) -> None:
    response = await mixed.post(path, json=body)

    assert response.status_code == status, response.text
    validate(ERROR, response.json())
    assert message in response.json()["error"]


@pytest.mark.parametrize("path", ["/tei/mini", "/tei/mini/nothing"])
async def test_reading_an_address_gets_the_right_paths(mixed: httpx.AsyncClient, path: str) -> None:
    assert (await mixed.get(path)).status_code == 404


async def test_a_key_is_asked_for_at_an_address_too(connect: Connect) -> None:
    client = await connect(api_keys="sk-right-key")

    for path in ("/", "/invocations", "/tei/mini"):
        error(await client.post(path, json={"inputs": "a"}), 401, "Validation")
        answer(await client.post(path, json={"inputs": "a"}, headers={"x-api-key": "sk-right-key"}), "embed")


async def test_the_last_token_s_pooling_has_tei_s_name(connect: Connect, make_model: MakeModel) -> None:
    client = await connect(make_model("mini", pooling="lasttoken"), aliases={})

    body = answer(await client.get("/tei/mini/info"), "info")

    assert body["model_type"] == {"embedding": {"pooling": "last_token"}}  # type: ignore[index]
