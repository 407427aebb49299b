"""Written files are read back unchanged, and other tools measure the same values."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import ir_measures
import numpy as np
import pytest

from gateway.compare.beir import add_judgments
from gateway.compare.outputs import file_names, write_results
from gateway.compare.quality import measure
from gateway.compare.results import MEASURES, Comparison
from gateway.compare.search import Ranking, make_ranking, search
from gateway.comparisons.sheet import form_line
from gateway.errors import CompareError
from tests.compare.results_example import BGE, JINA, make_comparison


def rankings_of(comparison: Comparison) -> dict[str, Ranking]:
    return {
        arm.name: {
            query.id: [(hit.document, hit.score) for hit in query.rankings[arm.name]] for query in comparison.queries
        }
        for arm in comparison.arms
    }


def write_runs(rankings: Mapping[str, Ranking], folder: Path) -> list[Path]:
    return write_results(make_comparison(JINA, BGE, num_queries=2), rankings, folder)[2:]


def test_json_has_everything_but_the_queries(tmp_path: Path) -> None:
    comparison = make_comparison(JINA, BGE, num_queries=3)
    paths = write_results(comparison, rankings_of(comparison), tmp_path / "new" / "folder")
    names = ["results.json", "queries.jsonl", "runs/jina-embeddings-v3.trec", "runs/bge-m3.trec"]
    assert [str(path.relative_to(tmp_path / "new" / "folder")) for path in paths] == names
    results = json.loads(paths[0].read_text())
    assert "queries" not in results
    assert "not of measures" in results["reading"]["p_holm"]
    assert results["bottom_line"] == {
        "advice": "too few queries",
        "arm": None,
        "text": "Too few queries: at least 50 are needed to decide whether to replace jina-embeddings-v3, not 3.",
    }
    assert results["dataset"]["sha256"] == comparison.dataset.sha256
    assert results["arms"][1]["quality"]["R@100"]["low"] == comparison.arms[1].quality["R@100"].low
    assert results["contrasts"][0]["verdict"] == "too few queries"
    assert [arm["name"] for arm in results["arms"]] == [arm.name for arm in comparison.arms]
    lines = [json.loads(line) for line in paths[1].read_text().splitlines()]
    assert [line["id"] for line in lines] == [query.id for query in comparison.queries]
    assert lines[2]["quality"] == comparison.queries[2].quality
    assert lines[0]["rankings"]["bge-m3"][0]["document"] == comparison.queries[0].rankings["bge-m3"][0].document


def test_other_mappings_and_numbers_of_numpy_are_written(tmp_path: Path) -> None:
    comparison = replace(
        make_comparison(JINA, num_queries=1), versions=MappingProxyType({"numpy": "2"}), notes=deque(["a note"])
    )
    comparison = replace(comparison, queries=[replace(comparison.queries[0], overlap={"x": np.float64(0.5)})])
    results, queries = write_results(comparison, {}, tmp_path)
    assert json.loads(results.read_text())["versions"] == {"numpy": "2"}
    assert json.loads(results.read_text())["notes"] == ["a note"]
    assert json.loads(queries.read_text())["overlap"] == {"x": 0.5}


def test_runs_are_measured_by_others_as_they_were_here(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = sorted((f"d{number}" for number in range(60)), reverse=True)
    # There are few different vectors, so most scores are equal.
    documents, queries = (rng.integers(-1, 2, (size, 2)).astype(np.float32) for size in (60, 20))
    rankings = make_ranking([f"q{number}" for number in range(20)], ids, *search(queries, documents))
    judgments = {
        query: {ids[place]: int(rng.integers(0, 3)) for place in rng.choice(60, 8, replace=False)} for query in rankings
    }
    here = measure(rankings, judgments)
    (path,) = write_runs({"arm": rankings}, tmp_path)
    run = list(ir_measures.read_trec_run(str(path)))  # type: ignore[no-untyped-call]
    for found in ir_measures.iter_calc([ir_measures.parse_measure(name) for name in MEASURES], judgments, run):
        assert found.value == here[str(found.measure)][found.query_id], found


def test_equal_scores_are_in_the_order_of_trec_eval(tmp_path: Path) -> None:
    """The scores are written unchanged; other tools rank equal scores in descending order of ids, as here."""
    ids = ["z", "é", "d9", "d10", "a"]
    ids.sort(reverse=True)
    vectors = np.ones((5, 1), dtype=np.float32)
    ranking = make_ranking(["q"], ids, *search(vectors[:1], vectors))
    for place, document in enumerate(ids):
        judgments = {"q": {document: 1}}
        exact = {query: dict(documents) for query, documents in ranking.items()}
        (found,) = ir_measures.iter_calc([ir_measures.nDCG @ 10], judgments, exact)
        assert found.value == pytest.approx(1 / np.log2(place + 2))
        assert found.value == measure(ranking, judgments)["nDCG@10"]["q"]


def test_lines_of_a_run(tmp_path: Path) -> None:
    score = float(np.float32(0.1) * np.float32(0.7))
    ranking = {"q 1": [("a\tb%", 0.5), ("100%", 0.5), ("é", score)], "q2": []}
    (path,) = write_runs({"bge m3": ranking}, tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert path.name == "bge_m3.trec"
    assert [line.split()[:4] for line in lines] == [
        ["q%201", "Q0", "a%09b%25", "1"],
        ["q%201", "Q0", "100%", "2"],
        ["q%201", "Q0", "é", "3"],
    ]
    assert [float(line.split()[4]) for line in lines] == [
        0.5,
        float(np.nextafter(np.float32(0.5), np.float32(0))),
        score,
    ]
    assert {line.split()[5] for line in lines} == {"bge%20m3"}


@pytest.mark.parametrize("space", [" ", "\n", "\r", "\u00a0", "\u3000", "\x1c", "\x85", "\u2028"])
def test_no_space_splits_an_id(tmp_path: Path, space: str) -> None:
    (path,) = write_runs({"arm": {f"q{space}": [(f"{space}d", 1.0)]}}, tmp_path)
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert len(line.split()) == 6


def test_file_names_are_safe_and_unique() -> None:
    names = file_names(["a/b", "a b", "A_B", "a_b-2", "..", "../x", "con", "Nul.x", "é" * 300, "", "jina@256"])
    assert names["a/b"] == "a_b"
    assert names["jina@256"] == "jina@256"
    assert len({name.lower() for name in names.values()}) == len(names) == 11
    for name in names.values():
        assert name
        assert len(name) <= 110
        assert not set(name) & set('/\\:*?"<>| ')
        assert not name.startswith(".")
        assert name.split(".")[0].lower() not in {"con", "nul"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CompareError, match=r"taken/queries\.jsonl: cannot be written: "):
        write_results(make_comparison(num_queries=1), {}, tmp_path / "taken")


def test_files_are_the_same_when_written_again(tmp_path: Path) -> None:
    comparison = make_comparison(JINA, BGE, num_queries=3)
    first = [path.read_bytes() for path in write_results(comparison, rankings_of(comparison), tmp_path)]
    assert [path.read_bytes() for path in write_results(comparison, rankings_of(comparison), tmp_path)] == first


def test_a_spreadsheet_loses_no_line_of_the_form(tmp_path: Path) -> None:
    """A text that begins with a quotation mark must not swallow the lines after it."""
    rows = [['"e1', 'd"2', "", '"Unbalanced', 'a "quoted" text'], ["q1", "d1", "", "plain", "=1+1"]]
    form = tmp_path / "to_judge.tsv"
    form.write_bytes(b"".join(map(form_line, [["query-id", "corpus-id", "score", "query", "document"], *rows])))

    with form.open(newline="") as file:
        header, *read = csv.reader(file, "excel-tab")
    assert read == rows
    for row in read:
        row[2] = "1"
    with form.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, "excel-tab").writerows([header, *read])

    judgments: dict[str, dict[str, int]] = {}
    assert add_judgments(judgments, form) == (2, 0)
    assert judgments == {'"e1': {'d"2': 1}, "q1": {"d1": 1}}
