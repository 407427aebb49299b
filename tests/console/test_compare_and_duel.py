"""Comparisons and duels in a browser, over files that `gateway compare` wrote."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.compare.outputs import write_results
from gateway.comparisons.dueling import DuelFolder
from gateway.comparisons.duels import MAX_PAIRS, Duel, Vote, draw, qrels, stand, verdict
from gateway.comparisons.jobs import Jobs
from gateway.comparisons.runs import Query, Runs
from gateway.comparisons.scale import SCALE
from gateway.comparisons.sheet import CHECK_FILE, Sheet
from gateway.console.duel import _seconds_since
from gateway.errors import BadInput, NotFound
from tests.compare.judge.folders import make_judged_folder
from tests.compare.judge.stand_in import Reply, graded, serve_judge, texts_of
from tests.compare.results_example import BGE, JINA, make_comparison
from tests.console.served import HOSTILE, OPERATOR, Gateway, serving
from tests.peers import find_module


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write comparisons as `gateway compare --out` does, one of them with hostile texts, and one that is damaged."""
    folder = tmp_path_factory.mktemp("runs")
    judged = make_comparison(num_queries=80)
    hostile = dataclasses.replace(judged.queries[0], text=f"{HOSTILE} {judged.queries[0].text}")
    judged = dataclasses.replace(judged, queries=[hostile, *judged.queries[1:]], notes=[HOSTILE])
    write_results(judged, {}, folder / "support faq")
    write_results(make_comparison(JINA, BGE, num_queries=60, has_judgments=False), {}, folder / "not-judged")
    make_judged_folder(folder / "judged", tmp_path_factory.mktemp("cache"))
    shutil.copytree(folder / "judged", folder / "judged-too")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "results.json").write_text("{}")
    (folder / ".hidden").mkdir()
    return folder


@pytest.fixture(scope="module")
def gateway(runs: Path) -> Iterator[Gateway]:
    with serving(runs_dir=str(runs), admin_key=OPERATOR) as served:
        yield served


@contextmanager
def signed_in(gateway: Gateway, key: str = OPERATOR) -> Iterator[httpx.Client]:
    """Connect as a reader who has signed in."""
    with httpx.Client(
        base_url=gateway.url, headers={"origin": gateway.url}, follow_redirects=True, timeout=60
    ) as client:
        client.post("/console/sign-in", data={"key": key, "next": "/console"})
        yield client


def test_a_comparison_shows_its_verdict_first(gateway: Gateway, runs: Path, operator: Callable[..., Any]) -> None:
    results = json.loads((runs / "support faq" / "results.json").read_text())
    with operator(gateway.url, "/compare/support%20faq") as page:
        assert page.locator("h1").inner_text() == results["bottom_line"]["text"]
        assert HOSTILE in page.locator(".note").first.inner_text()
        forest = page.locator(".forest").first.inner_text()
        for arm in results["arms"]:
            assert arm["name"] in forest
        verdicts = [one["verdict"] for one in results["contrasts"] if one["measure"] == "nDCG@10"]
        assert page.locator(".forest .chip").all_inner_texts() == verdicts
        lost = page.locator("section", has=page.locator("#look")).locator("summary .bad-text").all_inner_texts()
        changes = [float(text.replace("\u2212", "-")) for text in lost]
        assert changes == sorted(changes)
        assert changes[0] < 0
        page.get_by_role("link", name="most gained").click()
        assert page.locator("summary .good-text").first.inner_text().startswith("+")


def test_a_comparison_without_judgments_names_no_winner(gateway: Gateway, operator: Callable[..., Any]) -> None:
    with operator(gateway.url, "/compare/not-judged") as page:
        assert "Without judgments" in page.locator("h1").inner_text()
        assert "in common with" in page.locator("main").inner_text()
        assert page.get_by_role("link", name="Vote on the queries that differ").count() == 1


def test_a_damaged_comparison_is_named(gateway: Gateway, operator: Callable[..., Any]) -> None:
    with operator(gateway.url, "/compare/damaged") as page:
        assert "results.json is not from a comparison" in page.get_by_role("alert").inner_text()
        assert page.locator(".list li").count() == 5


@pytest.mark.parametrize("name", ["..%2Fsecret", "%2e%2e", ".hidden", "nothing", "a%00b", "x" * 300])
def test_no_name_leads_out_of_the_folder(gateway: Gateway, name: str) -> None:
    with signed_in(gateway) as client:
        assert client.get(f"/console/compare/{name}").status_code == 404


