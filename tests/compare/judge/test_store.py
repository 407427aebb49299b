"""Grades outlive the process, and only whole ones are read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gateway.compare.judge.store import GradeStore, StoredGrade
from gateway.errors import CompareError

IDENTITY = {"model": "stand-in", "prompt_sha256": "00"}
GRADE = StoredGrade(2, "stand-in-1")


def test_another_run_finds_the_grades(tmp_path: Path) -> None:
    with GradeStore(tmp_path / "not" / "there", IDENTITY) as store:
        assert store.get("q", "d") is None
        store.add("q", "d", GRADE)
        store.add("", "\ud83d", StoredGrade(0, ""))
        assert store.get("q", "d") == GRADE
    with GradeStore(tmp_path / "not" / "there", IDENTITY) as store:
        assert store.get("q", "d") == GRADE
        assert store.get("", "\ud83d") == StoredGrade(0, "")
        assert store.get("qd", "") is None
        assert (
            json.loads(store.path.with_name(store.path.name.replace(".grades.jsonl", ".json")).read_text()) == IDENTITY
        )


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    with GradeStore(tmp_path, IDENTITY) as store:
        path = store.path
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CompareError, match="cannot be written: must be a regular file, but is a named pipe"):
        GradeStore(tmp_path, IDENTITY)


def test_another_model_or_prompt_has_other_grades(tmp_path: Path) -> None:
    with GradeStore(tmp_path, IDENTITY) as store, GradeStore(tmp_path, IDENTITY | {"model": "other"}) as other:
        store.add("q", "d", GRADE)
        assert other.get("q", "d") is None


def test_a_line_that_was_cut_short_is_removed(tmp_path: Path) -> None:
    with GradeStore(tmp_path, IDENTITY) as store:
        store.add("q", "d", GRADE)
        store.add("q", "e", GRADE)
        path = store.path
    path.write_bytes(path.read_bytes()[:-3])
    with GradeStore(tmp_path, IDENTITY) as store:
        assert (store.get("q", "d"), store.get("q", "e")) == (GRADE, None)
        store.add("q", "e", StoredGrade(1, ""))
    with GradeStore(tmp_path, IDENTITY) as store:
        assert (store.get("q", "d"), store.get("q", "e")) == (GRADE, StoredGrade(1, ""))


def test_lines_without_a_grade_are_graded_again(tmp_path: Path) -> None:
    with GradeStore(tmp_path, IDENTITY) as store:
        store.add("q", "d", GRADE)
        path = store.path
    path.write_bytes(path.read_bytes().replace(b'"grade": 2', b'"grade": 7') + b"[]\nnull\n{}\n\xff\n")
    with GradeStore(tmp_path, IDENTITY) as store:
        assert store.get("q", "d") is None


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with GradeStore(tmp_path, IDENTITY), pytest.raises(CompareError, match="another comparison is writing to"):
        GradeStore(tmp_path, IDENTITY)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompareError, match="cannot be written"):
        GradeStore(tmp_path / "file" / "folder", IDENTITY)


@pytest.mark.parametrize("value", ["Infinity", "1e999", "NaN", "[]", '"3x"', "[" * 5000 + "]" * 5000])
def test_a_line_that_holds_no_grade_is_asked_for_again(tmp_path: Path, value: str) -> None:
    with GradeStore(tmp_path, {}) as store:
        path = store.path
    path.write_text(f'{{"pair": "p", "grade": {value}, "model": "m"}}\n')
    with GradeStore(tmp_path, {}) as store:
        assert store.get("a", "b") is None
