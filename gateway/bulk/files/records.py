"""Records of one file: mappings of JSON lines, rows of CSV, rows of Parquet."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import orjson

from gateway.bulk.fields import Record
from gateway.bulk.files.lines import MAX_LINE_BYTES, FileRecord, Line, Mark, read_lines
from gateway.bulk.files.paths import Format, SourceFile, reading
from gateway.bulk.rows import BulkError, Json
from gateway.config.wording import count, cut, describe

_TOO_LONG = f"the line has more than {MAX_LINE_BYTES // 2**20} MiB, which is the limit"
# Servers written in Rust stop at 128, and there a payload is nested inside a request.
_MAX_DEPTH = 100
_TOO_DEEP = f"its values are nested more than {_MAX_DEPTH} levels deep, which is the limit"
# Of 64 bits and more: orjson reads an integer that does not fit into 64 bits as a rounded float.
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_DELIMITERS = ",;\t|"
_QUOTED = re.compile(r'"[^"]*"')
# Python's own limit for a field is 128 KiB.
csv.field_size_limit(MAX_LINE_BYTES)


def read_records(
    file: SourceFile, start: Mark, columns: Sequence[str] | None = None, *, reads_all: bool = False
) -> Iterator[FileRecord]:
    """Yield the records of a file after a mark.

    Args:
        columns: the columns to keep, if the format can leave out columns; ``None`` for all.
        reads_all: read the others too.

    Raises:
        BulkError: the file cannot be read, or does not have the format at all.
    """
    with reading(file.path):
        if file.format is Format.PARQUET:
            from gateway.bulk.files.parquet import read_parquet

            yield from read_parquet(file, start, columns, reads_all=reads_all)
            return
        with file.open() as content:
            if file.format is Format.JSONL:
                yield from _read_jsonl(file.path, content, start)
            else:
                yield from _read_csv(file.path, content, start)


# --------------------------------------------------------------------------------------------------------- JSON lines


def _read_jsonl(path: str, file: BinaryIO, start: Mark) -> Iterator[FileRecord]:
    for line in read_lines(file, start):
        if line.content is not None and not line.content.strip():
            continue
        if line.after.number == 1:
            _check_first_line(path, line)
        yield FileRecord(_parse(line), line.after.number, line.after)


def _check_first_line(path: str, line: Line) -> None:
    first = (line.content or b"").strip()
    _check_encoding(path, first)
    if first.startswith(b"["):
        raise BulkError(
            f"{path}: is a JSON array, but must be JSON lines, an object per line: jq -c '.[]' {path} > FILE.jsonl"
        )
    if first == b"{":
        raise BulkError(
            f"{path}: is JSON over several lines, but must be JSON lines, an object per line: jq -c . {path} > "
            "FILE.jsonl"
        )


def _check_encoding(path: str, first: bytes) -> None:
    """Check that a file whose first line this is contains UTF-8 text.

    Raises:
        BulkError: it is compressed, or UTF-16.
    """
    if first.startswith(b"\x1f\x8b"):
        raise BulkError(f"{path}: is compressed with gzip: add .gz to its name")
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BulkError(f"{path}: is UTF-16, but must be UTF-8: iconv -f UTF-16 -t UTF-8 {path} > FILE")


def _parse(line: Line) -> Record | str:
    if line.content is None:
        return _TOO_LONG
    try:
        value: Json = orjson.loads(line.content)
        if _LONG_NUMBER.search(line.content):
            value = json.loads(line.content)
    except orjson.JSONDecodeError as error:
        if problem := _not_utf8(line.content):
            return problem
        return f"is not JSON: {error.msg}, at character {error.pos + 1}"
    except ValueError:  # of Python's integers
        return f"has a number of more than {sys.get_int_max_str_digits():,} digits, which is the limit"
    if not isinstance(value, dict):
        return f"must be a JSON object, got {describe(value)}"
    return _TOO_DEEP if _is_too_deep(line.content, value) else value


def _is_too_deep(content: bytes, value: Json) -> bool:
    """Return whether values are nested too deep for sinks to write."""
    if content.count(b"[") + content.count(b"{") <= _MAX_DEPTH:  # the usual case
        return False
    level: list[dict[str, Json] | list[Json]] = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _not_utf8(content: bytes) -> str:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8: {error.reason} at byte {error.start + 1}"
    return ""


# ---------------------------------------------------------------------------------------------------------------- CSV


class _TooLong(Exception):
    """A record is too long, either a single line or several lines joined by a quoted field."""


class _CsvLines:
    """The lines of a CSV file for Python's reader, which takes as many lines as a record needs.

    Attributes:
        after: the end of the lines that the reader has taken.
        first: the end of the current record's first line.
    """

    def __init__(self, file: BinaryIO, start: Mark) -> None:
        self._file = file
        self.go_to(start)

    def go_to(self, mark: Mark) -> None:
        self._lines = read_lines(self._file, mark)
        self.after = mark
        self.begin_record()

    def begin_record(self) -> None:
        self._begin = self.after
        self.first: Mark | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.after = line.after
        self.first = self.first or line.after
        if line.content is None or self.after.offset - self._begin.offset > MAX_LINE_BYTES:
            raise _TooLong
        # Invalid UTF-8 is reported when the record is complete. The line end is kept because it may be part of a quoted
        # field.
        return line.content.decode(errors="surrogateescape") + line.end


def _read_csv(path: str, file: BinaryIO, start: Mark) -> Iterator[FileRecord]:
    lines = _CsvLines(file, Mark())
    header, delimiter = _read_header(path, lines)
    if start.number:
        lines.go_to(start)
    make_reader: Callable[[], Iterator[list[str]]] = lambda: csv.reader(lines, delimiter=delimiter, strict=True)  # noqa: E731
    rows = make_reader()
    while True:
        lines.begin_record()
        content: Record | str
        try:
            row = next(rows)
        except StopIteration:
            return
        except (csv.Error, _TooLong) as error:
            assert lines.first is not None  # noqa: S101  a line was taken
            content = _TOO_LONG if isinstance(error, _TooLong) else f"is not CSV: {error}"
            if lines.after != lines.first:
                content = f"a quoted field that begins here is not closed ({content})"
            # An unclosed quote swallows the lines after it, so they are read again on their own.
            lines.go_to(lines.first)
            rows = make_reader()
            yield FileRecord(content, lines.after.number, lines.after)
            continue
        assert lines.first is not None  # noqa: S101  a record has a line
        if row:
            yield FileRecord(_record(header, row), lines.first.number, lines.after)


def _read_header(path: str, lines: _CsvLines) -> tuple[list[str], str]:
    """Return the names of the columns, and the delimiter.

    Raises:
        BulkError: the names are missing or ambiguous.
    """
    try:
        line = next(lines).removesuffix("\n").removesuffix("\r")
    except StopIteration:
        raise BulkError(f"{path}: is empty; the first line must contain the column names") from None
    except _TooLong:
        raise BulkError(f"{path}:1: {_TOO_LONG}") from None
    _check_encoding(path, line.encode(errors="surrogateescape"))
    if "\r" in line:
        raise BulkError(f"{path}: its lines end in a carriage return alone: tr '\\r' '\\n' < {path} > FILE.csv")
    delimiter = max(_DELIMITERS, key=_QUOTED.sub("", line).count)
    try:
        header = next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise BulkError(f"{path}:1: is not a line of column names: {error}") from error
    if problem := _not_utf8(line.encode(errors="surrogateescape")):
        raise BulkError(f"{path}:1: {problem}")
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if twice is not None or "" in header:
        problem = f"two columns are called `{cut(twice)}`" if twice else "a column has no name"
        raise BulkError(f"{path}:1: {problem}; the first line must contain the column names")
    return header, delimiter


def _record(header: Sequence[str], row: Sequence[str]) -> Record | str:
    if len(row) != len(header):
        return f"has {count(len(row), 'column')}, but the first line names {len(header)}"
    if not all(map(str.isascii, row)) and (problem := _not_utf8("\n".join(row).encode(errors="surrogateescape"))):
        return problem
    return dict(zip(header, row, strict=True))
