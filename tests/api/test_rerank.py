"""Rerank over HTTP: each client's shape, each rule of the request, and the permissions of keys."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from gateway.access.keyring import key_digest
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Arm, Experiment
from gateway.errors import InferenceFailed
from gateway.fleet import Model
from gateway.types import EmbedJob, ModelKind, ModelState, Truncate

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
MakeModel = Callable[..., Model]

QUERY = "red fox"
# The fake's scores against the query: 0, 1, -1, 0, -1.
DOCUMENTS = ["a red car", "a red fox", "", "fox hunt", "dogs"]
ORDER = [1, 0, 3, 2, 4]
SCORES = {0: 0.0, 1: 1.0, 2: -1.0, 3: 0.0, 4: -1.0}
LONG = "one two three four five six seven"
PATHS = ["/v1/rerank", "/v2/rerank", "/v1/v2/rerank", "/rerank"]


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


@pytest.fixture
def jobs() -> list[EmbedJob]:
    """The requests that the reranker received."""
    return []


@pytest.fixture
def make_ranker(make_model: MakeModel, jobs: list[EmbedJob]) -> MakeModel:
    """Return a function that makes a model that scores pairs by the words that they share."""

    def make(model_id: str = "ranker", on_embed: Callable[[EmbedJob], None] = jobs.append, **changes: Any) -> Model:
        info = {"width": 1, "dimensions": (1,), "max_tokens": 8, "kind": ModelKind.RERANK}
        backend = FakeBackend(fake_info(model_id, **info), on_embed=on_embed)
        return make_model(model_id, backend=backend, **{**info, **changes})

    return make


@pytest.fixture
async def client(connect: Connect, models: list[Model], make_ranker: MakeModel) -> httpx.AsyncClient:
    """Return a client of a gateway with one reranker and the models that embed."""
    return await connect(*models, make_ranker())


async def rerank(client: httpx.AsyncClient, path: str = "/v1/rerank", **body: Any) -> httpx.Response:
    """Send the body, with a query and documents if it has none."""
    given = {"query": QUERY, **({} if "texts" in body else {"documents": DOCUMENTS}), **body}
    return await client.post(path, json={name: value for name, value in given.items() if value != "absent"})


def results_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    content = response.json()
    results: list[dict[str, Any]] = content if isinstance(content, list) else content["results"]
    return results


async def test_a_model_without_vectors_has_no_space_to_expect(
    client: httpx.AsyncClient, check_error: Callable[..., str]
) -> None:
    message = check_error(await rerank(client, model="ranker@000000000000"), 400, "invalid_input", param="model")

    assert message == "model 'ranker' returns no vectors, so it has no space: remove `@000000000000`"


# ----------------------------------------------------------------------------------------------------------- answers


async def test_the_answer_has_the_fields_of_every_client(client: httpx.AsyncClient) -> None:
    response = await rerank(client, model="ranker")

    content = response.json()
    assert content == {
        "id": response.headers["x-request-id"],
        "object": "rerank",
        "model": "ranker",
        "results": [
            {"index": i, "relevance_score": pytest.approx(sigmoid(SCORES[i])), "document": {"text": DOCUMENTS[i]}}
            for i in ORDER
        ],
        "usage": {"prompt_tokens": 19, "total_tokens": 19},
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }


async def test_the_headers_are_those_of_embeddings(client: httpx.AsyncClient) -> None:
    response = await rerank(client, documents=["fox", LONG, "dog", LONG], truncate=True)

    assert response.headers["x-gateway-model"] == "ranker"
    assert response.headers["x-gateway-truncated"] == "1,3"
    assert re.fullmatch(r"(\w+;dur=[0-9.]+(, )?){5}", response.headers["server-timing"])
    assert "x-gateway-space" not in response.headers


@pytest.mark.parametrize("path", [*PATHS, "/v1/rerank/", "//rerank", "/v2//rerank/"])
async def test_every_path_ranks_alike(client: httpx.AsyncClient, path: str) -> None:
    url = httpx.URL("http://gateway", raw_path=path.encode())

    results = results_of(await client.post(url, json={"query": QUERY, "documents": DOCUMENTS}))

    assert [result["index"] for result in results] == ORDER
    assert [result["relevance_score"] for result in results] == pytest.approx([sigmoid(SCORES[i]) for i in ORDER])


@pytest.mark.parametrize(
    ("path", "asked", "document"),
    [
        ("/v1/rerank", {}, {"text": "a red fox"}),
        ("/v1/rerank", {"return_documents": None}, {"text": "a red fox"}),
        ("/v1/rerank", {"return_documents": False}, None),
        ("/v2/rerank", {}, None),
        ("/v2/rerank", {"return_documents": True}, {"text": "a red fox"}),
        ("/v1/v2/rerank", {}, None),
        ("/v1/v2/rerank", {"return_documents": True}, {"text": "a red fox"}),
        ("/rerank", {}, None),
        ("/rerank", {"return_documents": False}, None),
        ("/rerank", {"return_documents": True}, "a red fox"),
        ("/rerank", {"return_text": True}, "a red fox"),
    ],
)
async def test_a_document_is_shown_as_each_client_reads_it(
    client: httpx.AsyncClient, path: str, asked: dict[str, Any], document: object
) -> None:
    best = results_of(await rerank(client, path, **asked))[0]

    assert best.get("document") == document
    assert ("document" in best) == (document is not None)


async def test_documents_may_be_objects(client: httpx.AsyncClient) -> None:
    documents = [{"text": text, "title": "ignored"} for text in DOCUMENTS[:2]] + DOCUMENTS[2:]

    results = results_of(await rerank(client, documents=documents, rank_fields=["title"], max_chunks_per_doc=3))

    assert [(result["index"], result["document"]) for result in results] == [(i, {"text": DOCUMENTS[i]}) for i in ORDER]


@pytest.mark.parametrize("path", PATHS)
async def test_texts_get_the_bare_list_of_tei(client: httpx.AsyncClient, path: str) -> None:
    response = await rerank(client, path, texts=DOCUMENTS)

    assert response.json() == [{"index": i, "score": pytest.approx(sigmoid(SCORES[i]))} for i in ORDER]
    assert response.headers["x-gateway-model"] == "ranker"


@pytest.mark.parametrize("field", ["return_text", "return_documents"])
async def test_tei_shows_texts_when_asked(client: httpx.AsyncClient, field: str) -> None:
    results = results_of(await rerank(client, "/rerank", texts=DOCUMENTS, raw_scores=True, **{field: True}))

    assert results == [{"index": i, "score": SCORES[i], "text": DOCUMENTS[i]} for i in ORDER]


@pytest.mark.parametrize(("raw", "expected"), [(True, 1.0), (False, sigmoid(1)), (None, sigmoid(1))])
async def test_raw_scores_are_before_the_sigmoid(client: httpx.AsyncClient, raw: bool | None, expected: float) -> None:
    best = results_of(await rerank(client, raw_scores=raw))[0]

    assert best["relevance_score"] == pytest.approx(expected)


@pytest.mark.parametrize(("top_n", "num_results"), [(None, 5), (1, 1), (2.0, 2), (5, 5), (6, 5), (10**12, 5)])
async def test_top_n_is_clamped(client: httpx.AsyncClient, top_n: float | None, num_results: int) -> None:
    results = results_of(await rerank(client, top_n=top_n))

    assert [result["index"] for result in results] == ORDER[:num_results]


async def test_huge_scores_do_not_overflow(connect: Connect, make_ranker: MakeModel) -> None:
    client = await connect(make_ranker(), aliases={})
    words = " ".join(f"w{i}" for i in range(1500))

    results = results_of(await rerank(client, query=words, documents=[words, "x"], return_documents=False))

    assert [result["relevance_score"] for result in results] == [1.0, pytest.approx(sigmoid(-1))]


# ---------------------------------------------------------------------------------------------------------- requests


async def test_null_means_absent_and_unknown_fields_are_ignored(client: httpx.AsyncClient) -> None:
    absent = dict.fromkeys(["model", "top_n", "return_documents", "truncate", "max_tokens_per_doc", "user", "texts"])

    response = await client.post(
        "/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS, **absent, "overlap_tokens": 3, "instruction": {}}
    )

    assert [result["index"] for result in results_of(response)] == ORDER


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"query": "absent"}, "query", "`query` is required"),
        ({"query": 3}, "query", "`query` must be a string, got the number 3"),
        ({"query": ["a"]}, "query", "`query` must be a string, got a list of 1"),
        ({"documents": "absent"}, "documents", "`documents` is required"),
        ({"documents": []}, "documents", "`documents` is an empty list; send at least one text"),
        ({"documents": "a"}, "documents", "`documents` must be a list of strings, got the string 'a'"),
        ({"documents": ["a", 3]}, "documents", '`documents[1]` must be a string or {"text": string}, got the number 3'),
        ({"documents": [{"title": "a"}]}, "documents", "`documents[0]` must be a string"),
        ({"documents": [{"text": 3}]}, "documents", "got an object with 'text'"),
        ({"documents": ["a"] * 2049}, "documents", "`documents` has 2049 items; the limit is 2048"),
        ({"top_n": 0}, "top_n", "`top_n` must be a positive integer, got the number 0"),
        ({"top_n": -1}, "top_n", "`top_n` must be a positive integer"),
        ({"top_n": 1.5}, "top_n", "`top_n` must be a positive integer"),
        ({"top_n": "one"}, "top_n", "`top_n` must be a positive integer"),
        ({"return_documents": "yes"}, "return_documents", "`return_documents` must be true or false"),
        ({"return_documents": True, "return_text": False}, "return_documents", "they mean the same"),
        ({"raw_scores": 2}, "raw_scores", "`raw_scores` must be true or false"),
        ({"truncate": "some"}, "truncate", "`truncate` must be true, false, `END`, `START`, `NONE`, `right` or `left`"),
        (
            {"truncate": "START", "truncation_direction": "Right"},
            "truncation_direction",
            "name different ends of a text",
        ),
        ({"truncation_direction": "up"}, "truncation_direction", "`truncation_direction` must be `Left` or `Right`"),
        ({"max_tokens_per_doc": 0}, "max_tokens_per_doc", "`max_tokens_per_doc` must be a positive integer"),
        ({"model": 3}, "model", "`model` must be a string"),
    ],
)
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient, check_error: CheckError, body: dict[str, Any], param: str, message: str
) -> None:
    assert message in check_error(await rerank(client, **body), 400, "invalid_input", param=param)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"query": NaN, "documents": ["a"]}'])
async def test_a_body_that_is_not_a_json_object_is_refused(
    client: httpx.AsyncClient, check_error: CheckError, content: bytes
) -> None:
    check_error(await client.post("/v2/rerank", content=content), 400, "invalid_input")


async def test_the_limit_of_inputs_is_a_setting(connect: Connect, make_ranker: MakeModel) -> None:
    client = await connect(make_ranker(), aliases={}, max_inputs=2)

    assert len(results_of(await rerank(client, documents=["a", "b"]))) == 2
    assert (await rerank(client, documents=["a", "b", "c"])).status_code == 400


async def test_long_texts_are_cut_unless_truncate_is_false(client: httpx.AsyncClient, check_error: CheckError) -> None:
    assert results_of(await rerank(client, "/rerank", texts=[LONG]))
    assert results_of(await rerank(client, "/rerank", texts=[LONG], truncate=True))

    refused = await rerank(client, "/rerank", documents=[LONG], truncate=False)

    assert "maximum context length is 8 tokens" in check_error(refused, 400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "truncate"),
    [
        ({}, Truncate.END),
        ({"truncation_direction": "Right"}, Truncate.END),
        ({"truncation_direction": "Left"}, Truncate.START),
        ({"truncate": False, "truncation_direction": "left"}, Truncate.REFUSE),
    ],
)
async def test_the_cut_texts_reach_the_model(
    client: httpx.AsyncClient, jobs: list[EmbedJob], fields: dict[str, Any], truncate: Truncate
) -> None:
    results_of(await rerank(client, **fields, documents=["a"]))

    assert [job.truncate for job in jobs] == [truncate]


async def test_a_limit_for_each_document_reaches_the_model(client: httpx.AsyncClient, jobs: list[EmbedJob]) -> None:
    response = await rerank(client, documents=[LONG], max_tokens_per_doc=2, truncate=False)

    assert response.json()["usage"]["total_tokens"] == 4
    assert [(job.query, job.max_text_tokens, job.truncate) for job in jobs] == [(QUERY, 2, Truncate.REFUSE)]


# --------------------------------------------------------------------------------------------------------------- TEI


@pytest.mark.parametrize("path", ["/tei/ranker/rerank", "/tei/owner/ranker/rerank", "/tei/owner%2Franker/rerank/"])
async def test_the_path_names_the_model(
    connect: Connect, models: list[Model], make_ranker: MakeModel, path: str
) -> None:
    client = await connect(*models, make_ranker(), make_ranker("other"))

    response = await rerank(client, path, texts=["a red fox", "dogs"], return_text=True, model="other")

    assert results_of(response) == [
        {"index": 0, "score": pytest.approx(sigmoid(1)), "text": "a red fox"},
        {"index": 1, "score": pytest.approx(sigmoid(-1)), "text": "dogs"},
    ]
    assert response.headers["x-gateway-model"] == "ranker"
    assert response.headers["x-compute-characters"] == str(2 * len(QUERY) + len("a red foxdogs"))
    assert response.headers["x-compute-tokens"] == "8"


TEI_PATHS = ["/rerank", "/tei/ranker/rerank"]


@pytest.mark.parametrize("path", TEI_PATHS)
@pytest.mark.parametrize(
    ("body", "status", "error_type", "message"),
    [
        ({"texts": []}, 400, "Empty", "`texts` is an empty list"),
        ({"texts": [None]}, 422, "Validation", "`texts[0]` must be a string"),
        ({"texts": "a"}, 422, "Validation", "`texts` must be a list of strings"),
        ({"texts": ["a"] * 2049}, 422, "Validation", "the limit is 2048"),
        ({"texts": ["a"], "documents": ["a"]}, 422, "Validation", "leave one out"),
        ({"texts": ["a"], "query": None}, 422, "Validation", "`query` is required"),
        ({"texts": [LONG], "truncate": False}, 422, "Validation", "maximum context length is 8 tokens"),
    ],
)
async def test_errors_of_tei_s_requests_are_tei_s(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, error_type: str, message: str
) -> None:
    response = await rerank(client, path, **body)

    assert (response.status_code, response.json()["error_type"]) == (status, error_type)
    assert message in response.json()["error"]


async def test_tei_s_path_takes_no_other_requests(client: httpx.AsyncClient) -> None:
    response = await rerank(client, "/tei/ranker/rerank", documents=["a"])

    assert (response.status_code, response.json()["error"]) == (422, "`texts` is required")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tei/mini/rerank", {"query": "a", "texts": ["a"]}),
        ("/tei/ranker/embed", {"inputs": "a"}),
        ("/tei/ranker/embed_sparse", {"inputs": "a"}),
        ("/tei/ranker/embed_all", {"inputs": "a"}),
        ("/tei/ranker/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}),
    ],
)
async def test_a_model_of_the_other_kind_is_tei_s_424(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    response = await client.post(path, json=body)

    assert (response.status_code, response.json()["error_type"]) == (424, "Backend")
    assert "does not" in response.json()["error"]


async def test_tei_s_description_of_a_reranker(client: httpx.AsyncClient) -> None:
    info = await client.get("/tei/ranker/info")
    tokens = await client.post("/tei/ranker/tokenize", json={"inputs": "a b"})

    assert info.json()["model_type"] == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    assert "x-gateway-space" not in info.headers
    assert [token["text"] for token in tokens.json()[0]] == ["[S]", "a", "b"]


# ------------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("model", ["ranker", "owner/ranker", "best", "", None])
async def test_a_reranker_is_accepted_by_any_name_or_none(
    connect: Connect, models: list[Model], make_ranker: MakeModel, model: str | None
) -> None:
    client = await connect(*models, make_ranker(), aliases={"default": "mini", "best": "ranker"})

    response = await rerank(client, model=model)

    assert response.json()["model"] == (model if model == "owner/ranker" else "ranker")


async def test_one_of_several_must_be_named(
    connect: Connect, models: list[Model], make_ranker: MakeModel, check_error: CheckError
) -> None:
    client = await connect(*models, make_ranker("one"), make_ranker("two"))

    message = check_error(await rerank(client), 400, "invalid_input", param="model")

    assert message == "`model` is required, as several models rerank: one, two"
    assert (await rerank(client, model="two")).json()["model"] == "two"


async def test_without_a_reranker_there_is_no_default(connect: Connect, check_error: CheckError) -> None:
    message = check_error(await rerank(await connect()), 400, "invalid_input", param="model")

    assert message == "no model in the registry reranks"


async def test_a_reranker_that_is_still_loading_is_waited_for(
    connect: Connect, make_ranker: MakeModel, check_error: CheckError
) -> None:
    client = await connect(make_ranker(state=ModelState.LOADING), aliases={}, has_started=False)

    for model in (None, "ranker"):
        response = await rerank(client, model=model)
        check_error(response, 503, "model_not_ready", type_="server_error")
        assert response.headers["retry-after"] == "5"


async def test_an_unknown_model_is_a_404(client: httpx.AsyncClient, check_error: CheckError) -> None:
    check_error(await rerank(client, model="unknown"), 404, "model_not_found", param="model")


async def test_a_model_of_the_other_kind_names_those_that_fit(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    ranked = await rerank(client, model="mini")
    embedded = await client.post("/v1/embeddings", json={"input": "a", "model": "ranker"})

    assert check_error(ranked, 400, "unsupported_output", param="model") == (
        "model 'mini' embeds texts and does not rerank; models that rerank: ranker"
    )
    assert check_error(embedded, 400, "unsupported_output", param="model") == (
        "model 'ranker' reranks texts and does not embed; models that embed: mini, jina, team/small"
    )


async def test_models_and_spaces_distinguish_the_kinds(client: httpx.AsyncClient) -> None:
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    spaces = (await client.get("/v1/spaces")).json()["data"]

    assert {name: card["kind"] for name, card in cards.items()} == {
        "mini": "embed",
        "jina": "embed",
        "team/small": "embed",
        "ranker": "rerank",
    }
    ranker = cards["ranker"]
    assert (ranker["width"], ranker["dimensions"], ranker["outputs"], ranker["space"]) == (None, [], [], None)
    assert (ranker["max_tokens"], ranker["device"], ranker["state"]) == (8, "cpu", "ready")
    assert "ranker" not in {member["model"] for space in spaces for member in space["members"]}


async def test_a_key_may_be_for_other_models(
    connect: Connect, models: list[Model], make_ranker: MakeModel, check_error: CheckError, tmp_path: Any
) -> None:
    file = tmp_path / "keys.yaml"
    rows = [("embeds", "mini"), ("ranks", "ranker")]
    lines = [f"- {{name: {name}, sha256: {key_digest(name)}, models: [{model}]}}\n" for name, model in rows]
    file.write_text("version: 1\nkeys:\n" + "".join(lines))
    client = await connect(*models, make_ranker(), api_keys_file=file)

    answers = [
        await client.post(
            "/v1/rerank",
            json={"query": QUERY, "documents": DOCUMENTS},
            headers={"authorization": f"Bearer {name}"},
        )
        for name in ("ranks", "embeds")
    ]

    assert answers[0].status_code == 200
    check_error(answers[1], 403, "model_not_allowed", param="model", type_="permission_error")


async def test_quotas_count_the_tokens_of_all_pairs(connect: Connect, make_ranker: MakeModel, tmp_path: Any) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"version: 1\nkeys:\n- {{name: a, sha256: {key_digest('key')}, tokens_per_minute: 100}}\n")
    client = await connect(make_ranker(), aliases={}, api_keys_file=file)
    client.headers["authorization"] = "Bearer key"

    response = await rerank(client)

    assert response.headers["x-ratelimit-remaining-tokens"] == str(100 - 19)


async def test_an_experiment_may_have_rerankers_for_arms(connect: Connect, make_ranker: MakeModel) -> None:
    experiment = Experiment(
        id="rank-exp",
        kind="cross_space",
        unit={"from": ("body:user",)},
        salt="s",
        arms=(Arm(model="one", weight=1), Arm(model="two", weight=1)),
    )
    client = await connect(make_ranker("one"), make_ranker("two"), aliases={}, experiments=[experiment])

    answers = [await rerank(client, model="rank-exp", user=f"user-{i}") for i in range(20)]

    assert {answer.headers["x-gateway-arm"] for answer in answers} == {"one", "two"}
    assert all(answer.json()["model"] == answer.headers["x-gateway-model"] for answer in answers)


async def test_a_failure_of_the_model_is_reported_and_counted(
    connect: Connect, make_ranker: MakeModel, check_error: CheckError
) -> None:
    def fail(_job: EmbedJob) -> None:
        raise InferenceFailed("it failed")

    client = await connect(make_ranker("broken-ranker", on_embed=fail), aliases={})

    def num_failures(counts: str) -> float:
        line = r'gateway_embed_requests_total\{.*model="broken-ranker",outcome="inference_failed".*\} (\d+\.0)'
        return sum(map(float, re.findall(line, counts)))

    before = num_failures((await client.get("/metrics")).text)  # of the same test, of a model on replicas

    check_error(await rerank(client), 500, "inference_failed", type_="server_error")

    counts = (await client.get("/metrics")).text
    assert num_failures(counts) == before + 1
    assert 'path="/v1/rerank"' in counts


# ----------------------------------------------------------------------------------------------- recorded requests


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/v2/rerank", {"top_n": 2, "max_tokens_per_doc": 64}, id="cohere ClientV2"),
        pytest.param(
            "/v1/rerank",
            {
                "documents": ["a red car", {"text": "a red fox"}],
                "top_n": 2,
                "rank_fields": ["text"],
                "return_documents": True,
                "max_chunks_per_doc": 10,
            },
            id="cohere Client",
        ),
        pytest.param("/rerank", {"top_n": 1, "return_documents": True}, id="LiteLLM infinity"),
        pytest.param("/v1/rerank", {"top_n": 1, "return_documents": True}, id="LiteLLM jina_ai, hosted_vllm"),
        pytest.param("/v1/rerank", {"top_n": len(DOCUMENTS)}, id="Open WebUI, pymilvus, Haystack"),
        pytest.param("/v1/rerank", {"top_n": None, "return_documents": True}, id="Dify"),
        pytest.param(
            "/rerank",
            {
                "raw_scores": False,
                "truncate": False,
                "truncation_direction": "Right",
                "top_n": 2,
                "texts": ["a red car", "a red fox"],
                "return_text": True,
            },
            id="LiteLLM huggingface",
        ),
    ],
)
async def test_the_requests_of_known_clients_are_answered(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    results = results_of(await rerank(client, path, model="ranker", **body))

    assert results[0]["index"] == 1
    assert len(results) == min(body.get("top_n") or 5, 5)
