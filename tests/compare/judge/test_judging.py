"""A complete run of a judge: two arms, a stand-in with a known bias behind HTTP, and people who check it."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gateway.compare.dataset import Dataset
from gateway.compare.judge import endpoint
from gateway.compare.judge.endpoint import chat_url
from gateway.compare.judge.judging import Judged, JudgeRequest, _open_store, judge
from gateway.compare.judge.outputs import write_judgments
from gateway.compare.judge.price import Price
from gateway.compare.judge.prompt import ORDERS, prompt_hash
from gateway.compare.judge.report import Subject
from gateway.compare.judge.sentences import judge_sentences
from gateway.compare.judge.store import GradeStore, StoredGrade
from gateway.compare.judge.values import JudgeVerdict
from gateway.compare.progress import Silent
from gateway.comparisons.sheet import CHECK_FILE
from gateway.errors import CompareError
from tests.compare.judge.conftest import StartJudge
from tests.compare.judge.stand_in import Reply, completion, ended, graded, refusal, texts_of

NUM_QUERIES = 70
SHARED, OWN = 2, 3
PAIRS_PER_QUERY = SHARED + 2 * OWN
NUM_PAIRS = NUM_QUERIES * PAIRS_PER_QUERY
NUM_CALLS = NUM_PAIRS + 2 * (NUM_PAIRS // 10)
Grade = Callable[[str, str], int]


@dataclass(frozen=True)
class World:
    """Data whose truth is known: the text of a document names its query, its grade, and the arm that finds it."""

    subject: Subject
    people: Mapping[tuple[str, str], int]


def make_world(gain: float = 0.0, num_queries: int = NUM_QUERIES) -> World:
    """Make two arms with some of their first documents in common.

    Args:
        gain: share of the queries in which ``new`` finds one more document of grade 3 where ``old`` finds one of grade 0.
    """
    chance = random.Random(3)
    queries = {f"q{i}": f"query {i}" for i in range(num_queries)}
    documents, people = {}, {}
    rankings: dict[str, dict[str, list[tuple[str, float]]]] = {"old": {}, "new": {}}
    for number, query in enumerate(queries):
        found = {}
        for arm, number_found in (("both", SHARED), ("old", OWN), ("new", OWN)):
            grades = [chance.choice((0, 0, 0, 1, 2, 3)) for _ in range(number_found)]
            if arm != "both" and number < gain * num_queries:
                grades[0] = 3 if arm == "new" else 0
            found[arm] = [f"{query}-{arm}{place}" for place in range(number_found)]
            for document, grade in zip(found[arm], grades, strict=True):
                documents[document] = f"{document} grade {grade} found by {arm}"
                people[query, document] = grade
        for arm, ranking in rankings.items():
            chosen = found["both"] + found[arm]
            chance.shuffle(chosen)
            ranking[query] = [(document, 1.0 - place / 100) for place, document in enumerate(chosen)]
    dataset = Dataset(Path("data"), None, documents, queries, {}, 0, (), {}, frozenset())
    return World(Subject(dataset, rankings, {"old": "old", "new": "new"}, 0), people)


def true_grade(_query: str, document: str) -> int:
    return int(document.split()[2])


def biased(query: str, document: str) -> int:
    """Raise the grades of documents found by ``new`` by one in half of the queries, which kappa does not show."""
    favors = document.endswith("by new") and int(query.split()[1]) % 2
    return min(3, true_grade(query, document) + (1 if favors else 0))


def random_grade(query: str, document: str) -> int:
    return random.Random(query + document).choice((0, 0, 0, 1, 2, 3))


def responding(grade: Grade) -> Callable[[dict[str, Any], int], Reply]:
    return lambda body, _number: graded(grade(*texts_of(body)))


def agree(_price: Price) -> None:
    """Agree to any price."""


async def run(world: World, url: str, folder: Path, check: Path | None = None, **changes: Any) -> Judged:
    request = replace(JudgeRequest(url, "stand-in", None, folder / "cache", check), **changes)
    return await judge(request, world.subject, agree, Silent())


def graded_before(world: World, folder: Path, grade: Grade) -> str:
    """Keep the grades of a judge as an earlier run would, and return the address of the judge, which no longer answers."""
    url = "http://127.0.0.1:9/v1"
    queries, documents = world.subject.dataset.queries, world.subject.dataset.documents
    for order in range(len(ORDERS)):
        with _open_store(JudgeRequest(url, "stand-in", None, folder / "cache"), chat_url(url), order) as store:
            for query, document in world.people:
                texts = queries[query], documents[document]
                store.add(*texts, StoredGrade(grade(*texts), "stand-in-1"))
    return url


def fill_in(world: World, judged: Judged, folder: Path, skip: Callable[[int], bool] = lambda _line: False) -> Path:
    """Let people grade the file that a judging writes, and return it."""
    write_judgments(judged, world.subject.dataset, folder, world.subject.seed)
    header, *lines = (folder / CHECK_FILE).read_text().splitlines()
    filled = []
    for number, line in enumerate(lines):
        query, document, _score, *texts = line.split("\t")
        score = "" if skip(number) else str(world.people[query, document])
        filled.append("\t".join((query, document, score, *texts)))
    path = folder / "checked.tsv"
    path.write_text("\n".join([header, *filled]))
    return path


async def test_a_judge_alone_prefers_and_does_not_say_better(start_judge: StartJudge, tmp_path: Path) -> None:
    world, stand_in = make_world(gain=0.8), start_judge(responding(true_grade))

    report = (await run(world, stand_in.url, tmp_path)).report

    [contrast] = report.contrasts
    assert contrast.verdict is JudgeVerdict.PREFERRED
    assert contrast.judged.low > 0
    assert (contrast.people, contrast.corrected, report.check) == (None, None, None)
    sentences = "\n".join(judge_sentences(report))
    assert "The judge prefers new to old: nDCG@10 +0." in sentences
    assert "better" not in sentences
    assert "so this is not a verdict on quality" in sentences


async def test_each_pair_is_asked_once_and_without_its_arm(start_judge: StartJudge, tmp_path: Path) -> None:
    """A tenth of them are graded twice more, with the examples in another order."""
    world, stand_in = make_world(), start_judge(responding(true_grade))

    report = (await run(world, stand_in.url, tmp_path)).report

    assert report.num_pairs == NUM_PAIRS
    assert report.usage.num_calls == len(stand_in.texts) == NUM_CALLS
    assert report.usage.prompt_tokens == 500 * report.usage.num_calls
    assert len(set(stand_in.texts)) == NUM_PAIRS
    prompts = {body["messages"][0]["content"] for body in stand_in.bodies}
    assert len(prompts) == 3
    # In random order: neither by query nor by arm.
    first = [query for query, _document in stand_in.texts[:20]]
    assert len(set(first)) > 10
    assert report.self_agreement is not None
    assert (report.self_agreement.num_pairs, report.self_agreement.share) == (NUM_PAIRS // 10, 1)
    assert report.asked.answered_as == ["stand-in-1"]
    assert (report.asked.answer_format, report.asked.temperature) == ("json_schema", 0)


async def test_a_biased_judge_is_corrected_by_people(start_judge: StartJudge, tmp_path: Path) -> None:
    """The arms are equally good; the judge alone prefers one, with a good kappa."""
    world, stand_in = make_world(), start_judge(responding(biased))
    first = await run(world, stand_in.url, tmp_path)
    assert first.report.contrasts[0].verdict is JudgeVerdict.PREFERRED

    report = (await run(world, stand_in.url, tmp_path, fill_in(world, first, tmp_path))).report

    [contrast] = report.contrasts
    assert report.check is not None
    assert report.check.kappa.low > 0.7
    assert (report.check.num_queries, report.check.num_pairs) == (60, 60 * PAIRS_PER_QUERY)
    assert contrast.verdict is JudgeVerdict.INCONCLUSIVE
    assert contrast.corrected is not None
    assert contrast.people is not None
    assert abs(contrast.corrected.mean) < abs(contrast.judged.mean) / 2
    assert contrast.corrected.high - contrast.corrected.low < contrast.people.high - contrast.people.low
    assert "This does not show whether new is better or worse than old" in "\n".join(judge_sentences(report))


async def test_with_a_check_a_better_arm_is_better(tmp_path: Path) -> None:
    world = make_world(gain=0.8)
    url = graded_before(world, tmp_path, true_grade)
    first = await run(world, url, tmp_path)

    report = (await run(world, url, tmp_path, fill_in(world, first, tmp_path))).report

    assert report.contrasts[0].verdict is JudgeVerdict.BETTER
    assert "new is better than old: nDCG@10 +0." in "\n".join(judge_sentences(report))
    assert report.usage.num_calls == 0


async def test_a_judge_that_guesses_cannot_be_used(tmp_path: Path) -> None:
    world = make_world(gain=0.8)
    url = graded_before(world, tmp_path, random_grade)
    first = await run(world, url, tmp_path)

    report = (await run(world, url, tmp_path, fill_in(world, first, tmp_path))).report

    assert report.contrasts[0].verdict is JudgeVerdict.UNUSABLE
    sentences = "\n".join(judge_sentences(report))
    assert "This judge cannot be used: its kappa may be as low as " in sentences
    assert "By people alone, new against old: nDCG@10 +0." in sentences


async def test_queries_that_are_checked_in_part_do_not_count(tmp_path: Path) -> None:
    world = make_world()
    url = graded_before(world, tmp_path, true_grade)
    first = await run(world, url, tmp_path)
    check = fill_in(
        world, first, tmp_path, skip=lambda line: line < PAIRS_PER_QUERY * 20 and line % PAIRS_PER_QUERY == 7
    )

    again = await run(world, url, tmp_path, check)

    assert again.report.check is not None
    assert again.report.check.num_queries == 40
    assert again.report.contrasts[0].verdict is JudgeVerdict.TOO_FEW_CHECKED
    assert "40 whole ones" in "\n".join(judge_sentences(again.report))
    assert any(
        "20 queries are checked in part, and left out: 20 documents have no score" in one
        for one in again.report.check_notes
    )
    # The new file has the known grades.
    write_judgments(again, world.subject.dataset, tmp_path / "again", 0)
    scores = [line.split("\t")[2] for line in (tmp_path / "again" / CHECK_FILE).read_text().splitlines()[1:]]
    assert (len(scores), scores.count("")) == (60 * PAIRS_PER_QUERY, 20)


async def test_a_check_of_other_data_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    """Queries that were picked by looking at results would not be a random sample."""
    world = make_world()
    url = graded_before(world, tmp_path, true_grade)
    first = await run(world, url, tmp_path)
    check = fill_in(world, first, tmp_path)
    other = replace(world, subject=replace(world.subject, seed=1))

    with pytest.raises(CompareError, match=r"is not among the 60 queries drawn from this data with --seed 1"):
        await run(other, url, tmp_path, check)


async def test_another_run_asks_nothing_and_shows_no_price(start_judge: StartJudge, tmp_path: Path) -> None:
    world, stand_in = make_world(), start_judge(responding(true_grade))
    first = (await run(world, stand_in.url, tmp_path)).report
    num_asked = len(stand_in.bodies)

    def refuse(_price: Price) -> None:
        raise AssertionError

    request = JudgeRequest(stand_in.url, "stand-in", None, tmp_path / "cache")
    again = (await judge(request, world.subject, refuse, Silent())).report

    assert len(stand_in.bodies) == num_asked
    assert again.contrasts == first.contrasts
    assert again.usage.num_cached == num_asked
    # Another model is another judge.
    with pytest.raises(CompareError, match="--judge-budget 1:"):
        await run(world, stand_in.url, tmp_path, model="other", max_tokens=1)
    assert len(stand_in.bodies) > num_asked


async def test_equal_texts_are_asked_about_once(start_judge: StartJudge, tmp_path: Path) -> None:
    world, stand_in = make_world(num_queries=4), start_judge(lambda _body, _number: graded(1))
    documents = dict.fromkeys(world.subject.dataset.documents, "the same")
    subject = replace(world.subject, dataset=replace(world.subject.dataset, documents=documents))

    report = (await judge(JudgeRequest(stand_in.url, "m", None, tmp_path), subject, agree, Silent())).report

    assert (report.num_pairs, report.usage.num_calls) == (4 * PAIRS_PER_QUERY, 4 * 3)
    assert sum(map(len, report.grades.values())) == 4 * PAIRS_PER_QUERY


async def test_no_consent_and_no_request(start_judge: StartJudge, tmp_path: Path) -> None:
    world, stand_in = make_world(), start_judge(responding(true_grade))
    prices: list[Price] = []

    def refuse(price: Price) -> None:
        prices.append(price)
        raise CompareError("no")

    with pytest.raises(CompareError, match="no"):
        await judge(JudgeRequest(stand_in.url, "m", None, tmp_path), world.subject, refuse, Silent())
    assert stand_in.bodies == []
    [price] = prices
    assert (price.num_calls, price.num_known, price.destination) == (NUM_CALLS, 0, None)
    prompt_characters = 2_600
    assert price.prompt_tokens == pytest.approx(price.num_calls * prompt_characters / 4, rel=0.25)


async def test_few_refusals_are_noted_and_many_prevent_a_verdict(start_judge: StartJudge, tmp_path: Path) -> None:
    def refusing(share: float) -> Callable[[dict[str, Any], int], Reply]:
        def respond(body: dict[str, Any], number: int) -> Reply:
            texts = texts_of(body)
            chance = random.Random(str(texts)).random()
            if number and chance < share / 2:
                return completion(None, refusal="no")
            if number and chance < share:
                return completion("I would say it is good.")
            return graded(true_grade(*texts))

        return respond

    world = make_world(gain=0.8)
    few = (await run(world, start_judge(refusing(0.01)).url, tmp_path)).report
    assert 0 < few.unjudged_share < 0.02
    assert few.num_refused > 0
    assert few.num_unreadable > 0
    assert few.contrasts[0].verdict is JudgeVerdict.PREFERRED
    assert any("have no grade (" in note for note in few.notes)

    many = (await run(world, start_judge(refusing(0.05)).url, tmp_path)).report
    assert many.contrasts[0].verdict is JudgeVerdict.TOO_MANY_UNJUDGED
    assert "No verdict on new: " in "\n".join(judge_sentences(many))

    with pytest.raises(CompareError, match=r"no verdict is possible\. All grades are kept"):
        await run(world, start_judge(refusing(0.5)).url, tmp_path)


async def test_answers_that_are_cut_count_as_no_judgment(start_judge: StartJudge, tmp_path: Path) -> None:
    def cutting(share: float) -> Callable[[dict[str, Any], int], Reply]:
        def respond(body: dict[str, Any], _number: int) -> Reply:
            texts = texts_of(body)
            is_cut = random.Random(str(texts)).random() < share
            return ended(graded(0), "length") if is_cut else graded(true_grade(*texts))

        return respond

    world = make_world(gain=0.8)
    report = (await run(world, start_judge(cutting(0.01)).url, tmp_path)).report
    assert 0 < report.num_cut < 0.02 * NUM_PAIRS
    assert (report.num_unreadable, report.num_refused, report.num_unjudged) == (0, 0, report.num_cut)
    assert f"graded {NUM_PAIRS - report.num_cut:,} of {NUM_PAIRS:,} pairs" in judge_sentences(report)[0]
    [note] = [note for note in report.notes if "cut at the limit of tokens: 8,192" in note]
    assert note.startswith(f"{report.num_cut} answer")
    assert "turn off the judge's thinking, give its server a longer context, or use another judge" in note

    with pytest.raises(CompareError, match=r"0 refused, \d+ cut, 0 unreadable.*: turn off the judge's thinking"):
        await run(world, start_judge(cutting(0.5)).url, tmp_path)


@pytest.mark.parametrize("fault", ["error", "closed"])
async def test_a_pair_that_always_fails_does_not_stop_the_others(
    start_judge: StartJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A text that crashes the server's template, for example."""
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 0.01)
    world = make_world(gain=0.8)
    poison = ("query 55", world.subject.dataset.documents["q55-new1"])

    def respond(body: dict[str, Any], _number: int) -> Reply:
        if texts_of(body) != poison:
            return graded(true_grade(*texts_of(body)))
        return (
            refusal(500, "template failed")
            if fault == "error"
            else Reply(headers={"content-length": "99"}, chunks=iter(()))
        )

    stand_in = start_judge(respond)

    report = (await run(world, stand_in.url, tmp_path)).report

    assert (report.num_unreadable, report.num_refused) == (1, 0)
    assert report.usage.num_cached == 0
    assert report.contrasts[0].verdict is JudgeVerdict.PREFERRED
    assert "q55" in report.grades
    assert "q55-new1" not in report.grades["q55"]


