"""People's grades over HTTP: blind, the first of each document counts, the verdict at the end, for the operator only."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from gateway.comparisons.scale import SCALE
from gateway.comparisons.sheet import CHECK_FILE, Sheet
from tests.compare.judge.folders import grade_by_hand, make_judged_folder
from tests.compare.judge.test_judging import PAIRS_PER_QUERY, World

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
OPERATOR = {"authorization": "Bearer operator-key"}
RUN = "judged"
PATH = f"/admin/comparisons/{RUN}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_judged_folder(folder / RUN, tmp_path_factory.mktemp("cache")), folder


@pytest.fixture
def runs(made: tuple[World, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[1], tmp_path / "runs")


@pytest.fixture
async def operator(connect: Connect, runs: Path) -> httpx.AsyncClient:
    client = await connect(admin_key="operator-key", api_keys="client-key", runs_dir=runs)
    client.headers.update(OPERATOR)
    return client


async def grade(operator: httpx.AsyncClient, card: dict, value: int, **more: str) -> dict:
    body = {name: card["next"][name] for name in ("query", "document")}
    answer = await operator.post(f"{PATH}/grades", json={**body, "grade": value, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_documents_are_graded_blind_and_taken_back(operator: httpx.AsyncClient, runs: Path) -> None:
    card = (await operator.get(f"{PATH}/grading")).json()
    assert [one["meaning"] for one in card["scale"]] == list(SCALE)
    assert (card["graded"], card["documents"], card["needed"], card["counted"]) == (0, 60 * PAIRS_PER_QUERY, 60, None)
    assert set(card["next"]) == {"place", "query", "document", "query_text", "document_text"}
    assert card["next"]["document_text"].startswith(card["next"]["document"])

    second = await grade(operator, card, 3)
    late = await grade(operator, card, 1)
    third = (await operator.get(f"{PATH}/grading", params={"after": second["next"]["place"]})).json()
    bob = (await operator.get(f"{PATH}/grading", params={"grader": "bob"})).json()
    undone = (await operator.post(f"{PATH}/grades/undo")).json()

    assert (second["graded"], second["counted"], second["can_undo"], late["counted"]) == (1, True, True, False)
    assert [one["next"]["place"] for one in (card, second, third)] == [1, 2, 3]
    assert bob["next"]["query"] != card["next"]["query"]
    assert (undone["next"], undone["graded"], undone["can_undo"]) == (card["next"], 0, False)
    assert not any(row.score for row in Sheet((runs / RUN / CHECK_FILE).read_bytes()).pairs.values())


async def test_the_verdict_has_the_agreement_of_the_judge(
    operator: httpx.AsyncClient, made: tuple[World, Path], runs: Path
) -> None:
    early = await operator.post(f"{PATH}/verdict")
    assert early.status_code == 400
    assert "0 of 60 queries are graded completely, and a verdict needs 60" in early.json()["message"]
    grade_by_hand(made[0], runs / RUN, num_left=1)
    card = (await operator.get(f"{PATH}/grading")).json()
    last = await grade(operator, card, made[0].people[card["next"]["query"], card["next"]["document"]])
    assert (last["next"], last["whole_queries"]) == (None, 60)

    answer = await operator.post(f"{PATH}/verdict")

    judge = answer.json()["results"]["judge"]
    assert answer.status_code == 200
    assert judge["check"] == {"num_queries": 60, "num_pairs": 480, "kappa": {"mean": 1.0, "low": 1.0, "high": 1.0}}
    assert judge["contrasts"][0]["verdict"] == "better"
    assert answer.json()["bottom_line"] == "Switch to new: by the judge, corrected by people, it is better than old."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grade": 4}, "grade"),
        ({"grade": -1}, "grade"),
        ({"grade": "good"}, "grade"),
        ({"query": "made up"}, "has no query 'made up'"),
        ({"query": None}, "query"),
        ({"grader": "x" * 65}, "`grader` must have 1 to 64 characters, got 65"),
        ({"grader": "a\nb"}, "`grader` must have printable characters only"),
    ],
)
async def test_a_wrong_grade_names_the_problem(operator: httpx.AsyncClient, change: dict, message: str) -> None:
    card = (await operator.get(f"{PATH}/grading")).json()
    body = {"query": card["next"]["query"], "document": card["next"]["document"], "grade": 1}
    answer = await operator.post(f"{PATH}/grades", json={**body, **change})
    assert answer.status_code == 400
    assert message in answer.json()["message"]


@pytest.mark.parametrize(
    ("query", "message"), [("grader=Jos%E9", "`grader` is not UTF-8"), ("grader=ada&grader=bob", "given 2 times")]
)
async def test_a_grader_that_would_be_read_as_another_is_refused(
    operator: httpx.AsyncClient, query: str, message: str
) -> None:
    for method, place in (("GET", "grading"), ("POST", "grades/undo")):
        answer = await operator.request(method, f"{PATH}/{place}?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "grader")
        assert message in answer.json()["message"]
    assert (await operator.get(f"{PATH}/grading", params={"grader": "José"})).status_code == 200


@pytest.mark.parametrize("after", ["-1", "", "x", "1.5", "+1", "\u0661"])
async def test_a_wrong_place_names_the_problem(operator: httpx.AsyncClient, after: str) -> None:
    answer = await operator.get(f"{PATH}/grading", params={"after": after})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")


@pytest.mark.parametrize("after", ["480", "999999", "9" * 5_000])
async def test_a_place_beyond_the_end_is_the_start(operator: httpx.AsyncClient, after: str) -> None:
    assert (await operator.get(f"{PATH}/grading", params={"after": after})).json()["next"]["place"] == 1


async def test_only_the_operator_grades(operator: httpx.AsyncClient, connect: Connect) -> None:
    for headers in ({"authorization": "Bearer client-key"}, {"authorization": ""}):
        for method, place in (("GET", "grading"), ("POST", "grades"), ("POST", "grades/undo"), ("POST", "verdict")):
            answer = await operator.request(method, f"{PATH}/{place}", headers=headers, json={})
            assert answer.status_code in (401, 403)
    without = await connect(admin_key="operator-key")
    answer = await without.get(f"{PATH}/grading", headers=OPERATOR)
    assert (answer.status_code, "set GATEWAY_RUNS_DIR" in answer.json()["message"]) == (404, True)
