"""The service resolves a name, checks the request, and finishes the vectors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Arm, Experiment, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import (
    BadInput,
    InvalidVectors,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    SpaceMismatch,
    UnsupportedDimensions,
    UnsupportedOutput,
)
from gateway.experiments.stats import ExperimentStats
from gateway.fleet import Fleet, Model
from gateway.requests import EmbedRequest, RerankRequest
from gateway.routing.names import GATEWAY
from gateway.service import EmbeddingService
from gateway.telemetry import metrics
from gateway.types import (
    TOKEN_BYTES,
    Embeddings,
    EmbedJob,
    ModelKind,
    ModelState,
    Output,
    SparseVector,
    Timings,
    Truncate,
)

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

    def __init__(self, vectors: np.ndarray = VECTORS, truncated: Sequence[int] = (), **more: Any) -> None:
        self.jobs: list[EmbedJob] = []
        self._result = Embeddings(vectors, [2] * len(vectors), truncated, Timings(0.001, 0.02, 0.3), **more)
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


def rerank_request(**changes: object) -> RerankRequest:
    fields = {"query": "a", "texts": ["a", "b"], "model": None, "timeout_s": 10.0, "caller": "me", "client": GATEWAY}
    return RerankRequest(**{**fields, **changes})


MakeService = Callable[..., EmbeddingService]


async def test_an_answer_describes_its_vectors(make_service: MakeService) -> None:
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


async def test_smaller_dimensions_are_cut_and_normalized_and_have_their_own_space(
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
async def test_a_request_that_a_model_does_not_support_is_refused_before_any_work(
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


async def test_embedded_texts_are_counted(make_service: MakeService) -> None:
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


# ----------------------------------------------------------------------------------------------- other outputs, memory


def sparse(value: float) -> list[SparseVector]:
    return [SparseVector(np.array([7]), np.array([value], np.float32))] * 3


async def test_token_states_have_their_own_space(make_service: MakeService) -> None:
    states = [np.ones((2, 8), np.float32)] * 3
    service = make_service(StubBackend(states=states), has_states=True)

    answer = await service.embed(request(outputs=[Output.STATES]))

    assert answer.space == INFO.space("text-matching", output=Output.STATES) != INFO.space("text-matching")
    assert (answer.states, answer.has_dense, answer.dimensions) == (states, False, None)


async def test_sparse_weights_share_the_space_of_the_dense_vectors(make_service: MakeService) -> None:
    weights = sparse(0.5)
    service = make_service(StubBackend(sparse=weights), outputs=(Output.DENSE, Output.SPARSE))

    answer = await service.embed(request(outputs=[Output.SPARSE, Output.DENSE]))

    assert answer.space == INFO.space()
    assert (answer.sparse, answer.has_dense, answer.dimensions) == (weights, True, 8)


@pytest.mark.parametrize(
    "output",
    [
        pytest.param({"sparse": sparse(np.inf)}, id="sparse"),
        pytest.param({"multivectors": [np.full((2, 8), np.nan, np.float32)] * 3}, id="multivector"),
        pytest.param({"states": [np.full((2, 8), np.nan, np.float32)] * 3}, id="states"),
    ],
)
async def test_other_outputs_must_be_finite_too(make_service: MakeService, output: dict[str, Any]) -> None:
    service = make_service(StubBackend(**output), outputs=(Output.DENSE, Output.SPARSE, Output.MULTIVECTOR))

    with pytest.raises(InvalidVectors, match="not finite"):
        await service.embed(request(outputs=[Output.DENSE]))


@pytest.mark.parametrize(
    ("outputs", "bytes_per_token"),
    [
        pytest.param([Output.DENSE], 0, id="dense"),
        pytest.param([Output.DENSE, Output.SPARSE], 12, id="sparse: an index and a weight"),
        pytest.param([Output.MULTIVECTOR], 4 * 5, id="multivector: a vector"),
        pytest.param([Output.MULTIVECTOR, Output.STATES, Output.SPARSE], 4 * 5 + 4 * 8 + 12, id="all"),
    ],
)
async def test_memory_is_reserved_for_the_vectors_and_then_for_the_tokens(
    make_service: MakeService, outputs: list[Output], bytes_per_token: int
) -> None:
    """For three texts of width 8: three copies of the vectors as float32; per token what waits, and its outputs."""
    reserved: list[int] = []
    backend = StubBackend()
    service = make_service(
        backend, outputs=(Output.DENSE, Output.SPARSE, Output.MULTIVECTOR), has_states=True, token_width=5
    )

    await service.embed(request(outputs=outputs, reserve=reserved.append))
    backend.jobs[0].on_tokens(10)

    vectors = 3 * 3 * 8 * 4
    assert reserved == [vectors, vectors + 10 * (TOKEN_BYTES + bytes_per_token)]


@pytest.mark.parametrize(
    ("max_weights", "num_weights", "further"),
    [
        pytest.param(4096, 4096, [], id="as many as are usual"),
        pytest.param(30_000, 4000, [3 * 3 * 8 * 4 + 3 * 12 * 4096], id="fewer than were reserved for"),
        pytest.param(30_000, 10_000, [3 * 12 * 10_000], id="more"),
    ],
)
async def test_memory_is_reserved_for_more_weights_than_are_usual_once_they_are_known(
    make_service: MakeService, max_weights: int, num_weights: int, further: list[int]
) -> None:
    reserved: list[int] = []
    weights = [SparseVector(np.arange(num_weights), np.ones(num_weights, np.float32))] * 3
    service = make_service(StubBackend(sparse=weights), outputs=(Output.DENSE, Output.SPARSE), max_weights=max_weights)

    await service.embed(request(outputs=[Output.SPARSE], reserve=reserved.append))

    assert reserved == [3 * 3 * 8 * 4 + 3 * 12 * 4096, *further]


async def test_a_model_without_token_states_has_its_other_outputs(make_service: MakeService) -> None:
    backend = StubBackend()
    service = make_service(backend, has_states=False)

    with pytest.raises(UnsupportedOutput, match="does not return un-pooled token vectors"):
        await service.embed(request(outputs=[Output.STATES]))
    assert backend.jobs == []

    assert (await service.embed(request())).has_dense


async def test_chunks_of_one_text_have_dense_vectors_only(make_service: MakeService) -> None:
    backend = StubBackend()
    service = make_service(backend, can_chunk_late=True, outputs=(Output.DENSE, Output.SPARSE))

    with pytest.raises(BadInput, match="returns dense vectors only") as caught:
        await service.embed(request(is_late_chunked=True, outputs=[Output.DENSE, Output.SPARSE]))
    assert caught.value.param == "outputs"
    assert backend.jobs == []

    await service.embed(request(is_late_chunked=True))
    assert backend.jobs[0].is_late_chunked


async def test_a_request_without_room_is_refused_before_any_work(make_service: MakeService) -> None:
    backend = StubBackend()

    def refuse(_num_bytes: int) -> None:
        raise Overloaded("no memory", retry_after_s=1)

    with pytest.raises(Overloaded):
        await make_service(backend).embed(request(reserve=refuse))

    assert backend.jobs == []


@pytest.mark.parametrize("outputs", [[Output.MULTIVECTOR], [Output.STATES], [Output.DENSE]])
async def test_only_outputs_per_token_limit_the_tokens_of_all_texts(
    make_service: MakeService, outputs: list[Output]
) -> None:
    backend = StubBackend()
    service = make_service(backend, outputs=(Output.DENSE, Output.MULTIVECTOR), has_states=True)

    await service.embed(request(outputs=outputs, max_token_vectors=100))

    assert backend.jobs[0].max_total_tokens == (None if outputs == [Output.DENSE] else 100)


# ------------------------------------------------------------------------------------------------------ kinds of model


@pytest.fixture
def mixed(make_model: MakeModel, make_fleet: MakeFleet) -> EmbeddingService:
    """A model that embeds, one that reranks, and one that reranks and has not been read yet."""
    models = [
        make_model("jina", backend=StubBackend()),
        make_model("ranker", source="owner/ranker", kind=ModelKind.RERANK, width=1),
        make_model("late", state=ModelState.LOADING),
    ]
    aliases = {"default": "ranker", "rank": "ranker", "search": "jina"}
    experiments = [
        Experiment(id=name, kind="same_space", arms=(Arm(model=model, weight=1), Arm(name="b", model=model, weight=1)))
        for name, model in (("ranks", "ranker"), ("embeds", "jina"))
    ]
    registry, fleet = make_fleet(*models, aliases=aliases, experiments=experiments)
    fleet.started.set()
    return _service(registry, fleet)


def test_the_arms_of_one_space_have_the_same_tokens_and_those_of_several_have_not(
    make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    arms = (Arm(model="jina", weight=1), Arm(name="b", model="jina", weight=1))
    experiments = [
        Experiment(id="one", kind="same_space", arms=arms),
        Experiment(id="two", kind="cross_space", unit=("body:user",), arms=(arms[0], Arm(model="other", weight=1))),
    ]
    service = _service(*make_fleet(make_model("jina"), make_model("other"), experiments=experiments))

    assert service.target("one", None, GATEWAY).model.entry.id == "jina"
    with pytest.raises(BadInput, match=r"jina \(model 'jina'\), other \(model 'other'\)") as caught:
        service.target("two", None, GATEWAY)
    assert caught.value.param == "model"


RERANKER = ["ranker", "owner/ranker", "ranker:query", "rank", "ranks", "default", None]


@pytest.mark.parametrize("name", RERANKER)
async def test_a_reranker_does_not_embed_under_any_of_its_names(mixed: EmbeddingService, name: str | None) -> None:
    with pytest.raises(UnsupportedOutput) as caught:
        await mixed.embed(request(model=name))

    assert caught.value.param == "model"
    assert caught.value.message.endswith("reranks texts and does not embed; models that embed: jina")


@pytest.mark.parametrize("name", ["jina", "owner/jina", "search", "embeds"])
async def test_a_model_that_embeds_does_not_rerank_under_any_of_its_names(mixed: EmbeddingService, name: str) -> None:
    with pytest.raises(UnsupportedOutput) as caught:
        await mixed.rerank(rerank_request(model=name))

    assert caught.value.param == "model"
    assert caught.value.message.endswith("embeds texts and does not rerank; models that rerank: ranker")


@pytest.mark.parametrize("name", [None, "ranker"])
async def test_the_only_reranker_that_has_been_read_answers_without_a_name(
    mixed: EmbeddingService, make_model: MakeModel, name: str | None
) -> None:
    ranker = mixed.target("ranker", None, GATEWAY).model
    await ranker.backend.start(ranker.report)

    answer = await mixed.rerank(rerank_request(model=name))

    assert (answer.model, answer.name, answer.num_texts, answer.space, answer.task) == (
        "ranker",
        "ranker",
        2,
        None,
        None,
    )
    np.testing.assert_array_equal(answer.scores, np.array([0, -1], np.float32))


async def test_a_request_to_rerank_without_a_name_does_not_go_to_a_default_that_embeds(
    make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    ranker = make_model("ranker", kind=ModelKind.RERANK, width=1)
    await ranker.backend.start(ranker.report)
    service = _service(*make_fleet(make_model("jina"), ranker, aliases={"default": "jina"}))

    assert (await service.rerank(rerank_request(model=None))).model == "ranker"


@pytest.mark.parametrize("ask", ["embed", "rerank"])
async def test_a_model_that_has_not_been_read_is_loading_for_either_kind_of_request(
    mixed: EmbeddingService, ask: str
) -> None:
    answering = mixed.embed(request(model="late")) if ask == "embed" else mixed.rerank(rerank_request(model="late"))

    with pytest.raises(ModelNotReady, match="'late' is still loading"):
        await answering