def test_without_a_folder_the_page_shows_the_command(operator: Callable[..., Any]) -> None:
    with serving(admin_key=OPERATOR) as served, operator(served.url, "/compare") as page:
        assert "GATEWAY_RUNS_DIR" in page.locator("main").inner_text()
        assert "gateway compare MODEL-A MODEL-B" in page.locator("pre").inner_text()
        page.goto(f"{served.url}/console/duel")
        assert "takes its lists from a comparison" in page.locator("main").inner_text()


@pytest.mark.parametrize("settings", [{}, {"console": "public", "api_keys": "client-secret"}])
def test_comparisons_hold_texts_so_only_the_operator_sees_them(runs: Path, settings: dict[str, str]) -> None:
    with serving(runs_dir=str(runs), **settings) as served, signed_in(served, "client-secret") as client:
        for path in ("/console/compare/not-judged", "/console/compare/judged/grade", "/console/new-comparison"):
            assert client.get(path).status_code == 403
        for path in ("/console/compare", "/console/duel"):
            page = client.get(path)
            assert page.status_code == 200
            assert "for the operator" in page.text
            assert "Set <code>GATEWAY_ADMIN_KEY</code>, and <code>GATEWAY_RUNS_DIR</code>" in page.text
            assert "not-judged" not in page.text


# --------------------------------------------------------------------------------------------------------------- duel


def begin(page: Any, url: str, run: str = "not-judged") -> None:
    page.goto(f"{url}/console/duel?run={run}")
    page.get_by_role("button", name="Begin").click()
    page.locator("h1.query").wait_for()


def test_a_duel_is_blind_and_ends_with_a_verdict(gateway: Gateway, runs: Path, operator: Callable[..., Any]) -> None:
    with operator(gateway.url, "/duel") as page:
        begin(page, gateway.url)
        place = page.url.rpartition("/")[2]
        duel = Duel.model_validate_json((runs / "not-judged" / "duels" / place / "duel.json").read_text())
        for _ in range(17):  # always for the arm, wherever it is
            html = page.content()
            assert duel.baseline not in html
            assert duel.arm not in html
            turn = int(page.locator("[name=turn]").get_attribute("value"))
            key = "ArrowLeft" if duel.turns[turn].is_swapped else "ArrowRight"
            page.locator("h1").click()
            page.keyboard.press("1")  # marks the first of the left list
            with page.expect_navigation():
                page.keyboard.press(key)
        assert page.locator("#sofar").inner_text() == "A preference shows"
        with page.expect_navigation():
            page.keyboard.press("u")
        assert page.locator(".small.muted").first.inner_text().startswith("15 of 50")
        page.get_by_role("button", name="End, and show the names").click()
        assert page.locator("h1").inner_text() == f"{duel.arm} is preferred to {duel.baseline}"
        assert "1 pair came again with the sides swapped, and 1 got the same vote" in page.locator("main").inner_text()
        files = {name: page.request.get(f"{page.url}/{name}").text() for name in ("qrels.tsv", "votes.jsonl")}
        rows = [line.split("\t") for line in files["qrels.tsv"].splitlines()[1:]]
        assert {grade for _query, _document, grade in rows} == {"0", "1"}
        votes = [json.loads(line) for line in files["votes.jsonl"].splitlines()]
        assert [vote for vote in votes if vote.get("undo")]
        assert {vote.get("preferred") for vote in votes} == {duel.arm, None}


def test_a_vote_sent_twice_counts_once(gateway: Gateway) -> None:
    with signed_in(gateway) as client:
        page = client.post("/console/duel", data={"run": "not-judged", "baseline": JINA.name, "arm": BGE.name})
        path = page.url.path
        for _ in range(3):
            client.post(f"{path}/vote", data={"turn": "0", "vote": "tie"})
        assert "1 of 50 votes" in client.get(path).text
        assert client.post(f"{path}/vote", data={"turn": "1", "vote": "wrong"}).status_code == 400
        client.post(f"{path}/vote", data={"turn": "1", "vote": "bad", "mark": ["made-up"]})
        assert client.post("/console/duel", data={"run": "not-judged", "baseline": "a", "arm": "b"}).status_code == 400
        assert client.get("/console/duel/not-judged/20260101-000000-aaaaaa").status_code == 404
        rows = client.get(f"{path}/qrels.tsv").text
        assert "made-up" not in rows
        assert {line.split("\t")[2] for line in rows.splitlines()[1:]} == {"0"}  # both lists were bad


