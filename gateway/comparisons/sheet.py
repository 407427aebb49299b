"""``judge_check.tsv``: the pairs of query and document for people to grade, blind to the judge and the arms.

The file has one line per pair, with queries and their documents in random order::

    query-id <tab> corpus-id <tab> score <tab> query <tab> document

People fill in ``score`` in a spreadsheet, or in the console, which changes only the lines of the pairs that it grades.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.comparisons.scale import MAX_GRADE
from gateway.config.files import read_bounded
from gateway.errors import CompareError

CHECK_FILE: Final = "judge_check.tsv"
HEADER: Final = ("query-id", "corpus-id", "score", "query", "document")
MAX_ID: Final = 10_000
"""The maximum number of characters in an id: people read the line, and CSV readers limit the length of a field."""

_SCORE: Final = HEADER.index("score")
_NUM_READ_COLUMNS: Final = 3
_MAX_PAIRS: Final = 50_000  # 60 queries with the first ten documents of some arms are far fewer
_MARK: Final = b"\xef\xbb\xbf"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FORMULA: Final = ("=", "+", "-", "@")


class Tabs(csv.excel_tab):
    """Columns separated by tabs, in quotes where needed, as spreadsheets read and write them."""

    lineterminator = "\n"


def form_line(columns: Sequence[str]) -> bytes:
    """Return a line of a form that people fill in using a spreadsheet.

    Without quotes around it, a text that begins with ``"`` would swallow the lines after it.
    """
    buffer = io.StringIO()
    csv.writer(buffer, Tabs).writerow(columns)
    return buffer.getvalue().encode(errors="replace")


def form_text(text: str) -> str:
    """Return a text on one line, safe for spreadsheets.

    Control characters become spaces: a spreadsheet cuts a text at a NUL, and rejects a file with others. A text that
    begins like a formula gets a space in front.
    """
    text = " ".join(_CONTROL.sub(" ", text).split())
    return f" {text}" if text.startswith(_FORMULA) else text


@dataclass(frozen=True, slots=True)
class Row:
    """A pair to grade.

    Attributes:
        query, document: their ids.
        score: the grade by people; ``None`` before they grade it.
        query_text, document_text: empty if a spreadsheet has removed the columns.
    """

    query: str
    document: str
    score: int | None
    query_text: str = ""
    document_text: str = ""


def parse_rows(lines: Iterable[tuple[str, bytes]]) -> Iterator[Row]:
    """Yield the pairs of the file.

    Args:
        lines: the lines that are not blank, each with its ``file:line``.

    Raises:
        CompareError: a line is wrong, or contradicts the grade of a pair in an earlier line.
    """
    known: dict[tuple[str, str], int] = {}
    for number, (place, line) in enumerate(lines):
        columns = _columns(place, line)
        query, document, text = columns[:_NUM_READ_COLUMNS]
        if number == 0:
            if (query, document, text) != HEADER[:_NUM_READ_COLUMNS]:
                raise CompareError(f"{place}: the header is missing: the first line must be {', '.join(HEADER)}")
            continue
        if text and text not in map(str, range(MAX_GRADE + 1)):
            raise CompareError(f"{place}: the score must be 0, 1, 2 or 3, or empty, got {text!r}")
        score = int(text) if text else None
        if score is not None and known.setdefault((query, document), score) != score:
            earlier = known[query, document]
            raise CompareError(
                f"{place}: query {query!r} and document {document!r} have score {score}, and {earlier} earlier"
            )
        yield Row(query, document, score, *columns[_NUM_READ_COLUMNS : len(HEADER)])


def _columns(place: str, line: bytes) -> list[str]:
    try:
        columns = [column.strip() for column in next(csv.reader([line.decode()], Tabs))]
    except UnicodeDecodeError as error:
        raise CompareError(f"{place}: is not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except csv.Error as error:
        raise CompareError(f"{place}: cannot be read: {error}") from error
    if len(columns) < _NUM_READ_COLUMNS:
        raise CompareError(f"{place}: must have the columns {', '.join(HEADER)}, separated by tabs")
    return columns


class Sheet:
    """The whole file, for a change of single grades. Every other line is kept byte for byte.

    Attributes:
        pairs: the pairs by the ids of query and document, in the order of the file.

    Args:
        content: the content of the file.

    Raises:
        CompareError: a line is wrong, or there are too many.
    """

    def __init__(self, content: bytes) -> None:
        self._lines = list(io.BytesIO(content))
        filled = [number for number, line in enumerate(self._lines) if _strip_line(line, number).strip()]
        if len(filled) > _MAX_PAIRS + 1:
            raise CompareError(f"{CHECK_FILE}: has {len(filled) - 1:,} pairs; the limit is {_MAX_PAIRS:,}")
        places = ((f"{CHECK_FILE}:{number + 1}", _strip_line(self._lines[number], number)) for number in filled)
        self._numbers: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        pairs: dict[tuple[str, str], Row] = {}
        for number, row in zip(filled[1:], parse_rows(places), strict=True):
            pair = row.query, row.document
            self._numbers[pair].append(number)
            if pair not in pairs or row.score is not None:
                pairs[pair] = row
        self.pairs: Mapping[tuple[str, str], Row] = pairs

    @classmethod
    def read(cls, path: Path, max_bytes: int) -> Sheet:
        """Read a file of at most ``max_bytes``.

        Raises:
            CompareError: a line is wrong.
            OSError: the file cannot be read, or is larger.
        """
        return cls(read_bounded(path, max_bytes))

    def with_score(self, query: str, document: str, score: int | None) -> Iterator[bytes]:
        """Yield the lines of the file with another grade for a pair."""
        changed = self._numbers[query, document]
        for number, line in enumerate(self._lines):
            yield _with_score(line, score) if number in changed else line


def _strip_line(line: bytes, number: int) -> bytes:
    """Return a line without its end, and without the byte order mark that some editors put in front of the first one."""
    return (line.removeprefix(_MARK) if number == 0 else line).rstrip(b"\r\n")


def _with_score(line: bytes, score: int | None) -> bytes:
    bare = line.rstrip(b"\r\n")
    columns = next(csv.reader([bare.decode()], Tabs))
    columns[_SCORE] = "" if score is None else str(score)
    return form_line(columns).rstrip(b"\n") + line[len(bare) :]