async def test_a_first_pair_that_a_filter_rejects_does_not_stop_the_others(
    start_judge: StartJudge, tmp_path: Path
) -> None:
    """Another run would meet the same pair first."""
    rejected: set[tuple[str, str]] = set()

    def respond(body: dict[str, Any], number: int) -> Reply:
        texts = texts_of(body)
        rejected.update([texts] if number == 0 else [])
        return refusal(400, "content_filter") if texts in rejected else graded(true_grade(*texts))

    stand_in = start_judge(respond)

    report = (await run(make_world(gain=0.8), stand_in.url, tmp_path)).report

    assert (report.num_refused, report.num_unreadable, report.num_pairs) == (1, 0, NUM_PAIRS)
    assert report.contrasts[0].verdict is JudgeVerdict.PREFERRED


async def test_a_first_pair_whose_answers_are_all_cut_counts_as_cut(start_judge: StartJudge, tmp_path: Path) -> None:
    too_long: set[tuple[str, str]] = set()

    def respond(body: dict[str, Any], number: int) -> Reply:
        texts = texts_of(body)
        too_long.update([texts] if number == 0 else [])
        return ended(completion("Let me think"), "length") if texts in too_long else graded(true_grade(*texts))

    stand_in = start_judge(respond)

    report = (await run(make_world(gain=0.8), stand_in.url, tmp_path)).report

    assert (report.num_cut, report.num_unreadable, report.num_refused) == (1, 0, 0)
    assert any("cut at the limit of tokens: 8,192" in note for note in report.notes)


