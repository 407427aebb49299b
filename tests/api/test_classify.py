"""Classify over HTTP: the shapes of vLLM, Infinity and TEI, each rule of the request, and the permissions of keys."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from gateway.access.keyring import key_digest
from gateway.backends.fake import FakeBackend, fake_info
from gateway.errors import InferenceFailed
from gateway.fleet import Model
from gateway.types import EmbedJob, LabelFunction, ModelKind, Truncate
from tests.tei_contract import validate_answer

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
MakeModel = Callable[..., Model]

LABELS = ("many", "one", "none")
# The fake's numbers of a text are its words, 1 and 0.
TEXTS = ["a red fox", "", "fox"]
LOGITS = [[3.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
LONG = "one two three four five six seven eight nine"


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(number) for number in row]
    return [power / sum(powers) for power in powers]


def sigmoid(row: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-number)) for number in row]


FUNCTIONS = {LabelFunction.SOFTMAX: softmax, LabelFunction.SIGMOID: sigmoid, LabelFunction.NONE: list}


@pytest.fixture
def jobs() -> list[EmbedJob]:
    """The requests that the classifier received."""
    return []


@pytest.fixture
def make_labeler(make_model: MakeModel, jobs: list[EmbedJob]) -> MakeModel:
    """Return a function that makes a model with three labels."""

    def make(model_id: str = "labeler", on_embed: Callable[[EmbedJob], None] = jobs.append, **changes: Any) -> Model:
        info = {
            "width": 3,
            "dimensions": (3,),
            "max_tokens": 8,
            "kind": ModelKind.CLASSIFY,
            "labels": LABELS,
            "label_function": LabelFunction.SOFTMAX,
            **changes,
        }
        return make_model(model_id, backend=FakeBackend(fake_info(model_id, **info), on_embed=on_embed), **info)

    return make


@pytest.fixture
async def client(connect: Connect, models: list[Model], make_labeler: MakeModel) -> httpx.AsyncClient:
    """Return a client of a gateway with one classifier and the models that embed."""
    return await connect(*models, make_labeler())


async def classify(client: httpx.AsyncClient, path: str = "/v1/classify", **body: Any) -> httpx.Response:
    return await client.post(path, json={"input": TEXTS, **body})


def refused(response: httpx.Response, status: int, message: str, param: str | None) -> None:
    """Check an error of OpenAI's form."""
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert re.search(message, error["message"]), error["message"]


def labeled(scores: list[float]) -> list[dict[str, object]]:
    """Return the labels with their scores, the best first."""
    pairs = sorted(zip(scores, LABELS, strict=True), key=lambda pair: -pair[0])
    return [{"score": pytest.approx(score), "label": label} for score, label in pairs]


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("path", ["/v1/classify", "/classify", "/classify/", "/v1//classify"])
async def test_the_answer_is_vllm_s(client: httpx.AsyncClient, path: str) -> None:
    response = await classify(client, path, model="labeler")

    content = response.json()
    assert content["created"] > 1_700_000_000
    assert content == {
        "id": response.headers["x-request-id"],
        "object": "list",
        "created": content["created"],
        "model": "labeler",
        "data": [
            {"index": i, "label": label, "probs": pytest.approx(softmax(LOGITS[i])), "num_classes": 3}
            for i, label in enumerate(["many", "one", "many"])
        ],
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }


@pytest.mark.parametrize(("is_raw", "function"), [(False, softmax), (True, list)])
async def test_a_request_with_raw_scores_gets_infinity_s_answer(
    client: httpx.AsyncClient, is_raw: bool, function: Callable[[list[float]], list[float]]
) -> None:
    content = (await classify(client, raw_scores=is_raw)).json()

    assert content["object"] == "classify"
    assert content["data"] == [labeled(function(row)) for row in LOGITS]
    assert set(content) == {"id", "object", "created", "model", "data", "usage"}


@pytest.mark.parametrize("function", LabelFunction)
async def test_scores_are_the_model_s_function_of_its_numbers(
    connect: Connect, make_labeler: MakeModel, function: LabelFunction
) -> None:
    client = await connect(make_labeler(label_function=function), aliases={})

    rows = [item["probs"] for item in (await classify(client)).json()["data"]]

    assert rows == [pytest.approx(FUNCTIONS[function](row)) for row in LOGITS]


@pytest.mark.parametrize("field", ["use_activation", "activation"])
async def test_vllm_s_field_for_the_model_s_own_numbers(client: httpx.AsyncClient, field: str) -> None:
    raw, scores = [(await classify(client, **{field: value})).json() for value in (False, True)]

    assert [item["probs"] for item in raw["data"]] == LOGITS
    assert [item["probs"] for item in scores["data"]] == [pytest.approx(softmax(row)) for row in LOGITS]


async def test_huge_numbers_do_not_overflow(connect: Connect, make_labeler: MakeModel) -> None:
    for function in (LabelFunction.SOFTMAX, LabelFunction.SIGMOID):
        client = await connect(make_labeler(label_function=function, max_tokens=10_000), aliases={})

        [item] = (await classify(client, input="w " * 5_000)).json()["data"]

        assert item["probs"][0] == 1.0
        assert all(math.isfinite(score) for score in item["probs"])


