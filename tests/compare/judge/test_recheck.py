"""The verdict recomputed from the files of a comparison equals that of a complete run with the check."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.compare.judge.recheck import check_again, read_comparison
from gateway.compare.judge.values import JudgeVerdict
from gateway.compare.outputs import RESULTS, write_results
from gateway.compare.page import render_page
from gateway.comparisons.sheet import CHECK_FILE
from gateway.errors import CompareError
from tests.compare.judge.folders import write
from tests.compare.judge.test_judging import (
    biased,
    fill_in,
    graded_before,
    make_world,
    random_grade,
    run,
    true_grade,
)
from tests.compare.results_example import make_comparison


@pytest.mark.parametrize(
    ("grade", "is_grouped", "skip", "verdict"),
    [
        (biased, False, lambda _line: False, JudgeVerdict.BETTER),
        (true_grade, True, lambda _line: False, JudgeVerdict.BETTER),
        (random_grade, False, lambda _line: False, JudgeVerdict.UNUSABLE),
        (true_grade, False, lambda line: line == 7, JudgeVerdict.TOO_FEW_CHECKED),
    ],
    ids=["a judge with a bias", "dependent queries", "a useless judge", "queries checked in part"],
)
async def test_the_verdict_is_that_of_a_whole_run(
    tmp_path: Path,
    grade: Callable[[str, str], int],
    is_grouped: bool,
    skip: Callable[[int], bool],
    verdict: JudgeVerdict,
) -> None:
    world = make_world(gain=0.8)
    if is_grouped:
        groups = {f"q{number}": f"topic {number // 2}" for number in range(20)}
        dataset = dataclasses.replace(world.subject.dataset, groups=groups)
        world = dataclasses.replace(world, subject=dataclasses.replace(world.subject, dataset=dataset))
    url = graded_before(world, tmp_path, grade)
    first = await run(world, url, tmp_path)
    check = fill_in(world, first, tmp_path, skip)
    whole_run = await run(world, url, tmp_path, check)
    expected = write(world, whole_run, tmp_path / "expected", check)
    folder = write(world, first, tmp_path / "ours", check)
    before = (folder / CHECK_FILE).read_bytes()

    report, written = check_again(folder)

    assert report.check is not None
    assert report.contrasts == whole_run.report.contrasts
    assert report.contrasts[0].verdict is verdict
    assert {path.name for path in written} == {"judge.json", "report.html"}
    reports = [json.loads((one / "judge.json").read_text()) for one in (expected, folder)]
    for one in reports:  # the notes on a part-checked query name the file
        one.pop("check_notes")
        one["sentences"] = [sentence for sentence in one["sentences"] if "checked in part" not in sentence]
    assert reports[0] == reports[1]
    if not report.check_notes:
        assert (folder / "report.html").read_text() == (expected / "report.html").read_text()
    assert (folder / CHECK_FILE).read_bytes() == before
    again, _written = check_again(folder)
    assert again == report


async def test_a_comparison_is_read_back_unchanged(tmp_path: Path) -> None:
    comparison = make_comparison(num_queries=60)
    write_results(comparison, {}, tmp_path)
    assert render_page(read_comparison(tmp_path)) == render_page(comparison)


async def test_a_comparison_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    comparison = make_comparison(num_queries=60)
    write_results(comparison, {}, tmp_path)
    file = tmp_path / RESULTS
    content = json.loads(file.read_text())
    for contrast in content["contrasts"]:
        for name in ("unseen", "simultaneous", "p_random", "largest"):
            del contrast[name]
    file.write_text(json.dumps(content))

    contrasts = read_comparison(tmp_path).contrasts

    assert [one.p_holm for one in contrasts] == [one.p_holm for one in comparison.contrasts]
    assert [one.verdict for one in contrasts] == [one.verdict for one in comparison.contrasts]


async def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    world = make_world(gain=0.8)
    url = graded_before(world, tmp_path, true_grade)
    first = await run(world, url, tmp_path)
    check = fill_in(world, first, tmp_path)
    folder = write(world, first, tmp_path / "run")

    def fails(message: str) -> None:
        kept = (folder / "judge.json").read_bytes()
        with pytest.raises(CompareError, match=message):
            check_again(folder)
        assert (folder / "judge.json").read_bytes() == kept

    fails("has no score; fill in the column `score`")
    header, line, *_others = check.read_text().splitlines()
    (folder / CHECK_FILE).write_text(f"{header}\n{line}\n")
    fails("no query of the check is complete")
    (folder / CHECK_FILE).write_text(f"{header}\nmade-up\td\t3\n")
    fails("query 'made-up' is not among the 60 queries drawn")
    (folder / CHECK_FILE).write_bytes(check.read_bytes())
    results = json.loads((folder / "results.json").read_text())
    results["dataset"]["num_groups"] = 10
    (folder / "results.json").write_text(json.dumps(results))
    fails("has no groups of queries that depend on each other")
    (folder / "results.json").write_text("[]")
    fails("must hold a JSON object")
    (folder / "results.json").write_text("{}")
    fails("are not from a comparison: ")
    (folder / "queries.jsonl").write_text("{\n")
    (folder / "results.json").write_text("{}")
    fails("queries.jsonl:1: is not JSON")
    (folder / "queries.jsonl").unlink()
    fails("queries.jsonl: there is no such file")