async def test_grades_that_an_earlier_version_read_by_other_rules_are_asked_for_again(
    start_judge: StartJudge, tmp_path: Path
) -> None:
    """Earlier versions took grades from answers that were cut off."""
    world, stand_in = make_world(num_queries=1), start_judge(responding(true_grade))
    dataset, address = world.subject.dataset, str(chat_url(stand_in.url))
    for order in range(len(ORDERS)):
        identity = {"judge": address, "model": "stand-in", "prompt_sha256": prompt_hash(order), "examples": order}
        with GradeStore(tmp_path / "cache", identity) as store:
            for query, document in world.people:
                store.add(dataset.queries[query], dataset.documents[document], StoredGrade(0, "stand-in-1"))

    report = (await run(world, stand_in.url, tmp_path)).report
    again = (await run(world, stand_in.url, tmp_path)).report

    assert report.usage.num_cached == 0
    assert again.usage.num_calls == 0
    assert report.grades == again.grades
    assert any(grade > 0 for scores in report.grades.values() for grade in scores.values())


async def test_one_that_grades_nothing_is_said_after_a_few_pairs(start_judge: StartJudge, tmp_path: Path) -> None:
    stand_in = start_judge(lambda _body, _number: completion("I like it."))
    with pytest.raises(CompareError, match="gives no grade to any form of the request; its last answer"):
        await run(make_world(), stand_in.url, tmp_path)
    assert len(set(stand_in.texts)) == 3