async def test_a_single_text_is_a_batch_of_one(client: httpx.AsyncClient) -> None:
    [item] = (await classify(client, input="a red fox")).json()["data"]

    assert (item["index"], item["label"]) == (0, "many")


async def test_pairs_and_single_texts_may_be_mixed(client: httpx.AsyncClient, jobs: list[EmbedJob]) -> None:
    response = await classify(client, input=[["a red", "fox"], "fox"], use_activation=False)

    assert [item["probs"][0] for item in response.json()["data"]] == [3.0, 1.0]
    assert [(list(job.texts), job.firsts) for job in jobs] == [(["fox", "fox"], ["a red", None])]


async def test_the_headers_are_those_of_rerank(client: httpx.AsyncClient) -> None:
    response = await classify(client, input=["fox", LONG])

    assert response.headers["x-gateway-model"] == "labeler"
    assert response.headers["x-gateway-truncated"] == "1"
    assert "x-gateway-space" not in response.headers


# ---------------------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": None}, "input", "`input` is required"),
        ({"input": []}, "input", "empty list"),
        ({"input": 7}, "input", "`input` must be a string, or a list of two strings, got the number 7"),
        (
            {"input": ["a", ["b", None]]},
            "input",
            r"`input\[1\]` must be a string, or a list of two strings, got a list with null",
        ),
        ({"input": ["a", 7]}, "input", r"input\[1\]"),
        ({"input": [["a"]]}, "input", r"input\[0\]"),
        ({"input": [["a", "b", "c"]]}, "input", r"input\[0\]"),
        ({"input": [["a", None]]}, "input", r"input\[0\]"),
        ({"raw_scores": "maybe"}, "raw_scores", "true or false"),
        ({"raw_scores": True, "use_activation": True}, "use_activation", "contradict"),
        ({"raw_scores": False, "use_activation": False}, "use_activation", "contradict"),
        ({"activation": True, "use_activation": False}, "use_activation", "leave one out"),
        ({"truncate": "middle"}, "truncate", "must be"),
    ],
)
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, message: str
) -> None:
    response = await classify(client, **body)

    refused(response, 400, message, param)


async def test_fields_that_agree_are_taken(client: httpx.AsyncClient) -> None:
    for raw in (True, False):
        assert (await classify(client, raw_scores=raw, use_activation=not raw)).status_code == 200


async def test_the_limit_of_inputs_is_a_setting(connect: Connect, make_labeler: MakeModel) -> None:
    client = await connect(make_labeler(), aliases={}, max_inputs=2)

    refused(await classify(client), 400, "has 3 items; the limit is 2", "input")
    assert (await client.post("/predict", json={"inputs": [["a"]] * 3})).status_code == 422


@pytest.mark.parametrize("path", ["/v1/classify", "/predict"])
async def test_long_texts_are_cut_unless_truncate_is_false(
    client: httpx.AsyncClient, jobs: list[EmbedJob], path: str
) -> None:
    field = "inputs" if path == "/predict" else "input"
    refused = await client.post(path, json={field: LONG, "truncate": False})
    cut = await client.post(path, json={field: LONG, "truncation_direction": "left"})

    assert refused.status_code == (422 if path == "/predict" else 400)
    assert "maximum context length is 8" in refused.json()["detail"]
    assert cut.status_code == 200
    assert jobs[-1].truncate is Truncate.START


# --------------------------------------------------------------------------------------------------------------- TEI


@pytest.mark.parametrize("path", ["/predict", "/tei/labeler/predict", "/tei/labeler"])
@pytest.mark.parametrize(
    ("inputs", "logits"),
    [
        ("a red fox", LOGITS[0]),
        (["a red fox"], LOGITS[0]),
        (["a red", "fox"], LOGITS[0]),
        ([["a red fox"]], LOGITS[:1]),
        ([["a red fox"], [""], ["fox"]], LOGITS),
        ([["a red", "fox"], ["", ""], ["fox"]], LOGITS),
    ],
)
async def test_predict_takes_a_text_a_pair_or_a_batch(
    client: httpx.AsyncClient, path: str, inputs: object, logits: list[Any]
) -> None:
    response = await client.post(path, json={"inputs": inputs})

    validate_answer("/predict", response.status_code, response.json())
    is_batch = isinstance(logits[0], list)
    expected = [labeled(softmax(row)) for row in logits] if is_batch else labeled(softmax(logits))
    assert response.json() == expected
    assert response.headers["x-compute-tokens"] == str(4 if len(logits) == 3 and is_batch else 3)


async def test_predict_at_the_root_uses_the_model_that_the_body_names(client: httpx.AsyncClient) -> None:
    named = await client.post("/predict", json={"inputs": "a", "model": "labeler"})
    unknown = await client.post("/predict", json={"inputs": "a", "model": "nonsense"})

    assert (named.status_code, named.headers["x-gateway-model"]) == (200, "labeler")
    assert (unknown.status_code, unknown.json()["error_type"]) == (404, "Validation")


