"""The file for people: blind, readable by spreadsheets, and read back with its mistakes named."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from gateway.compare.dataset import Dataset
from gateway.compare.judge.check import check_lines, complete_queries, read_check
from gateway.compare.judge.pool import draw_checked, draw_repeated, first_documents, make_pool
from gateway.compare.judge.values import Pair
from gateway.errors import CompareError

HEADER = "query-id\tcorpus-id\tscore\tquery\tdocument"


def make_dataset(num_queries: int = 3) -> Dataset:
    queries = {f"q{i}": f'query\t{i}\nwith "quotes"' for i in range(num_queries)}
    documents = {"d 1": "=1+1", "d2": "x" * 30_000, 'd"3"': "a\rb\ud83d"}
    return Dataset(Path("data"), None, documents, queries, {}, 0, (), {}, frozenset())


def make_rankings(dataset: Dataset) -> dict[str, dict[str, list[tuple[str, float]]]]:
    hits = [(document, 1.0) for document in dataset.documents]
    return {"a": dict.fromkeys(dataset.queries, hits[:2]), "b": dict.fromkeys(dataset.queries, hits[1:])}


def rows(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode()), delimiter="\t"))


def test_people_see_neither_arm_nor_grade_and_no_formula() -> None:
    dataset = make_dataset()
    pool = make_pool(make_rankings(dataset), 0)
    header, *lines = rows(b"".join(check_lines(dataset, pool, 0)))
    assert "\t".join(header) == HEADER
    assert sorted((query, document) for query, document, *_ in lines) == sorted(
        (query, document) for query in dataset.queries for document in dataset.documents
    )
    assert {score for _query, _document, score, *_ in lines} == {""}
    by_document = {document: text for _query, document, _score, _text, text in lines}
    assert by_document == {"d 1": " =1+1", "d2": "x" * 20_000, 'd"3"': "a b?"}
    assert {text for _query, _document, _score, text, _ in lines} == {f'query {i} with "quotes"' for i in range(3)}


def test_the_grades_of_people_are_read(tmp_path: Path) -> None:
    dataset = make_dataset()
    pool = make_pool(make_rankings(dataset), 0)
    people = {query: {document: place for place, document in enumerate(dataset.documents)} for query in dataset.queries}
    path = tmp_path / "check.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(check_lines(dataset, pool, 0, people)).replace(b"\n", b"\r\n"))

    assert read_check(path) == people
    assert complete_queries(read_check(path), dataset, pool, 0, path) == (people, [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0\td2\t4", ":2: the score must be 0, 1, 2 or 3, or empty, got '4'"),
        ("q0\td2\tyes", ":2: the score must be 0, 1, 2 or 3, or empty, got 'yes'"),
        ("q0\td2", ":2: must have the columns query-id, corpus-id, score, query, document, separated by tabs"),
        ("q0,d2,3,a,b", ":2: must have the columns"),
        ("q0\td2\t3\nq0\td2\t1", ":3: query 'q0' and document 'd2' have score 1, and 3 earlier"),
        ("q0\td2\t", ": has no score; fill in the column `score` with 0, 1, 2 or 3"),
        ("q0\td2\t3\t" + "x" * 200_000, ":2: cannot be read: field larger than field limit"),
        ("q0\t\xff\t3".encode("latin-1"), ":2: is not UTF-8"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "check.tsv"
    path.write_bytes(HEADER.encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()))
    limit = csv.field_size_limit(2**17)  # the default; `gateway embed`, which other tests run, raises it
    try:
        with pytest.raises(CompareError) as caught:
            read_check(path)
    finally:
        csv.field_size_limit(limit)
    assert f"{path}{message}" in str(caught.value)


def test_a_file_without_its_header(tmp_path: Path) -> None:
    path = tmp_path / "check.tsv"
    path.write_text("q0\td2\t3\n")
    with pytest.raises(
        CompareError, match=":1: the header is missing: the first line must be query-id, corpus-id, score"
    ):
        read_check(path)
    with pytest.raises(CompareError, match="there is no such file"):
        read_check(tmp_path / "absent.tsv")


def test_the_pool_has_each_pair_once_in_an_order_that_does_not_show_the_arms() -> None:
    dataset = make_dataset(40)
    rankings = make_rankings(dataset)
    pool = make_pool(rankings, 0)
    assert len(pool) == len(set(pool)) == 120
    assert pool == make_pool(dict(reversed(rankings.items())), 0)
    assert pool != make_pool(rankings, 1)
    assert [pair.query for pair in pool] != sorted(pair.query for pair in pool)


def test_only_the_first_ten_are_pooled_and_the_unjudged_are_passed_over() -> None:
    ranking = {"q": [(f"d{i:02}", 1.0 - i / 100) for i in range(12)]}
    assert len(make_pool({"a": ranking}, 0)) == 10
    grades = {"q": {f"d{i:02}": 0 for i in range(12) if i != 3}}
    assert [document for document, _ in first_documents(ranking, grades)["q"]] == [
        "d00", "d01", "d02", "d04", "d05", "d06", "d07", "d08", "d09",
    ]  # fmt: skip


def test_samples_are_random_and_the_same_each_time() -> None:
    pool = [Pair(f"q{i}", "d") for i in range(1000)]
    again = draw_repeated(pool, 0)
    assert len(set(again)) == 100
    assert again == draw_repeated(pool, 0)
    assert len(draw_repeated(pool[:40], 0)) == 30
    queries = [f"q{i}" for i in range(300)]
    checked = draw_checked(queries, {}, 0)
    assert len(set(checked)) == 60
    assert checked == draw_checked(queries[::-1], {}, 0)
    assert checked != draw_checked(queries, {}, 1)


def test_of_queries_that_depend_on_each_other_one_is_checked_first() -> None:
    queries = [f"q{i}" for i in range(120)]
    groups = {
        query: f"topic {int(query[1:]) // 3}" for query in queries[:90]
    }  # 30 topics of three, and 30 queries alone
    checked = draw_checked(queries, groups, 0)
    assert len(checked) == 60
    assert len({groups.get(query, query) for query in checked}) == 60
    assert len(draw_checked(queries[:90], groups, 0)) == 60
