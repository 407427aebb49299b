"""A complete comparison on a gateway whose models only count words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import httpx
import ir_measures
import pytest

from gateway.compare.arms import PROBE
from gateway.compare.comparison import CompareRequest, compare
from gateway.compare.dataset import read_dataset
from gateway.compare.outputs import write_results
from gateway.compare.page import render_page
from gateway.compare.page_table import table_groups
from gateway.compare.progress import Silent, Step
from gateway.compare.results import MEASURES, Advice, Comparison, Verdict
from gateway.compare.search import Ranking
from gateway.compare.unjudged import write_to_judge
from gateway.config.cache import CacheConfig
from gateway.errors import CompareError
from tests.compare.conftest import FakeGateway, MakeModel, StartGateway, WriteData


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> FakeGateway:
    """Return a gateway with an alias that searches with the task for documents."""
    return await start_gateway(aliases={"backwards": ("tasks", "retrieval.passage")})


async def run(gateway: FakeGateway, request: CompareRequest) -> tuple[Comparison, dict[str, Ranking]]:
    dataset = read_dataset(request.data, request.split, request.max_documents, request.seed, request.judged)
    return await compare(request, dataset, gateway.client, Silent())


def request_for(data: Path, *arms: str, **changes: Any) -> CompareRequest:
    request = CompareRequest(arms, data, data.parent / "cache", measures_cost=False, num_resamples=200)
    return replace(request, **changes)


def many_queries(num: int) -> dict[str, Any]:
    """Queries about a document each: its first word, and two that every document has."""
    documents = {f"d{i}": f"thing{i} and also detail{i} besides more{i}" for i in range(num)}
    queries = {f"q{i}": f"thing{i} and besides" for i in range(num)}
    return {
        "documents": documents,
        "queries": queries,
        "judgments": {(f"q{i}", f"d{i}"): 1 for i in range(num)},
    }


async def test_documents_that_a_model_reads_in_part_are_noted(
    start_gateway: StartGateway, make_words_model: MakeModel, write_data: WriteData
) -> None:
    """A model with a short limit loses by the length of the documents: split, they may give another result."""
    models = [make_words_model(name, width=16, max_tokens=limit) for name, limit in (("short", 6), ("long", 100))]
    gateway = await start_gateway(*models)
    request = request_for(write_data(), "short", "long")

    first, _rankings = await run(gateway, request)
    again, _rankings = await run(gateway, request)  # from the cache

    for found in (first, again):
        assert [note for note in found.notes if "read only the beginning" in note] == [
            "short reads at most 6 tokens, so it read only the beginning of 2 of 5 documents. If you split long documents "
            "before you store them, split them for a comparison as well."
        ]


async def test_queries_that_a_model_reads_in_part_are_noted(
    start_gateway: StartGateway, make_words_model: MakeModel, write_data: WriteData
) -> None:
    models = [make_words_model(name, width=16, max_tokens=limit) for name, limit in (("short", 4), ("long", 100))]
    gateway = await start_gateway(*models)

    found, _rankings = await run(gateway, request_for(write_data(), "short", "long"))

    assert [note for note in found.notes if "queries, as" in note] == [
        "short reads at most 4 tokens, so it read only the beginning of 1 of 3 queries, as it would for your users."
    ]


async def test_each_arm_has_its_figures(gateway: FakeGateway, write_data: WriteData) -> None:
    found, rankings = await run(gateway, request_for(write_data(), "tasks", "tasks@8", "plain"))
    assert [arm.name for arm in found.arms] == list(rankings) == ["tasks", "tasks@8", "plain"]
    whole, cut, plain = found.arms
    assert (whole.model, whole.dimensions, whole.bytes_per_document) == ("tasks", 64, 256)
    assert (cut.model, cut.dimensions, cut.bytes_per_document) == ("tasks", 8, 32)
    assert (whole.query_task, whole.passage_task) == ("retrieval.query", "retrieval.passage")
    assert (plain.query_task, plain.device, plain.dtype, plain.cost) == (None, "cpu", "float32", None)
    assert len({arm.space for arm in found.arms}) == 3
    # The first ten of five documents are all of them.
    measured = ("nDCG@10", "RR@10", "Success@1", "Judged@10")
    assert tuple(whole.quality) == measured
    assert [(one.arm, one.measure) for one in found.contrasts] == [
        (arm, measure) for arm in ("tasks@8", "plain") for measure in measured
    ]
    assert [one.arm for one in found.agreements] == ["tasks@8", "plain"]
    assert found.contrasts[0].verdict == Verdict.TOO_FEW_QUERIES
    assert (found.source, found.seed, found.margin) == ("http://gateway", 0, 0.01)
    assert [arm.source for arm in found.arms] == ["owner/tasks", "owner/tasks", "owner/plain"]
    assert {"gateway", "numpy", "ir-measures"} <= found.versions.keys()


async def test_small_vectors_are_arms_side_by_side(start_quantized: StartGateway, write_data: WriteData) -> None:
    names = ("tasks", "tasks:int8", "tasks@8:uint8", "tasks:binary", "tasks@8:ubinary")

    found, rankings = await run(await start_quantized(), request_for(write_data(), *names, measures_cost=True))

    assert [arm.bytes_per_document for arm in found.arms] == [256, 64, 8, 8, 1]
    assert [arm.dimensions for arm in found.arms] == [64, 64, 8, 64, 8]
    whole, signed, unsigned, binary, _cut = [arm.space for arm in found.arms]
    assert len({whole, signed, unsigned}) == 3
    assert binary == whole
    assert all(arm.quality["nDCG@10"].mean > 0 and arm.cost is not None for arm in found.arms)
    assert {score == int(score) for name in names[1:] for hits in rankings[name].values() for _, score in hits} == {
        True
    }
    assert not any("difference comes from rounding" in note for note in found.notes)
    assert "".join(found.notes).count("by the dot product of their integers") == 1


async def test_the_first_hundred_are_ranked_and_the_first_ten_shown(
    gateway: FakeGateway, write_data: WriteData
) -> None:
    found, rankings = await run(gateway, request_for(write_data(**many_queries(120)), "plain", "tasks"))
    assert {len(ranking) for of_arm in rankings.values() for ranking in of_arm.values()} == {100}
    shown = [ranking for query in found.queries for ranking in query.rankings.values()]
    assert {len(ranking) for ranking in shown} == {10}
    assert [hit.document for hit in shown[0]] == [document for document, _ in rankings["plain"]["q0"][:10]]


async def test_each_step_is_reported(gateway: FakeGateway, write_data: WriteData) -> None:
    class Told(Silent):
        steps: ClassVar[list[str]] = []

        def step(self, what: str, total: int) -> Step:
            self.steps.append(what)
            return self

    request = request_for(write_data(), "plain", "tasks", measures_cost=True)
    await compare(request, read_dataset(request.data, None, None, 0), gateway.client, Told())
    assert Told.steps == ["plain: documents", "plain: queries", "tasks: documents", "tasks: queries", "cost, in turns"]


async def test_the_words_of_a_query_find_its_document(gateway: FakeGateway, write_data: WriteData) -> None:
    found, _ = await run(gateway, request_for(write_data(), "plain", "tasks"))
    first = found.queries[0]
    assert (first.id, first.text) == ("q0", "train station")
    hit = first.rankings["plain"][0]
    assert (hit.document, hit.text) == ("d0", "a train leaves the station at noon")
    assert {hit.document: hit.relevance for hit in first.rankings["plain"]} == {
        "d0": 2, "d2": 1, "d1": None, "d3": None, "d4": None,
    }  # fmt: skip
    assert first.quality["plain"]["Success@1"] == 1
    assert first.overlap == {"tasks": 1}
    assert 0 < first.rbo["tasks"] <= 1


async def test_figures_are_those_of_ir_measures_on_the_written_runs(
    gateway: FakeGateway, write_data: WriteData, tmp_path: Path
) -> None:
    data = write_data(**many_queries(60))
    found, rankings = await run(gateway, request_for(data, "tasks", "tasks@8", "raw"))
    runs = write_results(found, rankings, tmp_path / "out")[2:]
    lines = [line.split("\t") for line in (data / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    judgments = [ir_measures.Qrel(query, document, int(score)) for query, document, score in lines]
    measures = [ir_measures.parse_measure(name) for name in MEASURES]
    for arm, path in zip(found.arms, runs, strict=True):
        by_hand = ir_measures.calc_aggregate(measures, judgments, ir_measures.read_trec_run(str(path)))
        means = {name: estimate.mean for name, estimate in arm.quality.items()}
        assert means == pytest.approx({name: by_hand[ir_measures.parse_measure(name)] for name in means}, abs=1e-12)
        assert means["nDCG@10"] > 0


async def test_a_cut_that_loses_much_is_worse(gateway: FakeGateway, write_data: WriteData) -> None:
    found, _ = await run(gateway, request_for(write_data(**many_queries(80)), "tasks", "tasks@8", num_resamples=2000))
    contrast = found.contrasts[0]
    assert contrast.verdict == Verdict.WORSE
    assert contrast.difference.high < 0
    assert contrast.p_holm < 0.05
    assert contrast.wins + contrast.ties + contrast.losses == 80
    assert "tasks@8 is worse than tasks" in render_page(found)


async def test_without_judgments_there_is_a_difference_and_no_quality(
    gateway: FakeGateway, write_data: WriteData
) -> None:
    found, _ = await run(gateway, request_for(write_data(judgments=None), "tasks", "tasks@8"))
    assert not found.has_judgments
    assert found.contrasts == []
    assert not any(arm.quality for arm in found.arms)
    assert not any(query.quality for query in found.queries)
    assert 0 < found.agreements[0].rbo.mean <= 1
    assert len(found.queries) == 3


async def test_the_same_seed_gives_the_same_figures(gateway: FakeGateway, write_data: WriteData) -> None:
    data = write_data(**many_queries(60))
    first, again, other = [(await run(gateway, request_for(data, "plain", "raw", seed=seed)))[0] for seed in (1, 1, 2)]
    assert (first.arms, first.contrasts, first.agreements, first.queries) == (
        again.arms, again.contrasts, again.agreements, again.queries,
    )  # fmt: skip
    assert first.contrasts[0].difference.mean == other.contrasts[0].difference.mean
    assert (first.seed, other.seed) == (1, 2)


async def test_the_query_itself_is_left_out(gateway: FakeGateway, write_data: WriteData) -> None:
    data = write_data({"x": "red balloon", "y": "blue balloon"}, {"x": "red balloon"}, {("x", "y"): 1})
    _, rankings = await run(gateway, request_for(data, "plain", "tasks"))
    assert [document for document, _ in rankings["plain"]["x"]] == ["y"]


async def test_documents_that_are_numbered_like_the_queries_are_found(
    gateway: FakeGateway, write_data: WriteData
) -> None:
    """Both are numbered from 0, and each query is answered by the document of its number."""
    data = write_data(
        {str(number): f"thing{number} and more{number}" for number in range(100)},
        {str(number): f"thing{number} and" for number in range(100)},
        {(str(number), str(number)): 1 for number in range(100)},
    )
    found, _ = await run(gateway, request_for(data, "tasks", "plain"))
    assert found.arms[0].quality["nDCG@10"].mean > 0.95
    assert "100 queries have the id of a document with another text." in "\n".join(found.notes)


async def test_another_run_embeds_nothing_and_says_so(gateway: FakeGateway, write_data: WriteData) -> None:
    """The eight texts count once, also where two arms use their vectors."""
    request = request_for(write_data(), "tasks", "tasks@8")
    first, _ = await run(gateway, request)
    assert not any("earlier run" in note for note in first.notes)
    gateway.transport.embedded.clear()
    second, _ = await run(gateway, request)
    assert gateway.transport.texts() == []
    assert f"8 vectors were embedded by an earlier run, and read from {request.cache}." in second.notes
    assert second.queries == first.queries


async def notes(gateway: FakeGateway, data: Path, *arms: str) -> str:
    return "\n".join((await run(gateway, request_for(data, *arms)))[0].notes)


async def test_notes(gateway: FakeGateway, write_data: WriteData) -> None:
    """The report has all notes that apply, and no others."""
    few = await notes(gateway, write_data(), "plain", "tasks")
    assert "The search is exact" in few
    assert "3 queries are too few to distinguish models; at least 50 are needed." in few
    assert "The cost was not measured." in few
    assert "of one space" not in few
    assert "judged documents among their first ten" not in few
    enough = await notes(gateway, write_data(**many_queries(60)), "plain", "tasks")
    assert "too few" not in enough


async def test_arms_of_one_space_are_noted(gateway: FakeGateway, write_data: WriteData) -> None:
    same = await notes(gateway, write_data(), "plain", "plain@32")
    assert "plain and plain@32 are in one space: any difference comes from rounding." in same
    tasks = await notes(gateway, write_data(), "tasks", "backwards")
    assert "tasks and backwards are in one space, and differ in the tasks" in tasks


async def test_an_instruction_for_queries_alone_is_noted(gateway: FakeGateway, write_data: WriteData) -> None:
    note_text = await notes(gateway, write_data(), "plain", "queries")
    assert "queries has an instruction for queries but not for documents" in note_text
    assert "plain has an instruction" not in note_text


async def test_arms_that_are_not_judged_alike_get_no_verdict_until_they_are(
    gateway: FakeGateway, write_data: WriteData, tmp_path: Path
) -> None:
    """Only the worse arm's documents are judged, so it looks better. With the file to fill in, the truth is found."""
    made = many_queries(80)
    whole = write_data(**made)
    arms = ("tasks@8", "tasks")
    _, rankings = await run(gateway, request_for(whole, *arms))
    right = {f"q{number}": f"d{number}" for number in range(80)}
    pooled = {
        (query, document): int(document == right[query] or place == 9)
        for query, found in rankings["tasks@8"].items()
        for place, (document, _) in enumerate(found[:10])
    }
    data = write_data(made["documents"], made["queries"], pooled)
    found, _ = await run(gateway, request_for(data, *arms))
    assert found.contrasts[0].difference.mean < 0
    assert found.contrasts[0].condensed is not None
    assert found.contrasts[0].condensed.mean > 0
    assert found.contrasts[0].verdict == Verdict.NOT_JUDGED_ALIKE
    assert found.bottom_line.advice == Advice.JUDGE_MORE
    note_text = "\n".join(found.notes)
    assert "The arms differ in the share of judged documents among their first ten (tasks@8 1.00, tasks 0." in note_text
    assert "tasks and tasks@8 are not judged alike" in render_page(found)

    dataset = read_dataset(data, None)
    form = write_to_judge(found, dataset, tmp_path)
    assert form is not None
    header, *lines = form.read_text().splitlines()
    assert header == "query-id\tcorpus-id\tscore\tquery\tdocument"
    cells = [line.split("\t") for line in lines]
    assert {tuple(line[:2]) for line in cells}.isdisjoint(pooled)
    assert all(line[2] == "" and line[4] == made["documents"][line[1]] for line in cells)
    filled = "\n".join("\t".join([*line[:2], str(int(right[line[0]] == line[1]))]) for line in cells)
    (tmp_path / "filled.tsv").write_text(f"query-id\tcorpus-id\tscore\n{filled}\n")
    found, _ = await run(gateway, request_for(data, *arms, judged=tmp_path / "filled.tsv"))
    assert found.contrasts[0].condensed is None
    assert found.contrasts[0].verdict == Verdict.BETTER