async def test_predict_gives_raw_scores(client: httpx.AsyncClient) -> None:
    assert (await client.post("/predict", json={"inputs": "a b", "raw_scores": True})).json() == labeled(
        [2.0, 1.0, 0.0]
    )


@pytest.mark.parametrize(
    ("inputs", "status", "error_type"),
    [
        ([], 400, "Empty"),
        ([[]], 422, "Validation"),
        ([["a", "b", "c"]], 422, "Validation"),
        (["a", "b", "c"], 422, "Validation"),
        (["a", ["b"]], 422, "Validation"),
        (7, 422, "Validation"),
    ],
)
async def test_wrong_inputs_of_predict(client: httpx.AsyncClient, inputs: object, status: int, error_type: str) -> None:
    response = await client.post("/predict", json={"inputs": inputs})

    assert (response.status_code, response.json()["error_type"]) == (status, error_type)


async def test_tei_s_description_of_a_classifier(client: httpx.AsyncClient) -> None:
    response = await client.get("/tei/labeler/info")

    validate_answer("/info", 200, response.json())
    assert response.json()["model_type"] == {
        "classifier": {"id2label": {"0": "many", "1": "one", "2": "none"}, "label2id": {"many": 0, "one": 1, "none": 2}}
    }


# ------------------------------------------------------------------------------------------------------------ models


async def test_models_of_other_kinds_are_refused_with_those_that_fit(client: httpx.AsyncClient) -> None:
    embedder = await classify(client, model="mini")
    embedded = await client.post("/v1/embeddings", json={"model": "labeler", "input": "a"})
    ranked = await client.post("/v1/rerank", json={"model": "labeler", "query": "a", "documents": ["b"]})
    predicted = await client.post("/tei/mini/predict", json={"inputs": "a"})

    refused(embedder, 400, "'mini' embeds texts and does not classify; .*: labeler", "model")
    refused(embedded, 400, "'labeler' classifies texts and does not embed; .*: mini, jina", "model")
    refused(ranked, 400, "'labeler' classifies texts and does not rerank; .*: none", "model")
    assert (predicted.status_code, predicted.json()["error_type"]) == (424, "Backend")


async def test_without_a_name_the_only_classifier_is_meant(
    connect: Connect, models: list[Model], make_labeler: MakeModel
) -> None:
    none = await connect(*models)
    several = await connect(*models, make_labeler(), make_labeler("other"))

    refused(await classify(none), 400, "no model in the registry classifies", "model")
    refused(await classify(several), 400, "several models classify: labeler, other", "model")
    assert (await classify(several, model="other")).json()["model"] == "other"


async def test_the_card_lists_the_labels(client: httpx.AsyncClient) -> None:
    card = (await client.get("/v1/models/labeler")).json()

    assert (card["kind"], card["labels"], card["label_function"]) == ("classify", list(LABELS), "softmax")
    assert (card["space"], card["width"], card["spaces"]) == (None, None, {})
    assert "labeler" not in (await client.get("/v1/spaces")).text


async def test_the_examples_of_the_page_are_answered(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    content = {
        path: paths[path]["post"]["requestBody"]["content"]["application/json"]
        for path in ("/v1/classify", "/tei/{model}/predict")
    }

    example = await client.post("/v1/classify", json=content["/v1/classify"]["examples"]["labeler"]["value"])
    other = await client.post("/tei/labeler/predict", json=content["/tei/{model}/predict"]["example"])

    assert (example.status_code, other.status_code) == (200, 200)


async def test_a_key_may_be_for_other_models(
    connect: Connect, models: list[Model], make_labeler: MakeModel, tmp_path: Any
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"version: 1\nkeys:\n  - name: app\n    sha256: {key_digest('sk-app')}\n    models: [mini]\n")
    client = await connect(*models, make_labeler(), api_keys_file=str(keys))
    client.headers["authorization"] = "Bearer sk-app"

    refused(await classify(client, model="labeler"), 403, "labeler", "model")
    refused(await classify(client), 403, "may not use any model that classifies", "model")


async def test_quotas_count_the_tokens_of_both_texts(connect: Connect, make_labeler: MakeModel, tmp_path: Any) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        f"version: 1\nkeys:\n  - name: app\n    sha256: {key_digest('sk-app')}\n    tokens_per_minute: 100\n"
    )
    client = await connect(make_labeler(), aliases={}, api_keys_file=str(keys))
    client.headers["authorization"] = "Bearer sk-app"

    response = await classify(client, input=[["a b c", "d"]])

    assert response.json()["usage"]["prompt_tokens"] == 4
    assert response.headers["x-ratelimit-remaining-tokens"] == "96"


async def test_a_failure_of_the_model_is_reported(connect: Connect, make_labeler: MakeModel) -> None:
    def fail(_job: EmbedJob) -> None:
        raise InferenceFailed("it broke")

    client = await connect(make_labeler(on_embed=fail), aliases={})

    refused(await classify(client), 500, "it broke", None)
    assert (await client.post("/predict", json={"inputs": "a"})).status_code == 424