def test_the_pages_are_accessible(
    gateway: Gateway,
    operator: Callable[..., Any],
    check_everywhere: Callable[[Any, str], None],
) -> None:
    with operator(gateway.url, "/compare/support%20faq") as page:
        page.locator("section > details summary").nth(1).click()
        check_everywhere(page, "compare")
        begin(page, gateway.url, "support faq")
        page.get_by_label("answers it").first.check()
        check_everywhere(page, "duel")
        page.get_by_role("button", name="End, and show the names").click()
        check_everywhere(page, "duel-done")


# -------------------------------------------------------------------------------------------------------------- grades


def test_people_grade_documents_by_keys_and_the_verdict_follows(
    gateway: Gateway, runs: Path, operator: Callable[..., Any], check_everywhere: Callable[[Any, str], None]
) -> None:
    folder = runs / "judged"

    def press(page: Any, key: str) -> None:
        with page.expect_navigation():
            page.keyboard.press(key)

    def scores() -> list[int | None]:
        return [row.score for row in Sheet((folder / CHECK_FILE).read_bytes()).pairs.values()]

    with operator(gateway.url, "/compare/judged") as page:
        assert (
            page.locator("h1").inner_text()
            == "The judge prefers new to old: let people check the judge before you switch."
        )
        page.get_by_role("link", name="Grade documents").click()
        page.wait_for_url("**/compare/judged/grade")
        assert "0 of 480 documents, 0 of 60 whole queries; a verdict needs 60" in page.locator(".head").inner_text()
        assert [button.split("\n")[-1] for button in page.locator(".grades button").all_inner_texts()] == [
            meaning.removeprefix("The document ").removesuffix(".") for meaning in SCALE
        ]
        first, query = page.locator(".sheet p").inner_text(), page.locator("h1").inner_text()
        check_everywhere(page, "grade")
        press(page, "3")
        second = page.locator(".sheet p").inner_text()
        press(page, "s")
        third = page.locator(".sheet p").inner_text()
        press(page, "0")
        assert len({first, second, third}) == 3
        assert scores()[:4] == [3, None, 0, None]
        press(page, "u")
        assert page.locator(".sheet p").inner_text() == third
        assert scores()[:4] == [3, None, None, None]
        page.get_by_text("Several people").click()
        page.get_by_label("Your name").fill("Bob & Ada")
        with page.expect_navigation():
            page.get_by_role("button", name="Use").click()
        assert page.locator("h1").inner_text() != query
        with page.expect_navigation():
            page.locator(".grades button").nth(2).click()
        assert scores().count(2) == 1
        assert page.get_by_label("Your name").input_value() == "Bob & Ada"
        people = Sheet((folder / CHECK_FILE).read_bytes())
        for row in list(people.pairs.values())[:-1]:
            grade = int(row.document_text.split()[2])
            people = Sheet(b"".join(people.with_score(row.query, row.document, grade)))
        (folder / CHECK_FILE).write_bytes(b"".join(people.with_score("", "", None)))
        page.reload()
        press(page, page.locator(".sheet p").inner_text().split()[2])
        assert page.locator("h1").inner_text() == "All documents have a grade"
        check_everywhere(page, "grade-done")
        page.get_by_role("button", name="Compute the verdict with these grades").click()
        page.wait_for_url("**/console/compare/judged", timeout=60_000)
        assert (
            page.locator("h1").inner_text()
            == "Switch to new: by the judge, corrected by people, it is better than old."
        )
        said = page.locator("section", has=page.locator("#judge")).inner_text()
        assert "People graded 60 queries with 480 documents. Kappa is 1.00, 95 % interval 1.00 to 1.00" in said
        assert "well enough for a verdict" in said
        check_everywhere(page, "compare-checked")