async def test_lists_of_relevant_documents_alone_are_reported_as_such(
    gateway: FakeGateway, write_data: WriteData, tmp_path: Path
) -> None:
    """The share of judged documents is then the precision, and differs because one arm is better."""
    data = write_data(**many_queries(60))
    found, _ = await run(gateway, request_for(data, "tasks", "tasks@8"))
    assert "Judged@10" not in found.arms[0].quality
    assert found.contrasts[0].verdict == Verdict.WORSE
    note_text = "\n".join(found.notes)
    assert "Only relevant documents are listed" in note_text
    assert "judged documents among their first ten" not in note_text
    assert write_to_judge(found, read_dataset(data, None), tmp_path) is None


async def test_cost_is_measured_in_turns(gateway: FakeGateway, write_data: WriteData) -> None:
    found, _ = await run(gateway, request_for(write_data(), "tasks", "tasks@8", "plain", measures_cost=True))
    for arm in found.arms:
        assert arm.cost is not None
        assert 0 < arm.cost.texts_per_s < arm.cost.tokens_per_s
        assert arm.cost.p50_s > 0
    same, other = found.cost_contrasts
    assert (same.arm, same.is_same_model, same.query_time) == ("tasks@8", True, None)
    assert found.arms[0].cost == found.arms[1].cost
    assert other.query_time is not None
    assert other.query_time.num_pairs >= 60
    assert found.load is not None
    asked = [body["model"] for body in gateway.transport.embedded if "dimensions" in body and body["input"] != [PROBE]]
    assert set(asked) == {"tasks", "plain"}
    assert not any("cost" in note for note in found.notes)