async def test_a_judge_that_refuses_everything_makes_a_report_without_a_verdict(
    start_judge: StartJudge, tmp_path: Path
) -> None:
    world = make_world(num_queries=1)
    stand_in = start_judge(lambda _body, _number: completion(None, refusal="no"))

    judged = await run(world, stand_in.url, tmp_path)
    path, *_ = write_judgments(judged, world.subject.dataset, tmp_path / "out", 0)

    assert json.loads(path.read_text())["bottom_line"] == "The judge gave no grade, so there is nothing to decide."
    assert judged.report.contrasts == []
    assert "by its grades" not in "\n".join(judge_sentences(judged.report))


async def test_the_budget_stops_it_and_the_grades_are_kept(start_judge: StartJudge, tmp_path: Path) -> None:
    world, stand_in = make_world(), start_judge(responding(true_grade))
    with pytest.raises(CompareError, match="--judge-budget 52000: 101 requests have used 52,520 tokens"):
        await run(world, stand_in.url, tmp_path, max_tokens=52_000)
    report = (await run(world, stand_in.url, tmp_path)).report
    assert report.usage.num_cached >= 101


async def test_a_fickle_judge_is_noted(tmp_path: Path) -> None:
    world, chance = make_world(), random.Random(1)
    url = graded_before(world, tmp_path, lambda _query, _document: chance.choice((0, 1, 2, 3)))
    report = (await run(world, url, tmp_path)).report
    assert report.self_agreement is not None
    assert report.self_agreement.share < 0.5
    assert any("the judge repeats only" in note for note in report.notes)


