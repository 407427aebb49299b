"""A value with only one possible meaning is accepted, in every body and in every dialect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import httpx
import pytest

from gateway.api.assignments import UnitsBody
from gateway.api.classify_schema import ClassifyBody
from gateway.api.comparisons import AgreementBody, ComparisonBody, JudgeBody
from gateway.api.duels import DuelBody, VoteBody
from gateway.api.experiment_changes import WeightsBody
from gateway.api.grading import GradeBody
from gateway.api.json_body import RequestBody
from gateway.api.ollama import OllamaEmbedBody
from gateway.api.openai_schema import EmbeddingsBody
from gateway.api.rerank_schema import RerankBody
from gateway.api.tei_schema import (
    AboutModel,
    Cutting,
    DecodeBody,
    EmbedBody,
    PredictBody,
    SimilarityBody,
    SimilarityInputs,
    TextsBody,
    TokenizeBody,
)
from gateway.api.tokenize import TokenizeBody as OwnTokenizeBody
from gateway.backends.fake import FakeBackend, fake_info
from gateway.errors import BadInput
from gateway.fleet import Model
from gateway.types import EmbedJob, ModelKind, Output, Truncate

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
MakeModel = Callable[..., Model]

LEAST: dict[type[RequestBody], dict[str, Any]] = {
    EmbeddingsBody: {"input": "a"},
    RerankBody: {"query": "a", "documents": ["a"]},
    TextsBody: {"inputs": "a"},
    EmbedBody: {"inputs": "a"},
    SimilarityBody: {"inputs": {}},
    SimilarityInputs: {"source_sentence": "a", "sentences": ["a"]},
    TokenizeBody: {"inputs": "a"},
    DecodeBody: {"ids": [1]},
    PredictBody: {"inputs": "a"},
    ClassifyBody: {"input": "a"},
    OllamaEmbedBody: {"input": "a"},
    UnitsBody: {"units": ["a"]},
    OwnTokenizeBody: {"input": "a"},
    ComparisonBody: {"name": "a", "arms": ["a", "b"], "data": "a"},
    WeightsBody: {"weights": {"a": 1}},
    JudgeBody: {"url": "a", "model": "a"},
    AgreementBody: {"agree": True},
    DuelBody: {"comparison": "a", "baseline": "a", "arm": "b"},
    VoteBody: {"turn": 1, "choice": "tie"},
    GradeBody: {"query": "a", "document": "a", "grade": 1},
}


def bodies(root: type[RequestBody] = RequestBody) -> Iterator[type[RequestBody]]:
    for body in root.__subclasses__():
        yield body
        yield from bodies(body)


def kinds(annotation: object) -> set[object]:
    """Return the types that a field may have, outside containers."""
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(kinds, get_args(annotation)))
    return {annotation}


FIELDS = [
    pytest.param(body, name, kind, id=f"{body.__name__}.{name}")
    for body in LEAST
    for name, field in body.model_fields.items()
    for kind in (bool, int, float, Truncate)
    if kind in kinds(field.annotation)
]


def test_every_body_is_tried() -> None:
    assert set(bodies()) - {AboutModel, Cutting} == set(LEAST)
    assert len(FIELDS) > 20


def read(body: type[RequestBody], name: str, value: object) -> object:
    return getattr(body.parse({**LEAST[body], name: value}), name)  # type: ignore[arg-type]


@pytest.mark.parametrize(("body", "name", "kind"), FIELDS)
def test_a_value_written_as_a_string_keeps_its_meaning(body: type[RequestBody], name: str, kind: object) -> None:
    if kind is bool:
        assert [read(body, name, value) for value in ("true", "True", "TRUE", "1", 1, " true ")] == [True] * 6
        assert [read(body, name, value) for value in ("false", "False", "0", 0, 0.0)] == [False] * 5
    elif kind is int:
        assert [read(body, name, value) for value in ("3", "3.0", 3.0, " 3 ", "+3")] == [3] * 5
    elif kind is float:
        assert [read(body, name, value) for value in ("0.5", 0.5, " 0.5 ", "+0.50")] == [0.5] * 4
    else:
        direction = {"END": Truncate.END, "end": Truncate.END, "Right": Truncate.END, "RIGHT": Truncate.END}
        direction |= {"START": Truncate.START, "start": Truncate.START, "Left": Truncate.START, "left": Truncate.START}
        assert {value: read(body, name, value) for value in direction} == direction


def test_outputs_and_weights_to_score_by_keep_their_meaning() -> None:
    def wanted(score_by: object) -> object:
        return RerankBody.parse({**LEAST[RerankBody], "score_by": score_by}).wanted_scores

    weights = {Output.DENSE: 0.4, Output.SPARSE: 2.0}
    for lax in ({"dense": "0.4", "sparse": "2"}, {"Dense": 0.4, " SPARSE ": 2}, {"dense": " 0.40", "sparse": "+2.0"}):
        assert wanted(lax) == weights
    assert wanted(" Dense ") == wanted(["DENSE"]) == wanted("dense") == {Output.DENSE: 1.0}
    for wrong in (
        {"dense": "much"},
        {"dense": "0"},
        {"dense": "-1"},
        {"dense": True},
        {"dense": None},
        ["dense", "all"],
    ):
        with pytest.raises(BadInput, match="`score_by` must be"):
            wanted(wrong)


@pytest.mark.parametrize("body", LEAST)
def test_an_empty_string_is_absent_where_a_field_may_be(body: type[RequestBody]) -> None:
    optional = {name: "" for name, field in body.model_fields.items() if not field.is_required()}
    if body is RerankBody:
        del optional["documents"]

    assert body.parse({**LEAST[body], **optional}) == body.parse(LEAST[body])


def test_weights_are_numbers_also_when_they_are_written_as_strings() -> None:
    assert WeightsBody.parse({"weights": {"a": "1", "b": " 0.25 ", "c": 3}}).weights == {"a": 1.0, "b": 0.25, "c": 3.0}
    for wrong in ("x", "", "nan", "inf", "1e400", True, None, [1]):
        with pytest.raises(BadInput, match="`weights` must be an object of numbers by arm"):
            WeightsBody.parse({"weights": {"a": wrong}})


def test_an_empty_text_is_a_text() -> None:
    assert EmbeddingsBody.parse({"input": ""}).input == ""
    assert RerankBody.parse({"query": "", "documents": [""]}).query == ""
    assert EmbedBody.parse({"inputs": ""}).items == [""]


@pytest.fixture
def jobs() -> list[EmbedJob]:
    """The requests that the models received."""
    return []


@pytest.fixture
async def client(connect: Connect, make_model: MakeModel, jobs: list[EmbedJob]) -> httpx.AsyncClient:
    """Return a client of a gateway with a model of each kind."""
    embeds: dict[str, Any] = {"dimensions": (8, 4), "outputs": (Output.DENSE, Output.SPARSE)}
    ranks: dict[str, Any] = {"width": 1, "dimensions": (1,), "kind": ModelKind.RERANK}
    return await connect(
        make_model("mini", backend=FakeBackend(fake_info("mini", **embeds), on_embed=jobs.append), **embeds),
        make_model("ranker", backend=FakeBackend(fake_info("ranker", **ranks), on_embed=jobs.append), **ranks),
        aliases={"default": "mini"},
    )


RERANK_PATHS = ["/v1/rerank", "/v2/rerank", "/v1/v2/rerank", "/rerank"]


@pytest.mark.parametrize("path", RERANK_PATHS)
async def test_ragflows_request_to_a_reranker_is_read(client: httpx.AsyncClient, path: str) -> None:
    body = {"model": "ranker", "query": "fox", "documents": ["a fox", "b"]}
    asked = {"return_documents": "true", "return_len": "true", "top_n": "1"}

    response = await client.post(path, json={**body, **asked})

    assert response.status_code == 200, response.text
    [result] = response.json()["results"]
    assert result["document"] in ("a fox", {"text": "a fox"})


@pytest.mark.parametrize("path", ["/rerank", "/tei/ranker/rerank"])
async def test_requests_from_forms_to_teis_rerank_are_read(client: httpx.AsyncClient, path: str) -> None:
    body = {"query": "fox", "texts": ["fox", "b"]}
    raw = await client.post(path, json={**body, "raw_scores": "True", "return_text": "1", "truncate": "true"})
    plain = await client.post(path, json={**body, "raw_scores": "False", "return_text": "0", "truncate": ""})

    assert [result["text"] for result in raw.json()] == ["fox", "b"]
    assert all("text" not in result for result in plain.json())
    assert [result["score"] for result in raw.json()] == [0, -1]  # the words that are shared, minus 1
    assert plain.json()[0]["score"] == 0.5


TRUNCATIONS = [
    ("END", Truncate.END),
    ("end", Truncate.END),
    ("right", Truncate.END),
    ("START", Truncate.START),
    ("Left", Truncate.START),
    ("NONE", Truncate.REFUSE),
    ("none", Truncate.REFUSE),
    ("False", Truncate.REFUSE),
    (1, Truncate.END),
    (0, Truncate.REFUSE),
    ("", Truncate.END),
]


@pytest.mark.parametrize(("truncate", "expected"), TRUNCATIONS)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, {"model": "ranker", "query": "a", "documents": ["b"]}) for path in RERANK_PATHS),
        ("/rerank", {"query": "a", "texts": ["b"]}),
        ("/tei/ranker/rerank", {"query": "a", "texts": ["b"]}),
        ("/v1/embeddings", {"input": "a"}),
        ("/embed", {"inputs": "a"}),
        ("/tei/mini/embed_sparse", {"inputs": "a"}),
        ("/api/embed", {"model": "mini", "input": "a"}),
    ],
)
async def test_the_words_of_every_api_for_texts_that_are_too_long(
    client: httpx.AsyncClient,
    jobs: list[EmbedJob],
    path: str,
    body: dict[str, Any],
    truncate: object,
    expected: Truncate,
) -> None:
    response = await client.post(path, json={**body, "truncate": truncate})

    assert response.status_code == 200, response.text
    assert [job.truncate for job in jobs] == [expected]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncation_direction": "LEFT"}, Truncate.START),
        ({"truncation_direction": "start", "truncate": "true"}, Truncate.START),
        ({"truncation_direction": "right", "truncate": "END"}, Truncate.END),
        ({"truncation_direction": "left", "truncate": "NONE"}, Truncate.REFUSE),
    ],
)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a"}),
        ("/tei/mini/embed", {"inputs": "a"}),
        ("/v1/rerank", {"model": "ranker", "query": "a", "documents": ["b"]}),
    ],
)
async def test_the_direction_of_tei(
    client: httpx.AsyncClient,
    jobs: list[EmbedJob],
    path: str,
    body: dict[str, Any],
    fields: dict[str, str],
    expected: Truncate,
) -> None:
    response = await client.post(path, json={**body, **fields})

    assert response.status_code == 200, response.text
    assert [job.truncate for job in jobs] == [expected]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncation": True}, Truncate.END),
        ({"truncation": False}, Truncate.REFUSE),
        ({"truncation": "false", "truncate": "NONE"}, Truncate.REFUSE),
        ({"truncation": True, "truncate": "START"}, Truncate.START),
        ({"truncation": None, "truncate": ""}, Truncate.END),
    ],
)
async def test_voyages_name_for_it(
    client: httpx.AsyncClient, jobs: list[EmbedJob], fields: dict[str, object], expected: Truncate
) -> None:
    response = await client.post("/v1/embeddings", json={"input": "a", **fields})

    assert response.status_code == 200, response.text
    assert [job.truncate for job in jobs] == [expected]


async def test_two_names_for_it_must_agree(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/embeddings", json={"input": "a", "truncate": "START", "truncation": False})

    assert response.status_code == 400
    message = response.json()["message"]
    assert message.startswith("`truncate` says the string ")
    assert "`truncation` says the string " in message
    assert message.endswith(": they mean the same, leave one out")


async def test_two_ends_of_a_text_contradict_each_other(client: httpx.AsyncClient) -> None:
    body = {"input": "a", "truncate": "END", "truncation_direction": "Left"}

    response = await client.post("/v1/embeddings", json=body)

    assert response.status_code == 400
    assert "name different ends of a text" in response.json()["message"]


async def test_embeddings_take_numbers_flags_and_names_as_forms_send_them(client: httpx.AsyncClient) -> None:
    fields = {"dimensions": "4.0", "normalized": "True", "late_chunking": "false", "outputs": "Dense"}

    response = await client.post(
        "/v1/embeddings", json={"input": "a", **fields, "encoding_format": "Float", "task": "", "user": "", "model": ""}
    )

    assert response.status_code == 200, response.text
    [row] = response.json()["data"]
    assert len(row["embedding"]) == 4


@pytest.mark.parametrize("size", ["4", "4.0", 4.0])
async def test_tei_and_ollama_take_dimensions_as_forms_send_them(client: httpx.AsyncClient, size: object) -> None:
    tei = await client.post("/embed", json={"inputs": "a", "dimensions": size, "normalize": "true"})
    ollama = await client.post("/api/embed", json={"model": "mini", "input": "a", "dimensions": size})

    assert len(tei.json()[0]) == len(ollama.json()["embeddings"][0]) == 4


async def test_the_query_may_be_written_like_a_document(client: httpx.AsyncClient) -> None:
    """NVIDIA's clients send this."""
    body = {"query": {"text": "fox"}, "documents": [{"text": "a fox"}], "truncate": "END"}

    assert (await client.post("/v1/rerank", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a"}),
        ("/api/embed", {"input": "a"}),
    ],
)
async def test_the_default_tag_of_ollama_is_not_a_task(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    response = await client.post(path, json={**body, "model": "mini:latest"})

    assert response.status_code == 200, response.text
    assert response.headers["x-gateway-model"] == "mini"
    assert (await client.get("/v1/models/mini:latest")).json()["id"] == "mini"
    assert (await client.post("/tei/mini:latest/embed", json={"inputs": "a"})).status_code == 200
