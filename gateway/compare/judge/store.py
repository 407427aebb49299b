"""Grades on disk, so that no pair is graded twice, even after an interruption."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from gateway.comparisons.scale import MAX_GRADE
from gateway.config.files import open_to_append, write_whole
from gateway.errors import CompareError


@dataclass(frozen=True, slots=True)
class StoredGrade:
    """A grade, and the id of the model that gave it."""

    grade: int
    model: str


class GradeStore:
    """The grades of one judge with one prompt, by a hash of the query and the document.

    The file has a JSON object per line, and only grows. A line that an interruption cut short is removed when the file is
    opened again. Refusals, cut and unreadable answers are not kept, so another run asks again.

    Args:
        folder: the folder, which is created if missing.
        identity: everything that a grade depends on, except the texts.

    Raises:
        CompareError: another process has locked the file, or it cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        self.path = folder / f"{name}.grades.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # For people, because the file's name is a hash.
            write_whole(folder / f"{name}.json", json.dumps(identity, indent=2) + "\n")
            self._file: BinaryIO = os.fdopen(open_to_append(self.path, 0o666), "ab+")
        except OSError as error:
            raise CompareError(f"the cache {self.path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise CompareError(
                f"another comparison is writing to {self.path}: wait for it, or use another --cache"
            ) from error
        self._grades = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # each grade was flushed, or its error is known: a full disk fails again here
            self._file.close()

    def get(self, query: str, document: str) -> StoredGrade | None:
        """Return the grade of a document for a query, given their texts; ``None`` if it is not known."""
        return self._grades.get(_key(query, document))

    def add(self, query: str, document: str, grade: StoredGrade) -> None:
        """Keep a grade, and write it to the disk.

        Raises:
            CompareError: the file cannot be written.
        """
        key = _key(query, document)
        line = json.dumps({"pair": key, "grade": grade.grade, "model": grade.model}) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise CompareError(f"the cache {self.path} cannot be written: {error.strerror}") from error
        self._grades[key] = grade

    def _read(self) -> dict[str, StoredGrade]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        grades = {}
        for line in content[:whole].splitlines():
            try:
                row = json.loads(line)
                pair, grade, model = str(row["pair"]), int(row["grade"]), str(row["model"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue  # asked for again
            if 0 <= grade <= MAX_GRADE:
                grades[pair] = StoredGrade(grade, model)
        return grades


def _key(query: str, document: str) -> str:
    return hashlib.sha256(json.dumps([query, document]).encode()).hexdigest()[:32]