def test_grades_need_no_script_and_no_grade_is_overwritten(gateway: Gateway, runs: Path) -> None:
    path = "/console/compare/judged-too/grade"
    row = list(Sheet((runs / "judged-too" / CHECK_FILE).read_bytes()).pairs.values())[7]
    form = {"query": row.query, "document": row.document}
    with signed_in(gateway) as client:
        assert row.document in client.get(path, params={"after": 7}).text
        assert client.post(path, data={**form, "grade": "4"}).status_code == 400
        assert client.get(f"{path}?grader=Jos%E9").status_code == 400, "it would be the name of every such grader"
        graded = client.post(path, data={**form, "grade": "1"})
        assert str(graded.url).endswith("/grade?after=8")
        assert "1 of 480 documents" in graded.text
        assert "already had a grade" in client.post(path, data={**form, "grade": "2"}).text
        again = client.post(f"{path}/undo", data={"grader": ""})
        assert str(again.url).endswith("/grade?after=7")
        assert row.document in again.text
        assert "Nothing was taken back" in client.post(f"{path}/undo", data={"grader": "carl"}).text
        assert client.get(path, params={"after": "x"}).status_code == 400
        assert client.get("/console/compare/support%20faq/grade").status_code == 404
        assert "a verdict needs 60" in client.post("/console/compare/judged-too/verdict").text


# --------------------------------------------------------------------------------------------------------------- pure


def make_queries(number: int, *, same: int = 0) -> list[Query]:
    def hits(names: str) -> list[dict[str, object]]:
        return [{"document": name, "score": 1.0, "text": name} for name in names]

    return [
        Query.model_validate(
            {
                "id": f"q{i}",
                "text": f"query {i}",
                "rankings": {"a": hits("vwxyz"), "b": hits("vwxyz" if i < same else "zyxwv")},
            }
        )
        for i in range(number)
    ]


def test_only_queries_that_differ_are_drawn_with_sides_by_chance_and_one_in_ten_again() -> None:
    duel = draw(make_queries(1_000, same=400), "a", "b", seed=1)
    assert (duel.num_queries, duel.num_different, len(duel.pairs)) == (1_000, 600, MAX_PAIRS)
    first = [turn for turn in duel.turns if not turn.is_repeat]
    assert sorted(turn.pair for turn in first) == list(range(MAX_PAIRS))
    assert 0.4 < sum(turn.is_swapped for turn in first) / len(first) < 0.6
    repeats = [turn for turn in duel.turns if turn.is_repeat]
    assert len(repeats) == pytest.approx(len(duel.turns) / 10, abs=1)
    sides = {turn.pair: turn.is_swapped for turn in first}
    assert all(turn.is_swapped != sides[turn.pair] for turn in repeats)


def test_arms_that_never_differ_have_no_duel() -> None:
    with pytest.raises(BadInput, match="the same for every query"):
        draw(make_queries(20, same=20), "a", "b", seed=1)


def vote(turn: int, choice: str, preferred: str | None = None, voter: str = "me", **more: object) -> Vote:
    return Vote.model_validate(
        {"time": "2026-11-26T00:00:00Z", "voter": voter, "turn": turn, "choice": choice, "preferred": preferred, **more}
    )


def test_ties_skips_and_repeats_do_not_count_as_votes_for_either() -> None:
    duel = draw(make_queries(30), "a", "b", seed=1)
    votes = [vote(turn, "left", "a") for turn in range(10)]  # the tenth is a repeat
    votes += [
        vote(10, "tie"),
        vote(11, "bad"),
        vote(12, "skip"),
        vote(12, "left", "a"),
        vote(10, "left", "a", voter="you"),
    ]
    standing = stand(duel, votes, "me")
    assert (standing.preference.first, standing.preference.second) == (10, 0)  # 9 of mine, 1 of yours
    assert (standing.num_ties, standing.num_bad, standing.num_skipped) == (1, 1, 1)
    assert (standing.consistent, standing.repeated, standing.voters) == (1, 1, 2)
    assert standing.next_turn == 13
    assert stand(duel, votes, "you").next_turn == 0
    assert stand(duel, [*votes, vote(0, "skip", voter="idle")], "me").voters == 2


@pytest.mark.parametrize(("num_arms", "is_decided"), [(2, True), (3, False)])
def test_a_comparison_of_more_arms_needs_more_evidence(num_arms: int, *, is_decided: bool) -> None:
    """Two duels with one baseline would otherwise find a preference between equals in one comparison of ten."""
    duel = draw(make_queries(30), "a", "b", seed=1, num_arms=num_arms)
    votes = [vote(turn, "left", "a") for turn in range(13)]  # of which one is a repeat: evidence of 25

    standing = stand(duel, votes, "me")

    assert standing.preference.threshold == 20 * (num_arms - 1)
    assert (standing.preference.preferred is not None) is is_decided


