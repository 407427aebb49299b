"""People grade the documents of ``judge_check.tsv`` one by one, and the verdict is computed again with their grades.

The file is the only record. This process remembers only the queries that people grade now, and the grades that each
person can take back.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gateway.comparisons.child import Child, without_settings
from gateway.comparisons.runs import Runs
from gateway.comparisons.sheet import CHECK_FILE, Row, Sheet
from gateway.config.files import one_writer, write_whole
from gateway.config.wording import cut
from gateway.errors import BadInput, CompareError, NotFound

_MAX_FILE_BYTES: Final = 32 * 1024**2
_MAX_GRADERS: Final = 1_000
_MAX_UNDO: Final = 100
_CLAIM_S: Final = 600.0
_VERDICT_S: Final = 120.0
_MAX_PROBLEM: Final = 1_000


@dataclass(frozen=True, slots=True)
class Standing:
    """The progress of the grading of a comparison, and the next pair of a person.

    Attributes:
        num_whole: number of queries whose documents all have a grade.
        next: the next pair; ``None`` if all have a grade.
        place: the place of ``next`` in the file, from 1.
        can_undo: whether this person can take back a grade.
        is_counted: whether the last grade, or its removal, is in the file; ``None`` without one.
    """

    comparison: str
    num_graded: int
    num_pairs: int
    num_whole: int
    num_queries: int
    next: Row | None
    place: int
    can_undo: bool
    is_counted: bool | None = None

    @property
    def num_needed(self) -> int:
        """The number of whole queries for a verdict: all that were drawn, since a choice among them is not random."""
        return self.num_queries

    @property
    def is_enough(self) -> bool:
        """Whether the verdict can be computed again."""
        return self.num_whole >= self.num_needed > 0


@dataclass(slots=True)
class _Grader:
    """One person, in one comparison.

    Attributes:
        query: the query of the shown pair.
        seen_at: the time when it was shown.
        given: the last grades, each with its pair.
    """

    query: str = ""
    seen_at: float = 0.0
    given: deque[tuple[tuple[str, str], int]] = field(default_factory=lambda: deque(maxlen=_MAX_UNDO))


class Grading:
    """The files ``judge_check.tsv`` of the comparisons in a folder.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, runs: Runs, clock: Callable[[], float] = time.monotonic) -> None:
        self._runs = runs
        self._clock = clock
        self._graders: OrderedDict[tuple[str, str], _Grader] = OrderedDict()
        # One file is in memory at a time, and two grades never change it at once.
        self._lock = asyncio.Lock()
        self._concluding = asyncio.Lock()

    async def show(self, name: str, grader: str, after: int = 0) -> Standing:
        """Return the next pair for a person, if possible of a query that no other person grades now.

        Args:
            after: the place in the file after which to look first.

        Raises:
            NotFound: there is no such comparison, or no judge has graded it.
            BadInput: its file cannot be read.
        """
        async with self._lock:
            sheet = await asyncio.to_thread(_read, await self._file(name))
            return self._standing(name, sheet, grader, after)

    async def grade(self, name: str, grader: str, pair: tuple[str, str], score: int) -> Standing:
        """Write a grade into the file, and return the next pair. The first grade of a pair counts.

        Raises:
            NotFound: as in :meth:`show`.
            BadInput: the file has no such pair, or cannot be read or written.
        """
        async with self._lock:
            sheet, is_counted, is_new = await asyncio.to_thread(_change, await self._file(name), pair, None, score)
            if pair not in sheet.pairs:
                raise BadInput(f"{CHECK_FILE} has no query {cut(pair[0])!r} with document {cut(pair[1])!r}")
            if is_new:
                self._grader(name, grader).given.append((pair, score))
            place = list(sheet.pairs).index(pair) + 1
            return self._standing(name, sheet, grader, place, is_counted=is_counted)

    async def undo(self, name: str, grader: str) -> Standing:
        """Take back the last grade of a person, and return its pair again.

        Raises:
            NotFound: as in :meth:`show`.
            BadInput: the file cannot be read or written.
        """
        async with self._lock:
            path = await self._file(name)
            given = self._grader(name, grader).given
            if not given:
                return self._standing(name, await asyncio.to_thread(_read, path), grader, 0, is_counted=False)
            pair, score = given[-1]
            sheet, is_counted, _is_new = await asyncio.to_thread(_change, path, pair, score, None)
            given.pop()
            # A person may have removed the line from the file.
            place = list(sheet.pairs).index(pair) if pair in sheet.pairs else 0
            return self._standing(name, sheet, grader, place, is_counted=is_counted)

    async def conclude(self, name: str) -> None:
        """Compute the verdict again with the grades of people, in a separate process.

        Raises:
            NotFound: as in :meth:`show`.
            BadInput: too few queries are graded, or the files of the comparison do not allow it.
        """
        async with self._lock:
            path = await self._file(name)
            standing = self._standing(name, await asyncio.to_thread(_read, path), "", 0)
        if not standing.is_enough:
            raise BadInput(
                f"{standing.num_whole} of {standing.num_queries} queries are graded completely, and a verdict needs "
                f"{standing.num_needed}: grade more documents first"
            )
        async with self._concluding:
            await _run_check(path.parent)

    async def _file(self, name: str) -> Path:
        """Return the path of a file that exists.

        Raises:
            NotFound: there is no such comparison, or no such file.
        """
        path = self._runs.path(name) / CHECK_FILE
        if not await asyncio.to_thread(self._runs.has, name):
            raise NotFound(f"no comparison is called {cut(name)!r}")
        if not await asyncio.to_thread(self._runs.has_check, name):
            raise NotFound(f"{cut(name)!r} has no {CHECK_FILE}: only a comparison with a judge writes one")
        return path

    def _grader(self, name: str, grader: str) -> _Grader:
        known = self._graders.setdefault((name, grader), _Grader())
        self._graders.move_to_end((name, grader))
        while len(self._graders) > _MAX_GRADERS:
            self._graders.popitem(last=False)
        return known

    def _standing(
        self, name: str, sheet: Sheet, grader: str, after: int, *, is_counted: bool | None = None
    ) -> Standing:
        rows, now = list(sheet.pairs.values()), self._clock()
        taken = {
            other.query
            for (run, who), other in self._graders.items()
            if run == name and who != grader and now - other.seen_at < _CLAIM_S
        }
        after = after if 0 <= after < len(rows) else 0
        left = [place for place in (*range(after, len(rows)), *range(after)) if rows[place].score is None]
        chosen = next((place for place in left if rows[place].query not in taken), left[0] if left else None)
        open_queries = {rows[place].query for place in left}
        num_queries = len({row.query for row in rows})
        shown = None if chosen is None else rows[chosen]
        if shown is not None and grader:
            known = self._grader(name, grader)
            known.query, known.seen_at = shown.query, now
        mine = self._graders.get((name, grader))
        return Standing(
            comparison=name,
            num_graded=len(rows) - len(left),
            num_pairs=len(rows),
            num_whole=num_queries - len(open_queries),
            num_queries=num_queries,
            next=shown,
            place=0 if chosen is None else chosen + 1,
            can_undo=mine is not None and bool(mine.given),
            is_counted=is_counted,
        )


