"""Duels over HTTP: blind until the end, each vote once, and for the operator only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from gateway.compare.outputs import write_results
from gateway.comparisons.dueling import DuelFolder
from tests.compare.results_example import BGE, JINA, make_comparison

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
OPERATOR = {"authorization": "Bearer operator-key"}
RUN = "not judged"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_results(make_comparison(JINA, BGE, num_queries=60, has_judgments=False), {}, folder / RUN)
    return folder


@pytest.fixture
async def operator(connect: Connect, runs: Path) -> httpx.AsyncClient:
    client = await connect(admin_key="operator-key", api_keys="client-key", runs_dir=runs)
    client.headers.update(OPERATOR)
    return client


async def begin(operator: httpx.AsyncClient) -> tuple[str, dict]:
    body = {"comparison": RUN, "baseline": JINA.name, "arm": BGE.name}
    card = (await operator.post("/admin/duels", json=body)).json()
    return f"/admin/duels/{RUN}/{card['name']}", card


async def test_a_duel_is_blind_until_its_end_and_then_says_which_arm_is_preferred(
    operator: httpx.AsyncClient, runs: Path
) -> None:
    path, card = await begin(operator)
    duel, _votes = DuelFolder(runs / RUN).read(card["name"])
    for number in range(17):
        assert JINA.name not in str(card)
        assert BGE.name not in str(card)
        turn = card["pair"]["turn"]
        assert turn == number
        # Always for the arm, which is on the left if the sides are swapped; marked is its first text.
        side = "left" if duel.turns[turn].is_swapped else "right"
        vote = {"turn": turn, "choice": side, "marked": [card["pair"][side][0]["document"], "made up"]}
        answer = await operator.post(f"{path}/votes", json=vote)
        card = answer.json()
        assert (answer.status_code, card["counted"]) == (200, True)
    assert card["standing"]["shows_preference"]
    assert card["standing"]["share"] == 1
    assert card["result"] is None

    ended = (await operator.post(f"{path}/end")).json()

    result = ended["result"]
    assert ended["pair"] is None
    assert result["preferred"] == BGE.name
    assert result["verdict"] == f"{BGE.name} is preferred to {JINA.name}"
    assert (result["for_baseline"], result["for_arm"], result["repeated"], result["consistent"]) == (0, 16, 1, 1)
    rows = (await operator.get(f"{path}/qrels")).text.splitlines()
    assert rows[0] == "query-id\tcorpus-id\tscore"
    assert len(rows) - 1 == result["judgments"]
    assert {row.split("\t")[2] for row in rows[1:]} == {"0", "1"}
    assert "made up" not in str(rows)
    assert [entry["ended"] for entry in (await operator.get("/admin/duels")).json()["data"]][:1] == [True]


async def test_a_repeated_vote_changes_nothing_and_each_voter_sees_all_pairs(operator: httpx.AsyncClient) -> None:
    path, _card = await begin(operator)
    first = (await operator.post(f"{path}/votes", json={"turn": 0, "choice": "tie"})).json()
    again = (await operator.post(f"{path}/votes", json={"turn": 0, "choice": "left"})).json()
    ahead = (await operator.post(f"{path}/votes", json={"turn": 5, "choice": "left"})).json()
    ada = (await operator.post(f"{path}/votes", json={"turn": 0, "choice": "bad", "voter": "ada"})).json()

    assert [card["counted"] for card in (first, again, ahead, ada)] == [True, False, False, True]
    assert again["pair"] == ahead["pair"] == first["pair"]
    assert (ada["standing"]["votes"], ada["standing"]["ties"], ada["standing"]["both_bad"]) == (2, 1, 1)
    undone = (await operator.post(f"{path}/undo", params={"voter": "ada"})).json()
    assert (undone["pair"]["turn"], undone["standing"]["votes"]) == (0, 1)
    assert (await operator.get(path)).json()["pair"]["turn"] == 1
    assert (await operator.get(path, params={"voter": "ada"})).json()["pair"]["turn"] == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("", {"comparison": RUN, "baseline": "a", "arm": "b"}, 400, "choose two different arms"),
        ("", {"comparison": RUN, "baseline": JINA.name, "arm": JINA.name}, 400, "choose two different arms"),
        ("", {"comparison": "../x", "baseline": "a", "arm": "b"}, 404, "no comparison is called"),
        ("", {"comparison": RUN}, 400, "baseline"),
        ("/votes", {"turn": 0, "choice": "both"}, 400, "a vote is one of: left, right, tie, bad, skip"),
        ("/votes", {"turn": -1, "choice": "tie"}, 400, "turn"),
        (
            "/votes",
            {"turn": 0, "choice": "tie", "voter": "x" * 65},
            400,
            "`voter` must have 1 to 64 characters, got 65",
        ),
        ("/votes", {"turn": 0, "choice": "tie", "voter": "a\nb"}, 400, "`voter` must have printable characters only"),
        ("/votes", {"turn": 0, "choice": "tie", "marked": "d1"}, 400, "marked"),
        ("/nothing/votes", {"turn": 0, "choice": "tie"}, 404, "no duel is called"),
    ],
)
async def test_a_wrong_request_names_the_problem(
    operator: httpx.AsyncClient, path: str, body: dict, status: int, message: str
) -> None:
    if path == "/votes":
        path = (await begin(operator))[0].removeprefix("/admin/duels") + path
    elif path:
        path = f"/{RUN}{path}"
    answer = await operator.post(f"/admin/duels{path}", json=body)
    assert answer.status_code == status
    assert message in answer.json()["message"]


@pytest.mark.parametrize(
    ("query", "message"), [("voter=Jos%E9", "`voter` is not UTF-8"), ("voter=ada&voter=bob", "given 2 times")]
)
async def test_a_voter_that_would_be_read_as_another_is_refused(
    operator: httpx.AsyncClient, query: str, message: str
) -> None:
    path, _card = await begin(operator)
    for method, place in (("GET", ""), ("POST", "/undo"), ("POST", "/end")):
        answer = await operator.request(method, f"{path}{place}?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "voter")
        assert message in answer.json()["message"]
    assert (await operator.get(path, params={"voter": "José"})).status_code == 200


async def test_only_the_operator_votes(operator: httpx.AsyncClient, connect: Connect) -> None:
    path, _card = await begin(operator)
    for headers in ({"authorization": "Bearer client-key"}, {"authorization": ""}):
        for method, place in (
            ("GET", path),
            ("POST", f"{path}/votes"),
            ("GET", "/admin/duels"),
            ("GET", f"{path}/qrels"),
        ):
            answer = await operator.request(method, place, headers=headers)
            assert answer.status_code == 403
    without = await connect(admin_key="operator-key")
    answer = await without.get("/admin/duels", headers=OPERATOR)
    assert answer.status_code == 404
    assert "set GATEWAY_RUNS_DIR to a folder" in answer.json()["message"]
