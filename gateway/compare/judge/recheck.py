"""Recompute the verdict after people have graded, from a comparison's files, without its models, its judge or its data."""

from __future__ import annotations

from codecs import BOM_UTF8
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from gateway.compare.beir import read_judgments, read_lines
from gateway.compare.dataset import Dataset
from gateway.compare.judge.check import complete_queries, read_check
from gateway.compare.judge.outputs import GRADES_FILE, REPORT_FILE, report_json
from gateway.compare.judge.pool import draw_checked, make_pool
from gateway.compare.judge.report import check_by_people
from gateway.compare.judge.values import Grades, JudgeReport
from gateway.compare.judge.verdicts import Evidence, conclude
from gateway.compare.outputs import QUERIES, RESULTS, write_page
from gateway.compare.page import render_page
from gateway.compare.results import Comparison
from gateway.compare.search import Ranking
from gateway.comparisons.runs import MAX_RESULTS_BYTES, first_problem
from gateway.comparisons.sheet import CHECK_FILE
from gateway.config.files import read_bounded, write_whole
from gateway.errors import CompareError


def check_again(folder: Path) -> tuple[JudgeReport, list[Path]]:
    """Compute the verdicts of a comparison with the grades that its ``judge_check.tsv`` has now, and write them.

    The result is that of ``gateway compare --judge-check`` for the same arms and data: the judge's grades are in
    ``judge_grades.tsv``, and the pooled documents in ``queries.jsonl``.

    Returns:
        The report, and the files that were written: ``judge.json`` and ``report.html``.

    Raises:
        CompareError: a file is missing or wrong, no query is graded completely, or a file cannot be written.
    """
    people = read_check(folder / CHECK_FILE)
    comparison = read_comparison(folder)
    report = _read_report(folder)
    rankings = _rankings(comparison)
    groups = {query.id: query.group for query in comparison.queries if query.group is not None}
    summary = comparison.dataset
    if not groups and summary.num_groups < len(comparison.queries):
        raise CompareError(
            f"{folder / QUERIES}: has no groups of queries that depend on each other, because an earlier version wrote it. "
            f"Run `gateway compare` again, with --judge-check {folder / CHECK_FILE}"
        )
    queries = {query.id: query.text for query in comparison.queries}
    dataset = Dataset(Path(summary.folder), summary.split, {}, queries, {}, 0, (), groups, frozenset())
    pool = make_pool(rankings, comparison.seed)
    checked, notes = complete_queries(people, dataset, pool, comparison.seed, folder / CHECK_FILE)
    num_drawn = len(draw_checked(list(queries), groups, comparison.seed))
    check = check_by_people(checked, report.grades, comparison.seed)
    evidence = Evidence(rankings, report.grades, checked, check, report.unjudged_share, groups, num_drawn)
    report = replace(report, check=check, check_notes=notes, contrasts=conclude(evidence))
    return report, [_write_report(report, folder), write_page(render_page(comparison, report), folder)]


def read_comparison(folder: Path) -> Comparison:
    """Read the comparison that :func:`gateway.compare.outputs.write_results` has written.

    Raises:
        CompareError: a file is missing, or is not that of a comparison.
    """
    content = _read_object(folder / RESULTS)
    content["queries"] = [_parse(place, line) for place, line in read_lines(folder / QUERIES)]
    try:
        return TypeAdapter(Comparison).validate_python(content)
    except ValidationError as error:
        raise CompareError(f"{folder}: its results are not from a comparison: {first_problem(error)}") from error


def _read_report(folder: Path) -> JudgeReport:
    grades: Grades = read_judgments(folder / GRADES_FILE)
    try:
        return TypeAdapter(JudgeReport).validate_python({**_read_object(folder / REPORT_FILE), "grades": grades})
    except ValidationError as error:
        raise CompareError(f"{folder / REPORT_FILE}: is not the report on a judge: {first_problem(error)}") from error


def _rankings(comparison: Comparison) -> dict[str, Ranking]:
    """Return the first documents of every arm for every query."""
    return {
        arm.name: {
            query.id: [(hit.document, hit.score) for hit in query.rankings.get(arm.name, ())]
            for query in comparison.queries
        }
        for arm in comparison.arms
    }


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = _parse(str(path), read_bounded(path, MAX_RESULTS_BYTES).removeprefix(BOM_UTF8))
    except OSError as error:
        raise CompareError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise CompareError(f"{path}: must hold a JSON object")
    return content


def _parse(place: str, content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise CompareError(f"{place}: is not JSON: {error}") from error


def _write_report(report: JudgeReport, folder: Path) -> Path:
    path = folder / REPORT_FILE
    try:
        write_whole(path, [report_json(report)])
    except OSError as error:
        raise CompareError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path