async def test_relatives_versions_and_long_documents_are_noted(start_judge: StartJudge, tmp_path: Path) -> None:
    world = make_world()
    documents = dict(world.subject.dataset.documents)
    documents["q0-both0"] += " word" * 5_000
    subject = replace(
        world.subject,
        dataset=replace(world.subject.dataset, documents=documents),
        sources={"old": "all-minilm-l6-v2", "new": "qwen3-embedding-0.6b Qwen/Qwen3-Embedding-0.6B"},
    )

    def respond(body: dict[str, Any], number: int) -> Reply:
        if "temperature" in body:
            return refusal(400, "temperature is not supported")
        reply = graded(true_grade(*texts_of(body)))
        return replace(reply, body=reply.body.replace(b"stand-in-1", b"stand-in-%d" % (number % 2)))

    request = JudgeRequest(start_judge(respond).url, "Qwen2.5-72B-Instruct", None, tmp_path)
    report = (await judge(request, subject, agree, Silent())).report

    notes = "\n".join(report.notes)
    assert "new and the judge Qwen2.5-72B-Instruct are both from Alibaba" in notes
    assert "old and the judge" not in notes
    assert "several versions of the judge: stand-in-0, stand-in-1" in notes
    assert "does not accept temperature 0" in notes
    assert "The judge read only the first 20,000 characters of 1 document." in notes
    assert report.asked.temperature is None


