"""The header x-gateway-priority: its valid values, and that every path passes it on."""

from __future__ import annotations

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.fleet import Model
from gateway.types import EmbedJob, LabelFunction, ModelKind, Priority
from tests.api.conftest import CheckError, Connect, MakeModel

REQUESTS = [
    ("/v1/embeddings", {"input": "text", "model": "mini"}),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "ranker"}),
    ("/v1/classify", {"input": ["a"], "model": "labeler"}),
    ("/tei/mini/embed", {"inputs": "text"}),
    ("/api/embed", {"input": "text", "model": "mini"}),
]


@pytest.fixture
def jobs() -> list[EmbedJob]:
    """The requests that the models received."""
    return []


@pytest.fixture
def some_models(make_model: MakeModel, jobs: list[EmbedJob]) -> list[Model]:
    infos = [
        {"model_id": "mini"},
        {"model_id": "ranker", "kind": ModelKind.RERANK, "width": 1, "dimensions": (1,)},
        {
            "model_id": "labeler",
            "kind": ModelKind.CLASSIFY,
            "width": 2,
            "dimensions": (2,),
            "labels": ("yes", "no"),
            "label_function": LabelFunction.SOFTMAX,
        },
    ]
    return [make_model(**info, backend=FakeBackend(fake_info(**info), on_embed=jobs.append)) for info in infos]


@pytest.mark.parametrize(
    ("headers", "priority"),
    [
        ({}, Priority.NORMAL),
        ({"x-gateway-priority": "low"}, Priority.LOW),
        ({"x-gateway-priority": " LOW "}, Priority.LOW),
        ({"x-gateway-priority": "normal"}, Priority.NORMAL),
        ({"x-gateway-priority": ""}, Priority.NORMAL),
    ],
)
@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=[path + body.get("model", "") for path, body in REQUESTS])
async def test_every_job_of_a_request_has_its_priority(
    connect: Connect,
    some_models: list[Model],
    jobs: list[EmbedJob],
    path: str,
    body: dict[str, object],
    headers: dict[str, str],
    priority: Priority,
) -> None:
    client = await connect(*some_models, aliases={})

    response = await client.post(path, json=body, headers=headers)

    assert response.status_code == 200, response.text
    assert {job.priority for job in jobs} == {priority}


@pytest.mark.parametrize("value", ["high", "low, normal", "x" * 1000])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/models"])
async def test_another_priority_is_refused_on_every_path(
    connect: Connect, check_error: CheckError, path: str, value: str
) -> None:
    client = await connect()
    method = "GET" if path.endswith("models") else "POST"

    response = await client.request(
        method, path, json={"input": "text", "model": "mini"}, headers={"x-gateway-priority": value}
    )

    message = check_error(response, 400, "invalid_input", param="x-gateway-priority")
    assert message.startswith("`x-gateway-priority` must be `normal` or `low`, got ")
    assert len(message) < 200
