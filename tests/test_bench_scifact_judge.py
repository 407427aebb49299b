"""The judge that knows SciFact's judgments: it grades as it is programmed to, over HTTP, and people fill in its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.scifact_judge import Judge, check_by_judgments, serve
from gateway.compare.judge.endpoint import connect_judge
from gateway.compare.judge.prompt import make_messages

NUM = 400


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = {
        "queries": [{"_id": f"q{i}", "text": f"claim number {i}"} for i in range(NUM)],
        "corpus": [{"_id": f"d{i}", "title": "A", "text": f"text {i}"} for i in range(NUM)],
    }
    for name, entries in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(NUM))]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(lines))
    return tmp_path


def test_it_grades_by_the_judgments_with_noise_and_a_taste(data: Path) -> None:
    judge = Judge(data)
    relevant = [judge.grade(f"claim number {i}", f"A text {i}") for i in range(NUM)]
    others = [judge.grade(f"claim number {i}", f"A text {i + 1}") for i in range(NUM - 1)]
    repeating = [judge.grade(f"claim number {i}", f"claim number {i}, again") for i in range(NUM)]
    assert relevant.count(3) / NUM == pytest.approx(0.8, abs=0.06)
    assert others.count(0) / NUM == pytest.approx(0.75, abs=0.06)
    assert repeating.count(0) == 0
    assert relevant == [judge.grade(f"claim number {i}", f"A text {i}") for i in range(NUM)]


async def test_it_answers_as_a_chat_endpoint(data: Path) -> None:
    judge = Judge(data)
    with serve(judge) as url:
        async with connect_judge(url, "stand-in", None) as endpoint:
            answer = await endpoint.find_dialect(make_messages("claim number 1", "A text 1"))
    assert answer.grade == judge.grade("claim number 1", "A text 1")


def test_people_grade_as_the_judgments(data: Path) -> None:
    path = data / "judge_check.tsv"
    path.write_text("query-id\tcorpus-id\tscore\tquery\tdocument\nq1\td1\t\ta\tb\nq1\td2\t\ta\tb\n")
    assert check_by_judgments(path, data).read_text().splitlines()[1:] == ["q1\td1\t3\ta\tb", "q1\td2\t0\ta\tb"]