async def test_files(start_judge: StartJudge, tmp_path: Path) -> None:
    world, stand_in = make_world(num_queries=3), start_judge(responding(true_grade))
    judged = await run(world, stand_in.url, tmp_path)
    assert judged.report.contrasts[0].verdict is JudgeVerdict.TOO_FEW_QUERIES

    paths = write_judgments(judged, world.subject.dataset, tmp_path / "out", 0)

    assert [path.name for path in paths] == ["judge.json", "judge_grades.tsv", "judge_check.tsv"]
    written = json.loads(paths[0].read_text())
    assert written["asked"]["prompt_sha256"] == judged.report.asked.prompt_sha256
    assert written["asked"]["model"] == "stand-in"
    assert "You grade how well a document" in written["asked"]["prompt"][0]["content"]
    assert written["contrasts"][0]["verdict"] == "too few queries"
    rows = [line.split("\t") for line in paths[1].read_text().splitlines()]
    assert rows[0] == ["query-id", "corpus-id", "score"]
    assert {(query, document): int(grade) for query, document, grade in rows[1:]} == world.people


_WORKER = """
import asyncio, sys
from pathlib import Path
from tests.compare.judge.test_judging import make_world, run
asyncio.run(run(make_world(), sys.argv[1], Path(sys.argv[2])))
"""


async def test_a_killed_run_continues_where_it_was(start_judge: StartJudge, tmp_path: Path) -> None:
    """SIGKILL while requests are running: answered requests are not sent again."""
    world, reached = make_world(), threading.Event()
    has_been_killed = threading.Event()

    def respond(body: dict[str, Any], number: int) -> Reply:
        if number >= 100 and not has_been_killed.is_set():
            reached.set()
            has_been_killed.wait(60)
        return graded(true_grade(*texts_of(body)))

    stand_in = start_judge(respond)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _WORKER, stand_in.url, str(tmp_path))
    try:
        assert await asyncio.to_thread(reached.wait, 60)
    finally:
        process.kill()
        await process.wait()
    has_been_killed.set()
    num_before = len(stand_in.bodies)

    report = (await run(world, stand_in.url, tmp_path)).report

    assert num_before < 120
    # All but those under way, of which eight may be.
    assert 92 <= report.usage.num_cached <= 100
    assert report.usage.num_calls == NUM_CALLS - report.usage.num_cached
    assert {(query, document) for query, scores in report.grades.items() for document in scores} == set(world.people)
