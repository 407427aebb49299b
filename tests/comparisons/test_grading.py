"""People grade one file together: no grade is lost, whole queries come first, and the verdict follows."""

from __future__ import annotations

import asyncio
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest

from gateway.compare.judge.verdicts import JudgeVerdict
from gateway.comparisons import grading
from gateway.comparisons.grading import Grading, Standing
from gateway.comparisons.runs import UNUSABLE, JudgeResults, Runs
from gateway.comparisons.sheet import CHECK_FILE, Row, Sheet
from gateway.errors import BadInput, NotFound
from tests.compare.judge.folders import grade_by_hand, make_judged_folder
from tests.compare.judge.test_judging import PAIRS_PER_QUERY, World

RUN = "judged"
ADA, BOB = "ada", "bob"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_judged_folder(folder / RUN, tmp_path_factory.mktemp("cache")), folder


@pytest.fixture
def world(made: tuple[World, Path]) -> World:
    return made[0]


@pytest.fixture
def runs(made: tuple[World, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[1], tmp_path / "runs")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def graders(runs: Path, clock: Clock) -> Grading:
    return Grading(Runs(runs), clock)


def scores(runs: Path) -> dict[tuple[str, str], int | None]:
    return {pair: row.score for pair, row in Sheet((runs / RUN / CHECK_FILE).read_bytes()).pairs.items()}


def judge_of(runs: Path) -> JudgeResults:
    results = Runs(runs).find(RUN).results
    assert results is not None
    assert results.judge is not None
    return results.judge


def shown(standing: Standing) -> Row:
    assert standing.next is not None
    return standing.next


def pair_of(standing: Standing) -> tuple[str, str]:
    row = shown(standing)
    return row.query, row.document


async def test_documents_come_query_by_query_until_all_are_graded(graders: Grading, runs: Path) -> None:
    standing = await graders.show(RUN, ADA)
    pairs = list(scores(runs))
    assert (standing.num_graded, standing.num_pairs, standing.num_queries) == (0, 60 * PAIRS_PER_QUERY, 60)
    assert (standing.num_needed, standing.is_enough, standing.can_undo) == (60, False, False)
    for number in range(PAIRS_PER_QUERY):
        assert (pair_of(standing), standing.place) == (pairs[number], number + 1)
        standing = await graders.grade(RUN, ADA, pair_of(standing), number % 4)
    assert (standing.num_graded, standing.num_whole) == (PAIRS_PER_QUERY, 1)
    assert shown(standing).query != pairs[0][0]
    assert list(scores(runs).values())[:PAIRS_PER_QUERY] == [number % 4 for number in range(PAIRS_PER_QUERY)]


async def test_a_skipped_document_comes_again_at_the_end(graders: Grading, world: World, runs: Path) -> None:
    grade_by_hand(world, runs / RUN, num_left=2)
    first = await graders.show(RUN, ADA)
    second = await graders.show(RUN, ADA, first.place)
    again = await graders.grade(RUN, ADA, pair_of(second), 3)
    end = await graders.grade(RUN, ADA, pair_of(again), 3)
    assert pair_of(again) == pair_of(first) != pair_of(second)
    assert (end.next, end.num_graded, end.num_whole) == (None, 60 * PAIRS_PER_QUERY, 60)
    assert pair_of(await graders.undo(RUN, ADA)) == pair_of(first)


async def test_people_grade_different_queries_at_a_time(graders: Grading, clock: Clock) -> None:
    ada, bob = await graders.show(RUN, ADA), await graders.show(RUN, BOB)
    assert shown(ada).query != shown(bob).query
    assert pair_of(await graders.show(RUN, ADA)) == pair_of(ada)
    clock.now += 601  # Ada is gone
    assert pair_of(await graders.show(RUN, "eve")) == pair_of(ada)


async def test_the_first_grade_counts_and_only_the_person_who_gave_it_takes_it_back(
    graders: Grading, runs: Path
) -> None:
    pair = pair_of(await graders.show(RUN, ADA))
    ada = await graders.grade(RUN, ADA, pair, 2)
    again = await graders.grade(RUN, ADA, pair, 2)
    bob = await graders.grade(RUN, BOB, pair, 3)
    assert [one.is_counted for one in (ada, again, bob)] == [True, True, False]
    assert scores(runs)[pair] == 2
    assert not (await graders.undo(RUN, BOB)).is_counted
    undone = await graders.undo(RUN, ADA)
    assert (undone.is_counted, pair_of(undone), undone.num_graded) == (True, pair, 0)
    assert not (await graders.undo(RUN, ADA)).is_counted


async def test_a_grade_that_was_changed_by_hand_is_not_taken_back(graders: Grading, runs: Path) -> None:
    pair = pair_of(await graders.show(RUN, ADA))
    await graders.grade(RUN, ADA, pair, 2)
    path = runs / RUN / CHECK_FILE
    path.write_bytes(b"".join(Sheet(path.read_bytes()).with_score(*pair, 1)))
    assert not (await graders.undo(RUN, ADA)).is_counted
    assert scores(runs)[pair] == 1
    following = pair_of(await graders.show(RUN, ADA))
    await graders.grade(RUN, ADA, following, 0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if not line.startswith("\t".join(following).encode())))
    assert not (await graders.undo(RUN, ADA)).is_counted