async def test_times_of_the_gateways_cache_are_left_out(
    start_gateway: StartGateway, make_words_model: MakeModel, write_data: WriteData
) -> None:
    """The first round fills the cache, and the others would measure it: a slow model would look like the fastest one."""
    cached = make_words_model("cached", width=16)
    entry = cached.entry.model_copy(update={"cache": CacheConfig.model_validate({"max_bytes": "2MiB"})})
    models = [replace(cached, entry=entry), *(make_words_model(name, width=16) for name in ("one", "two"))]
    gateway = await start_gateway(*models)

    found, _rankings = await run(gateway, request_for(write_data(), "one", "cached", "two", measures_cost=True))

    assert [arm.cost is not None for arm in found.arms] == [True, False, True]
    assert [one.query_time is not None for one in found.cost_contrasts] == [False, True]
    assert sum("read texts of cached from its cache of vectors" in note for note in found.notes) == 1
    rows = {row.label: row for groups in table_groups(found) for _name, some in groups for row in some}
    assert [cell.value for cell in rows["time of a query, ratio"].cells][1] == "not measured"


async def test_an_experiment_is_not_an_arm(gateway: FakeGateway, write_data: WriteData) -> None:
    def say_experiment(body: dict[str, Any]) -> httpx.Response | None:
        if body["model"] != "plain":
            return None
        answer = {"data": [{"embedding": "AACAPw=="}], "usage": {"prompt_tokens": 1}}
        headers = {"x-gateway-space": "plain@0123456789ab", "x-gateway-experiment": "ab"}
        return httpx.Response(200, json=answer, headers=headers)

    gateway.transport.before = say_experiment
    with pytest.raises(CompareError, match="plain is an experiment, which uses several models: name those"):
        await run(gateway, request_for(write_data(), "tasks", "plain"))
