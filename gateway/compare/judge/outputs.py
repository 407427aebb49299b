"""The files of a judge, in the folder of the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import orjson

from gateway.compare.beir import HEADER
from gateway.compare.dataset import Dataset
from gateway.compare.judge.check import check_lines
from gateway.compare.judge.judging import Judged
from gateway.compare.judge.sentences import judge_bottom_line, judge_sentences
from gateway.compare.judge.values import JudgeReport
from gateway.comparisons.sheet import CHECK_FILE
from gateway.config.files import write_whole
from gateway.errors import CompareError

REPORT_FILE = "judge.json"
GRADES_FILE = "judge_grades.tsv"


def write_judgments(judged: Judged, dataset: Dataset, folder: Path, seed: int) -> list[Path]:
    """Write a judge's results into a folder, which is created if missing.

    ::

        judge.json          everything except the grades: judge, prompt, agreement, verdicts
        judge_grades.tsv    the judge's grades, in the layout of qrels
        judge_check.tsv     pairs for people to grade; grades that they have made are filled in

    Returns:
        The files.

    Raises:
        CompareError: a file cannot be written.
    """
    contents: list[tuple[str, Iterable[bytes]]] = [
        (REPORT_FILE, [report_json(judged.report)]),
        (GRADES_FILE, _grade_lines(judged)),
        (CHECK_FILE, check_lines(dataset, judged.pool, seed, judged.people)),
    ]
    written = []
    for name, lines in contents:
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, lines)
        except OSError as error:
            raise CompareError(f"{path}: cannot be written: {error.strerror or error}") from error
        written.append(path)
    return written


def report_json(report: JudgeReport) -> bytes:
    """Return the content of ``judge.json``."""
    content = asdict(report)
    content |= {"bottom_line": judge_bottom_line(report), "sentences": judge_sentences(report)}
    del content["grades"]
    return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _grade_lines(judged: Judged) -> Iterator[bytes]:
    yield f"{HEADER}\n".encode()
    for query, scores in judged.report.grades.items():
        for document, grade in scores.items():
            yield f"{query}\t{document}\t{grade}\n".encode(errors="replace")
