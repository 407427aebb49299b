"""The service resolves a name, checks what was asked for, and finishes the vectors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import BadInput, InvalidVectors, ModelNotFound, Overloaded, SpaceMismatch, UnsupportedDimensions
from gateway.experiments.stats import ExperimentStats
from gateway.fleet import Fleet, Model
from gateway.requests import EmbedRequest
from gateway.routing.names import GATEWAY
from gateway.service import EmbeddingService
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, Output, Timings, Truncate

MakeModel = Callable[..., Model]
MakeFleet = Callable[..., tuple[Registry, Fleet]]

INFO = fake_info(
    "jina",
    width=8,
    dimensions=(8, 4),
    max_tokens=5,
    tasks={"retrieval.query": "query: ", "text-matching": ""},
    default_task="text-matching",
)
VECTORS = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)


class StubBackend(FakeBackend):
    """Returns the vectors that it was given, and remembers the jobs."""

    def __init__(self, vectors: np.ndarray = VECTORS, truncated: Sequence[int] = ()) -> None:
        self.jobs: list[EmbedJob] = []
        self._result = Embeddings(vectors, [2] * len(vectors), truncated, Timings(0.001, 0.02, 0.3))
        super().__init__(INFO)

    async def embed(self, job: EmbedJob) -> Embeddings:
        self.jobs.append(job)
        return self._result


def _service(registry: Registry, fleet: Fleet) -> EmbeddingService:
    return EmbeddingService(Deployment(registry, Settings(), fleet), ExperimentStats(None))


@pytest.fixture
def make_service(make_model: MakeModel, make_fleet: MakeFleet) -> Callable[..., EmbeddingService]:
    def make(backend: StubBackend, **info: object) -> EmbeddingService:
        model = make_model("jina", backend=backend)
        model.info = dataclasses.replace(INFO, **info)
        return _service(*make_fleet(model, aliases={"default": "jina"}))

    return make


def request(**changes: object) -> EmbedRequest:
    fields = {"texts": ["a", "b", "c"], "model": "jina", "timeout_s": 10.0, "caller": "me", "client": GATEWAY}
    return EmbedRequest(**{**fields, **changes})


MakeService = Callable[..., EmbeddingService]


async def test_an_answer_says_what_its_vectors_are(make_service: MakeService) -> None:
    backend = StubBackend(truncated=[1])

    answer = await make_service(backend).embed(request())

    np.testing.assert_allclose(answer.vectors, VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True), rtol=1e-6)
    assert (answer.name, answer.model, answer.task) == ("jina", "jina", "text-matching")
    assert answer.space == INFO.space("text-matching", 8, is_normalized=True)
    assert (answer.num_tokens, answer.truncated) == (6, [1])
    assert answer.timings == Timings(0.001, 0.02, 0.3)


async def test_a_backend_gets_the_texts_as_they_are_with_task_caller_and_deadline(make_service: MakeService) -> None:
    backend = StubBackend()
    before = time.monotonic()

    await make_service(backend).embed(request(task="query", truncate=Truncate.REFUSE))

    [job] = backend.jobs
    assert (job.texts, job.task, job.truncate, job.caller) == (
        ["a", "b", "c"], "retrieval.query", Truncate.REFUSE, "me"
    )  # fmt: skip
    assert before + 10 <= job.deadline <= time.monotonic() + 10


async def test_smaller_dimensions_are_cut_and_normalized_and_have_a_space_of_their_own(
    make_service: MakeService,
) -> None:
    answer = await make_service(StubBackend()).embed(request(dimensions=4))

    head = VECTORS[:, :4]
    np.testing.assert_allclose(answer.vectors, head / np.linalg.norm(head, axis=1, keepdims=True), rtol=1e-6)
    assert answer.space == INFO.space("text-matching", 4, is_normalized=True)


@pytest.mark.parametrize("dimensions", [1, 5, 9, 1024])
async def test_other_dimensions_are_refused_before_any_work(make_service: MakeService, dimensions: int) -> None:
    backend = StubBackend()

    with pytest.raises(UnsupportedDimensions) as caught:
        await make_service(backend).embed(request(dimensions=dimensions))

    assert caught.value.param == "dimensions"
    assert f"`dimensions` is {dimensions}, but model 'jina' returns vectors of 8, 4 dimensions" in caught.value.message
    assert "`embedder.config.embedding_dims`" in caught.value.message
    assert backend.jobs == []


@pytest.mark.parametrize(
    ("model_does", "asked", "is_normalized"),
    [
        pytest.param(True, None, True, id="as the model does"),
        pytest.param(False, None, False, id="as the model does not"),
        pytest.param(True, False, False, id="switched off"),
        pytest.param(False, True, True, id="switched on"),
    ],
)
async def test_vectors_are_normalized_as_asked_or_as_the_model_does(
    make_service: MakeService, model_does: bool, asked: bool | None, is_normalized: bool
) -> None:
    service = make_service(StubBackend(), is_normalized=model_does)

    answer = await service.embed(request(is_normalized=asked))

    lengths = np.linalg.norm(VECTORS, axis=1, keepdims=True)
    np.testing.assert_allclose(answer.vectors, VECTORS / lengths if is_normalized else VECTORS, rtol=1e-6)
    assert answer.space == INFO.space("text-matching", 8, is_normalized=is_normalized)


async def test_the_expected_space_is_answered(make_service: MakeService) -> None:
    space = INFO.space("text-matching", 8, is_normalized=True)

    answer = await make_service(StubBackend()).embed(request(expect_space=space.replace("jina", "renamed")))

    assert answer.space == space


@pytest.mark.parametrize("change", [{"task": "query"}, {"dimensions": 4}, {"is_normalized": False}])
async def test_another_space_than_the_expected_one_is_refused_before_any_work(
    make_service: MakeService, change: dict[str, object]
) -> None:
    backend = StubBackend()
    space = INFO.space("text-matching", 8, is_normalized=True)

    with pytest.raises(SpaceMismatch, match=f"the request expects {space}"):
        await make_service(backend).embed(request(expect_space=space, **change))

    assert backend.jobs == []


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        pytest.param(
            {"outputs": [Output.DENSE, Output.SPARSE, Output.MULTIVECTOR]},
            "outputs",
            "`outputs` asks for sparse, multivector, but model 'jina' returns only: dense",
            id="outputs that the model does not have",
        ),
        pytest.param(
            {"is_late_chunked": True},
            "late_chunking",
            "`late_chunking` is not supported by model 'jina': it needs the mean over token states",
            id="late chunking",
        ),
    ],
)
async def test_what_a_model_cannot_do_is_refused_before_any_work(
    make_service: MakeService, change: dict[str, object], param: str, message: str
) -> None:
    backend = StubBackend()

    with pytest.raises(BadInput) as caught:
        await make_service(backend).embed(request(**change))

    assert (caught.value.message, caught.value.param) == (message, param)
    assert backend.jobs == []


async def test_an_unknown_name_is_never_answered_by_the_default(make_service: MakeService) -> None:
    backend = StubBackend()

    with pytest.raises(ModelNotFound):
        await make_service(backend).embed(request(model="other"))

    assert backend.jobs == []


@pytest.mark.parametrize(
    "vectors",
    [
        pytest.param(np.full((3, 8), np.nan, np.float32), id="NaN"),
        pytest.param(np.zeros((3, 8), np.float32), id="zero"),
        pytest.param(VECTORS[:, :4], id="width"),
        pytest.param(VECTORS[:2], id="count"),
    ],
)
async def test_invalid_vectors_are_never_handed_out(make_service: MakeService, vectors: np.ndarray) -> None:
    with pytest.raises(InvalidVectors):
        await make_service(StubBackend(vectors)).embed(request())


async def test_an_error_of_the_backend_passes_as_it_is(make_model: MakeModel, make_fleet: MakeFleet) -> None:
    refusal = Overloaded("the queue is full", retry_after_s=7)

    def refuse(_job: EmbedJob) -> None:
        raise refusal

    backend = FakeBackend(INFO, on_embed=refuse)
    await backend.start()
    service = _service(*make_fleet(make_model("jina", backend=backend)))

    with pytest.raises(Overloaded) as caught:
        await service.embed(request())
    assert caught.value is refusal


async def test_what_was_embedded_is_counted(make_service: MakeService) -> None:
    def counts() -> list[float]:
        return [
            metrics.REGISTRY.get_sample_value(
                name, {"model": "jina", "task": "text-matching", "experiment": "", "arm": ""}
            )
            or 0
            for name in ("gateway_texts_total", "gateway_tokens_total", "gateway_truncated_texts_total")
        ]

    before = counts()

    await make_service(StubBackend(truncated=[0, 2])).embed(request())

    assert [after - start for after, start in zip(counts(), before, strict=True)] == [3, 6, 2]