def _read(path: Path) -> Sheet:
    """Read a file. Blocking.

    Raises:
        BadInput: the file cannot be read, or has a mistake.
    """
    try:
        return Sheet.read(path, _MAX_FILE_BYTES)
    except CompareError as error:
        raise BadInput(f"{error}. Correct the file") from error
    except OSError as error:
        raise BadInput(f"{CHECK_FILE} cannot be read: {error.strerror}") from error


def _change(path: Path, pair: tuple[str, str], before: int | None, after: int | None) -> tuple[Sheet, bool, bool]:
    """Change the grade of a pair, if the file has the pair with the expected grade. Blocking.

    Returns:
        The file as it is now, whether it has the new grade, and whether this call has written it.

    Raises:
        BadInput: the file cannot be read or written.
    """
    try:
        with one_writer(path):  # another gateway may serve the same folder
            sheet = _read(path)
            row = sheet.pairs.get(pair)
            if row is None or row.score != before:
                return sheet, row is not None and row.score == after, False
            content = list(sheet.with_score(*pair, after))
            write_whole(path, content)
    except OSError as error:
        raise BadInput(f"{CHECK_FILE} cannot be written: {error.strerror}; the grade was not counted") from error
    return Sheet(b"".join(content)), True, True


async def _run_check(folder: Path) -> None:
    """Run ``gateway judge-check`` in a separate process, because it reads all results and needs further libraries.

    Raises:
        BadInput: it fails, or takes too long.
    """
    command = [sys.executable, "-m", "gateway", "judge-check", str(folder)]
    try:
        child = await Child.start(command, without_settings(os.environ))
        try:
            async with asyncio.timeout(_VERDICT_S):
                errors, code = await child.stderr.read(), await child.wait()
        finally:
            await child.end()
    except TimeoutError:
        raise BadInput(f"the verdict took longer than {_VERDICT_S:.0f} s: run `gateway judge-check {folder}`") from None
    except OSError as error:
        raise BadInput(f"the verdict cannot be computed: {error.strerror}") from error
    if code:
        raise BadInput(f"the verdict cannot be computed: {errors.decode(errors='replace').strip()[-_MAX_PROBLEM:]}")