def test_a_preference_alone_is_not_a_judgment() -> None:
    duel = draw(make_queries(30), "a", "b", seed=1)
    only = [vote(0, "left", "a")]
    assert qrels(duel, only) == "query-id\tcorpus-id\tscore\n"
    marked = [vote(0, "left", "a", marked=["v"]), vote(0, "left", "a", voter="you", marked=["w"])]
    grades = {line.split("\t")[1]: line.split("\t")[2] for line in qrels(duel, marked).splitlines()[1:]}
    assert grades == {"v": "1", "w": "1", "x": "0", "y": "0", "z": "0"}


def test_a_run_is_read_line_by_line_and_within_limits(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_bytes(b" " * (5 * 1024**2))
    (folder / "queries.jsonl").write_text("not json\n")
    runs = Runs(tmp_path)
    assert runs.find("run").problem == "results.json cannot be read: has 5,242,880 bytes; the limit is 4,194,304"
    with pytest.raises(BadInput, match="is not from a comparison"):
        list(runs.queries("run"))
    with pytest.raises(NotFound):
        runs.path("../run")
    (folder / "queries.jsonl").unlink()
    os.mkfifo(folder / "queries.jsonl")
    with pytest.raises(BadInput, match=r"queries\.jsonl cannot be read: must be a regular file, but is a named pipe"):
        list(runs.queries("run"))


def test_a_preference_is_general_if_many_voters_have_it_and_not_if_a_few_vote_often() -> None:
    duel = draw(make_queries(60), "a", "b", seed=1)
    turns = [turn for turn in range(50) if not duel.turns[turn].is_repeat]

    def preference_of(first: int, second: int, num_votes: int) -> tuple[bool, str]:
        """Let so many voters prefer each arm; one of them votes often."""
        voters = [f"{number}{arm}" for number in range(max(first, second)) for arm in "ab"]
        voters = [who for who in voters if int(who[:-1]) < (first if who[-1] == "a" else second)]
        votes = [vote(turns[0], "left", who[-1], who) for who in voters]
        votes += [vote(turn, "left", "a", "0a") for turn in turns[1:num_votes]]
        standing = stand(duel, votes, "0a")
        assert (standing.by_voter.first, standing.by_voter.second) == (first, second)
        return standing.is_general, verdict(duel, standing)

    assert preference_of(14, 0, 1) == (False, "a is preferred to b for 14 voters")
    assert preference_of(15, 0, 1) == (True, "a is preferred to b")
    assert preference_of(9, 9, 40) == (False, "a is preferred to b for 18 voters")
    assert preference_of(8, 8, 1) == (False, "Not decided: these votes do not distinguish b from a")


def test_the_votes_of_many_voters_are_counted_at_once() -> None:
    duel = draw(make_queries(250), "a", "b", seed=1)
    votes = [vote(turn, "left", "a", f"voter-{who}") for who in range(60) for turn in range(len(duel.turns))]
    undone = [votes[0], vote(1, "left", "a", "voter-0"), Vote(time="", voter="voter-0", undo=True)]
    assert stand(duel, undone, "voter-0").next_turn == 1
    assert stand(duel, [*undone, *undone[-1:] * 2], "voter-0").next_turn == 0

    started = time.thread_time()
    standing = stand(duel, votes, "voter-0")

    assert (standing.voters, standing.next_turn) == (60, None)
    assert time.thread_time() - started < 0.5  # with a search through all votes for each, 10 s


def test_a_full_disk_loses_a_vote_and_not_the_duel(tmp_path: Path) -> None:
    folder = DuelFolder(tmp_path)
    name = folder.create(draw(make_queries(30), "a", "b", seed=1))
    folder.add(name, vote(0, "tie"))
    path = tmp_path / "duels" / name / "votes.jsonl"
    size = path.stat().st_size
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, earlier[1]))
    try:
        with pytest.raises(BadInput, match="the vote was not counted"):
            folder.add(name, vote(1, "tie"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
        signal.signal(signal.SIGXFSZ, handler)

    folder.add(name, vote(1, "left", "a"))
    assert [one.choice for one in folder.read(name)[1]] == ["tie", "left"]


@pytest.mark.parametrize("shown", ["nan", "-inf", "inf", "-1e300", "x", ""])
def test_a_made_up_time_of_showing_is_not_kept(shown: str) -> None:
    assert _seconds_since(shown) is None
    assert _seconds_since(str(time.time() - 5)) == pytest.approx(5, abs=2)


# ---------------------------------------------------------------------------------------------------- start a comparison


@pytest.fixture(scope="module")
def measuring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Serve a gateway whose folder of runs has only data: six texts on as many subjects, and a query on each."""
    folder = tmp_path_factory.mktemp("measured")
    data = folder / "data" / "small set"
    data.mkdir(parents=True)
    subjects = ("trains", "bicycles", "night ferries", "old maps", "cheese", HOSTILE)
    corpus = [{"_id": f"d{number}", "text": f"all about {subject}"} for number, subject in enumerate(subjects)]
    queries = [{"_id": f"q{number}", "text": f"what of {subject}"} for number, subject in enumerate(subjects)]
    (data / "corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in corpus))
    (data / "queries.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in queries))
    with serving(runs_dir=str(folder), api_keys="client-secret", admin_key=OPERATOR) as served:
        yield served


def test_a_comparison_is_started_and_followed_to_its_result(
    measuring: Gateway, operator: Callable[..., Any], check_everywhere: Callable[[Any, str], None]
) -> None:
    with operator(measuring.url, "/compare", expected=("status of 400",)) as page:
        page.get_by_role("link", name="New comparison").click()
        check_everywhere(page, "compare-new")
        page.get_by_label("Name", exact=True).fill("../out")
        page.get_by_label("Also measure latency").uncheck()
        page.get_by_role("button", name="Start").click()
        assert "The name of a comparison has" in page.get_by_role("alert").inner_text()
        assert page.get_by_label("Arm 2").input_value() == "bge"
        page.get_by_label("Name", exact=True).fill("my first")
        page.get_by_role("button", name="Start").click()
        page.get_by_role("heading", name="my first is running").wait_for()
        assert page.get_by_role("progressbar").count() == 1
        check_everywhere(page, "compare-running")
        page.get_by_role("heading", name="Without judgments").wait_for(timeout=60_000)  # on its own, when it is done
        assert "6 queries over 6 documents" in page.locator("main").inner_text()
        assert page.locator(".list a[aria-current]").inner_text().startswith("my first")
        with httpx.Client(base_url=measuring.url, headers={"authorization": f"Bearer {OPERATOR}"}) as client:
            card = client.get("/admin/comparisons/my first").json()
            body = {"name": "my first", "arms": ["jina", "bge"], "data": "small set"}
            again = client.post("/admin/comparisons", json=body)
        assert (card["state"], card["results"]["dataset"]["num_queries"]) == ("done", 6)
        assert "a comparison 'my first' already exists" in again.json()["message"]
        page.get_by_role("link", name="Measure these again").click()
        assert [page.get_by_label(f"Arm {number}").input_value() for number in (1, 2, 3)] == ["jina", "bge", ""]


def test_a_comparison_that_fails_says_why(measuring: Gateway, operator: Callable[..., Any]) -> None:
    with operator(measuring.url, "/new-comparison") as page:
        page.get_by_label("Arm 2").fill(HOSTILE)
        page.get_by_label("Name", exact=True).fill("hopeless")
        page.get_by_role("button", name="Start").click()
        page.get_by_role("heading", name="hopeless has failed").wait_for(timeout=60_000)
        assert HOSTILE.split()[0] in page.get_by_role("alert").inner_text()

    with httpx.Client(base_url=measuring.url, headers={"authorization": f"Bearer {OPERATOR}"}) as client:
        listed = client.get("/admin/comparisons").json()
        card = client.get("/admin/comparisons/hopeless").json()
        assert client.get("/admin/comparisons/none").status_code == 404
        assert client.post("/admin/comparisons/hopeless/stop").status_code == 404
        assert httpx.get(f"{measuring.url}/admin/comparisons").status_code == 403
    assert "small set" in listed["data_sets"]
    assert (card["state"], card["arms"], card["step"]) == ("failed", ["jina", HOSTILE], None)
    assert HOSTILE.split()[0] in card["problem"]
    assert card in listed["data"]


def test_files_are_dropped_and_a_judge_is_asked_after_its_price_was_shown(
    measuring: Gateway, operator: Callable[..., Any], check_everywhere: Callable[[Any, str], None], tmp_path: Path
) -> None:
    subjects = [f"subject{number}" for number in range(12)]
    (tmp_path / "docs.csv").write_text("id,text\n" + "".join(f"{one},all about {one}\n" for one in subjects))
    (tmp_path / "wrong.csv").write_text("words\nno column for texts\n")
    (tmp_path / "queries.txt").write_text("".join(f"what of {one}\n" for one in subjects))

    def respond(body: dict[str, Any], _number: int) -> Reply:
        query, document = texts_of(body)
        return graded(3 if query.split()[-1] == document.split()[-1] else 0)

    with serve_judge(respond) as judge, operator(measuring.url, "/new-comparison", expected=("status of 400",)) as page:
        page.get_by_label("Documents", exact=True).set_input_files(tmp_path / "wrong.csv")
        page.get_by_label("Name of the data set").fill("dropped")
        page.get_by_role("button", name="Store").click()
        assert "including `text`" in page.get_by_role("alert").inner_text()
        page.get_by_label("Documents", exact=True).set_input_files(tmp_path / "docs.csv")
        page.get_by_label("Queries", exact=True).set_input_files(tmp_path / "queries.txt")
        page.get_by_label("Name of the data set").fill("dropped")
        page.get_by_role("button", name="Store").click()
        assert "12 documents, 12 queries and 0 judgments were stored" in page.get_by_role("status").inner_text()
        assert page.locator("#data").input_value() == "dropped"
        page.get_by_text("Let a chat model grade").click()
        page.get_by_label("Address of an OpenAI-style API").fill(judge.url)
        page.get_by_label("Model", exact=True).fill("stand-in")
        page.get_by_label("Key (empty").fill("judge-secret")
        check_everywhere(page, "compare-new-judge")
        page.get_by_label("Name", exact=True).fill("judged")
        page.get_by_label("Also measure latency").uncheck()
        page.get_by_role("button", name="Start").click()
        page.get_by_role("heading", name="Ask the judge at this price?").wait_for(timeout=60_000)
        assert not judge.bodies
        assert "Queries and documents stay on this machine" in page.get_by_role("alert").inner_text()
        check_everywhere(page, "compare-asking")
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("heading", name="Too few queries to decide between jina and bge.").wait_for(timeout=60_000)
        assert set(judge.keys) == {"Bearer judge-secret"}
        assert page.locator("section", has=page.locator("#judge")).locator(".chip").inner_text() == "too few queries"
        check_everywhere(page, "compare-judged")


def test_an_upload_above_the_limit_says_where_to_put_larger_data(tmp_path: Path) -> None:
    files = {"documents": ("docs.csv", b"text\n" + 3_000_000 * b"a")}
    with (
        serving(runs_dir=str(tmp_path), admin_key=OPERATOR, max_body_bytes=1_000_000) as served,
        signed_in(served) as client,
    ):
        page = client.post("/console/data-sets", data={"name": "large"}, files=files)
        client.headers["authorization"] = f"Bearer {OPERATOR}"
        answer = client.post("/admin/data-sets", data={"name": "large"}, files=files)
    for text in (page.text, answer.json()["message"]):
        assert "the limit is 1000000: copy a larger data set into GATEWAY_RUNS_DIR/data" in text
    assert (page.status_code, answer.status_code) == (413, 413)
    assert "<h1>Compare models on your texts</h1>" in page.text  # the form, to try again
    assert not list(tmp_path.glob("data/*"))


def test_progress_comes_as_events_and_without_them_by_asking(
    measuring: Gateway, operator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import json, sys, time\n"
        "for done in range(1, 3000):\n"
        "    print(json.dumps(dict(step='jina: documents', done=done, total=3000)), file=sys.stderr, flush=True)\n"
        "    time.sleep(0.1)\n"
    )
    expect = find_module("playwright.sync_api").expect
    monkeypatch.setattr(Jobs, "_command", lambda *_: [sys.executable, "-c", program])
    with operator(measuring.url, "/new-comparison", expected=("net::ERR_FAILED",)) as page:
        asked: list[str] = []
        progress = page.locator("[data-step]")
        page.get_by_label("Name", exact=True).fill("long")
        page.get_by_role("button", name="Start").click()
        page.get_by_role("heading", name="long is running").wait_for()
        page.on("request", lambda request: asked.append(request.url))
        expect(progress).to_have_text(re.compile(r": ([3-9]\d|\d{3}) of 3,000"), timeout=60_000)
        assert not [url for url in asked if url.endswith("/compare/long")]  # no page was asked for
        page.route("**/events", lambda route: route.abort())
        page.reload()
        expect(progress).not_to_have_text(progress.inner_text(), timeout=60_000)
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("heading", name="long was stopped").wait_for()
