"""Arms of ``gateway compare`` that rank by sparse or token vectors, or by several: compared with plain numpy."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest

from gateway.cache.files import CacheFolder
from gateway.cli.client import GatewayClient
from gateway.compare import fusion
from gateway.compare.arms import parse_arms, plan_arm
from gateway.compare.comparison import CompareRequest, compare
from gateway.compare.dataset import Dataset, read_dataset
from gateway.compare.progress import Silent
from gateway.compare.ranking import DEPTH, Ranked, rank
from gateway.errors import CompareError
from tests.models.checkpoints import SENTENCES
from tests.models.in_process import Connect
from tests.models.plain import entry

NUM_DOCUMENTS, NUM_QUERIES = 40, 6
Vectors = Mapping[str, object]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Write texts of a few words, some of them twice."""
    folder, chance = tmp_path_factory.mktemp("data"), random.Random(5)
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 20))) for _ in range(NUM_DOCUMENTS)]
    texts[7] = texts[3]
    for name, some in (("corpus", texts), ("queries", texts[:NUM_QUERIES])):
        rows = [
            {"_id": f"{name[0]}{i:03}", "text": text if name == "corpus" else " ".join(text.split()[::2])}
            for i, text in enumerate(some)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_dataset(folder, None)


async def outputs(
    http: httpx.AsyncClient, texts: Sequence[str], wanted: Sequence[str], task: str | None
) -> list[Vectors]:
    """Ask for the outputs of each text by itself."""
    rows = []
    for text in texts:
        body = {"model": "tiny", "input": text, "outputs": list(wanted)} | ({"task": task} if task else {})
        response = await http.post("/v1/embeddings", json=body)
        assert response.status_code == 200, response.text
        rows.append(response.json()["data"][0])
    return rows


def dense(query: Vectors, document: Vectors) -> float:
    return float(np.dot(query["embedding"], document["embedding"]))


def sparse(query: Vectors, document: Vectors) -> float:
    weights = dict(zip(document["sparse"]["indices"], document["sparse"]["values"], strict=True))
    pairs = zip(query["sparse"]["indices"], query["sparse"]["values"], strict=True)
    return sum(value * weights.get(index, 0.0) for index, value in pairs)


def late(query: Vectors, document: Vectors) -> float:
    if not query["multivector"] or not document["multivector"]:
        return 0.0
    return float(np.mean(np.max(np.array(query["multivector"]) @ np.array(document["multivector"]).T, axis=1)))


def by_rank(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add up 1 / (60 + rank)."""
    fused: dict[str, float] = {}
    for one in scores:
        for place, document in enumerate(sorted(one, key=lambda document: -one[document]), start=1):
            fused[document] = fused.get(document, 0.0) + 1 / (60 + place)
    return fused


async def ranked(http: httpx.AsyncClient, name: str, dataset: Dataset, folder: Path) -> Ranked:
    client = GatewayClient(http, "gateway")
    arm = await plan_arm(client, parse_arms([name, "other"])[0])
    with CacheFolder(folder) as cache:
        return await rank(client, arm, dataset, cache, Silent())


def check(found: Ranked, expected: Sequence[Mapping[str, float]], dataset: Dataset, tolerance: float = 2e-3) -> None:
    """Compare scores, and the order where it does not depend on rounding: token vectors are kept in float16."""
    assert list(found.ranking) == list(dataset.queries)
    for hits, scores in zip(found.ranking.values(), expected, strict=True):
        assert {document for document, _ in hits} == set(scores)
        for document, score in hits:
            assert score == pytest.approx(scores[document], abs=tolerance)
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)


Score = Callable[[Vectors, Vectors], float]
SCORES: Mapping[str, Score] = {"dense": dense, "sparse": sparse, "multivector": late}


async def all_scores(
    http: httpx.AsyncClient,
    dataset: Dataset,
    wanted: Sequence[str],
    tasks: tuple[str | None, str | None] = (None, None),
) -> dict[str, list[dict[str, float]]]:
    """Return the score of every document, by output and query."""
    queries = await outputs(http, list(dataset.queries.values()), wanted, tasks[0])
    documents = await outputs(http, list(dataset.documents.values()), wanted, tasks[1])
    return {
        name: [
            {id_: SCORES[name](query, document) for id_, document in zip(dataset.documents, documents, strict=True)}
            for query in queries
        ]
        for name in wanted
    }


async def test_the_outputs_of_bge_m3(
    m3: Path, connect: Connect, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    http = await connect(entry(m3, outputs=tuple(SCORES)))
    scores = await all_scores(http, dataset, ["dense", "sparse", "multivector"])
    cache = tmp_path / "cache"

    plain = await ranked(http, "tiny", dataset, cache)
    check(plain, scores["dense"], dataset)
    assert plain.bytes_per_document == 4 * 64

    by_weight = await ranked(http, "tiny+sparse", dataset, cache)
    found = [{document: score for document, score in one.items() if score > 0} for one in scores["sparse"]]
    check(by_weight, found, dataset, tolerance=2e-2)
    assert 8 <= by_weight.bytes_per_document < 200

    by_token = await ranked(http, "tiny+multivector", dataset, cache)
    check(by_token, scores["multivector"], dataset)  # all are among the first 200
    assert by_token.bytes_per_document > 2 * 64

    hybrid = await ranked(http, "tiny+hybrid", dataset, cache)
    expected = [by_rank(both) for both in zip(scores["dense"], found, strict=True)]
    check(hybrid, expected, dataset, tolerance=1e-3)
    assert hybrid.bytes_per_document == pytest.approx(plain.bytes_per_document + by_weight.bytes_per_document, abs=1)
    assert hybrid == await ranked(http, "tiny+dense+sparse", dataset, cache)

    weighted = await ranked(http, "tiny+dense=3+multivector=1", dataset, cache)
    pairs = zip(scores["dense"], scores["multivector"], strict=True)
    mean = [{document: (3 * one[document] + other[document]) / 4 for document in one} for one, other in pairs]
    check(weighted, mean, dataset)

    # With few candidates, token vectors reorder them, and find no others.
    monkeypatch.setattr("gateway.compare.ranking.CANDIDATES", 3)
    few = await ranked(http, "tiny+multivector", dataset, tmp_path / "other")
    for query, hits in few.ranking.items():
        firsts = {document for document, _ in [*plain.ranking[query][:3], *by_weight.ranking[query][:3]]}
        assert {document for document, _ in hits} == firsts


async def test_a_sparse_encoder_is_an_arm(
    inference_free: Path, connect: Connect, dataset: Dataset, tmp_path: Path
) -> None:
    """Its queries have fixed weights, so the tasks matter."""
    http = await connect(entry(inference_free))
    scores = await all_scores(http, dataset, ["sparse"], ("retrieval.query", "retrieval.passage"))
    found = await ranked(http, "tiny", dataset, tmp_path)
    check(found, [{id_: score for id_, score in one.items() if score > 0} for one in scores["sparse"]], dataset, 1e-4)


async def test_a_colbert_is_an_arm_that_is_searched_exhaustively(
    stanford: Path, connect: Connect, dataset: Dataset, tmp_path: Path
) -> None:
    http = await connect(entry(stanford))
    scores = await all_scores(http, dataset, ["multivector"], ("retrieval.query", "retrieval.passage"))
    found = await ranked(http, "tiny", dataset, tmp_path)
    check(found, scores["multivector"], dataset)
    # Equal texts have equal scores, and the greater id is first, as trec_eval has it.
    for hits in found.ranking.values():
        places = {document: (place, score) for place, (document, score) in enumerate(hits)}
        assert places["c007"][1] == places["c003"][1]
        assert places["c007"][0] < places["c003"][0]


async def test_a_comparison_of_the_outputs(m3: Path, connect: Connect, dataset: Dataset, tmp_path: Path) -> None:
    http = await connect(entry(m3, outputs=tuple(SCORES)))
    arms = ["tiny", "tiny+sparse", "tiny+hybrid", "tiny:binary+hybrid", "tiny+dense=0.5+sparse=0.5"]
    request = CompareRequest(arms, dataset.folder, tmp_path, num_resamples=200, measures_cost=False)

    found, rankings = await compare(request, dataset, GatewayClient(http, "gateway"), Silent())

    assert [arm.name for arm in found.arms] == list(rankings) == arms
    sizes = [arm.bytes_per_document for arm in found.arms]
    assert sizes[0] == 256
    assert sizes[3] == pytest.approx(sizes[1] + 8, abs=1)
    assert [arm.dimensions for arm in found.arms] == [64, 0, 64, 64, 64]
    notes = "\n".join(found.notes)
    assert "tiny+hybrid ranks by reciprocal rank fusion (k = 60) of the first 200 by dense, sparse." in notes
    assert "tiny+dense=0.5+sparse=0.5 ranks by the weighted mean of its similarities (dense 0.5, sparse 0.5)" in notes
    assert "Weights that were chosen by these judgments make it look better than it is." in notes
    assert "comes from rounding" not in notes


async def test_another_run_embeds_nothing(m3: Path, connect: Connect, dataset: Dataset, tmp_path: Path) -> None:
    http = await connect(entry(m3, outputs=tuple(SCORES)))
    first = await ranked(http, "tiny+multivector", dataset, tmp_path)
    posted: list[int] = []

    async def count(request: httpx.Request) -> None:
        posted.append(len(json.loads(request.content)["input"])) if request.method == "POST" else None

    http.event_hooks["request"].append(count)
    assert await ranked(http, "tiny+multivector", dataset, tmp_path) == first
    assert max(posted) <= 2  # probes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny@32", "the size|returns vectors of|no dense vectors"),
        ("tiny:binary", "has no dense vectors, so there is no size or precision to choose"),
        ("tiny+dense", "returns only: multivector"),
    ],
)
async def test_outputs_that_a_model_does_not_have_are_refused(
    stanford: Path, connect: Connect, dataset: Dataset, tmp_path: Path, name: str, message: str
) -> None:
    http = await connect(entry(stanford))
    with pytest.raises(Exception, match=message):
        await ranked(http, name, dataset, tmp_path)


def test_there_are_fewer_candidates_than_requested_later() -> None:
    assert fusion.CANDIDATES > DEPTH


@pytest.mark.parametrize(
    "name", ["a+dense+dense", "a+colbert", "a+", "a+hybrid+sparse", "a+dense=1+sparse", "a+sparse=1"]
)
def test_a_mix_of_another_form(name: str) -> None:
    with pytest.raises(CompareError, match=r"after a model's name, \+|appears twice"):
        parse_arms([name, "b"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a@256+sparse", "only dense vectors have a size or a precision"),
        ("a:binary+dense=1+sparse=1", "leave out the weights"),
        ("a:int8+dense+sparse", "cannot be combined with other outputs here"),
        ("a+dense=0+sparse=1", "a weight must be above 0"),
    ],
)
def test_an_invalid_mix_is_refused(name: str, message: str) -> None:
    with pytest.raises(CompareError, match=message):
        parse_arms([name, "b"])