async def test_no_grade_is_lost_in_two_gateways_and_many_windows(graders: Grading, runs: Path) -> None:
    other = Grading(Runs(runs))
    pairs = list(scores(runs))[:24]
    await asyncio.gather(
        *(
            (graders, other)[number % 2].grade(RUN, f"p{number % 5}", pair, number % 4)
            for number, pair in enumerate(pairs)
        )
    )
    assert [scores(runs)[pair] for pair in pairs] == [number % 4 for number in range(24)]
    assert not list((runs / RUN).glob(".*tmp"))


async def test_a_full_disk_loses_a_grade_and_not_the_file(graders: Grading, runs: Path) -> None:
    pair = pair_of(await graders.show(RUN, ADA))
    path = runs / RUN / CHECK_FILE
    before = path.read_bytes()
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, earlier[1]))
    try:
        with pytest.raises(BadInput, match="the grade was not counted"):
            await graders.grade(RUN, ADA, pair, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert not (await graders.show(RUN, ADA)).can_undo


async def test_impossible_grades_are_rejected_with_the_reason(
    graders: Grading, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runs / RUN / CHECK_FILE
    for name in ("none", "../judged", ""):
        with pytest.raises(NotFound, match="no comparison is called"):
            await graders.show(name, ADA)
    with pytest.raises(BadInput, match="has no query 'made up' with document 'd'"):
        await graders.grade(RUN, ADA, ("made up", "d"), 1)
    monkeypatch.setattr(grading, "_MAX_FILE_BYTES", 1_000)
    with pytest.raises(BadInput, match=r"judge_check.tsv cannot be read: has [0-9,]+ bytes; the limit is 1,000"):
        await graders.show(RUN, ADA)
    path.write_text("query-id\tcorpus-id\tscore\nq\td\tgood\n")
    with pytest.raises(BadInput, match=r"judge_check.tsv:2: the score must be 0, 1, 2 or 3, or empty"):
        await graders.show(RUN, ADA)
    path.write_text("query-id\tcorpus-id\tscore\n")
    assert (await graders.show(RUN, ADA)).next is None
    with pytest.raises(BadInput, match="0 of 0 queries are graded completely"):
        await graders.conclude(RUN)
    path.unlink()
    with pytest.raises(NotFound, match="only a comparison with a judge writes one"):
        await graders.show(RUN, ADA)


async def test_the_memory_of_people_is_bounded(graders: Grading, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_MAX_GRADERS", 3)
    pair = pair_of(await graders.show(RUN, ADA))
    await graders.grade(RUN, ADA, pair, 1)
    for number in range(3):
        await graders.show(RUN, f"p{number}")
    assert len(graders._graders) == 3
    assert not (await graders.show(RUN, ADA)).can_undo


async def test_the_verdict_needs_whole_queries_and_then_follows(graders: Grading, world: World, runs: Path) -> None:
    grade_by_hand(world, runs / RUN, num_left=1)
    with pytest.raises(BadInput, match="59 of 60 queries are graded completely, and a verdict needs 60"):
        await graders.conclude(RUN)
    grade_by_hand(world, runs / RUN)
    judged = judge_of(runs)
    assert (judged.check, judged.contrasts[0].verdict) == (None, "preferred by the judge")

    await graders.conclude(RUN)

    judged = judge_of(runs)
    assert judged.contrasts[0].verdict == "better"
    check = judged.check
    assert check is not None
    assert (check.num_queries, check.kappa.low, check.is_usable) == (60, 1.0, True)
    assert None not in scores(runs).values()


async def test_a_verdict_that_cannot_be_computed_says_why(
    graders: Grading, world: World, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grade_by_hand(world, runs / RUN)
    (runs / RUN / "judge_grades.tsv").unlink()
    with pytest.raises(BadInput, match=r"the verdict cannot be computed: .*judge_grades.tsv: there is no such file"):
        await graders.conclude(RUN)
    monkeypatch.setattr(grading, "_VERDICT_S", 0.0)
    with pytest.raises(BadInput, match="the verdict took longer than 0 s"):
        await graders.conclude(RUN)
    monkeypatch.setattr(sys, "executable", str(runs / "nothing"))
    with pytest.raises(BadInput, match="the verdict cannot be computed: No such file"):
        await graders.conclude(RUN)


def test_the_names_of_the_judges_verdicts_are_the_same() -> None:
    assert JudgeVerdict.UNUSABLE == UNUSABLE
