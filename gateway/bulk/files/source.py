"""Files as one source: their records in order, a fingerprint of their content, and ids for rows without an id."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gateway.bulk.fields import FieldNames, Fields, Record, resolve_fields
from gateway.bulk.files.columns import restored, row_of
from gateway.bulk.files.lines import FileRecord, Mark
from gateway.bulk.files.paths import Format, SourceFile, find_files, reading
from gateway.bulk.files.records import read_records
from gateway.bulk.rows import BadRow, BulkError, Position, Row, closing_readings
from gateway.bulk.stores.payloads import digest

_SAMPLE_RECORDS = 100
_MAX_BAD_RECORDS = 10_000
"""So many bad records at the beginning, without a good one between them, mean that the file has another format."""
_CHUNK_BYTES = 1 << 20
_ID_NAMESPACE = uuid.UUID("0f8fad5b-d9cb-469f-a165-70867728950e")
"""The namespace of ids that are derived from the place and the content of a row."""


_State: TypeAlias = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Summary:
    """A summary of a file's content.

    Attributes:
        digest: a hash of the content, or the filesystem's own identifier of the file's version.
        num_rows: the approximate number of rows; ``None`` if the records must be read to count them.
        state: a value that changes when the file is written or replaced.
    """

    digest: str
    num_rows: int | None
    state: _State


def open_files(places: Sequence[str], names: FieldNames, without: Sequence[str] = ()) -> FileSource:
    """Find files, and the fields of their records.

    Args:
        without: files and folders that the job writes, which are not read.

    Raises:
        BulkError: a file does not exist, has an unknown format or no records, or a field is missing.
    """
    files = find_files(places, without)
    source: FileSource | None = None
    sample: list[Record] = []
    problem, num_bad = "", 0
    for file in files:
        if source is not None and file.filesystem is not None:
            continue  # a bucket may send 50 MB for the first line of each file
        # The beginning of each file is read, so that a file in a wrong format ends the job now, and not after hours.
        records = read_records(file, Mark(), _columns(names), reads_all=True)
        with closing_readings(records):
            for number, record in enumerate(records, start=1):
                if isinstance(record.content, str):
                    num_bad += 1
                    problem = problem or f"{file.path}:{record.number}: {record.content}"
                else:
                    sample.append(record.content)
                if source is not None or number >= (_SAMPLE_RECORDS if sample else _MAX_BAD_RECORDS):
                    break
        if source is None and sample:
            source = FileSource(files, resolve_fields(names, sample, file.path))
    if source is None and num_bad >= _MAX_BAD_RECORDS:
        raise BulkError(f"{problem}. All of the first {num_bad:,} records are bad: is this the right file?")
    if source is None:
        raise BulkError(problem or f"{', '.join(places)}: no records found")
    return source


class FileSource:
    """The records of files, in the order of the files.

    A row without an id gets one from its file's name, its line number and its content. So two equal rows of a job get
    different ids, and in a store, rows of ``a/part.jsonl`` never replace rows of ``b/part.jsonl``.

    Args:
        files: one or more files.
    """

    def __init__(self, files: Sequence[SourceFile], fields: Fields) -> None:
        self._files = files
        self.fields = fields
        self._summaries: list[_Summary] | None = None

    @property
    def name(self) -> str:
        more = f" and {len(self._files) - 1} more" if len(self._files) > 1 else ""
        return f"{self._files[0].path}{more}"

    @property
    def has_unique_ids(self) -> bool:
        return self.fields.id is None

    @property
    def text_field(self) -> str:
        return self.fields.text

    def fingerprint(self) -> str:
        """Read all files, and return a hash of their names and content."""
        hashed = hashlib.sha256()
        for file, summary in zip(self._files, self._summarize_all(), strict=True):
            hashed.update(f"{file.name}\0{summary.digest}\n".encode(errors="surrogateescape"))
        return hashed.hexdigest()

    def count(self) -> int | None:
        """Return the number of lines or rows; ``None`` for compressed files, and for text files on other machines."""
        total = 0
        for summary in self._summarize_all():
            if summary.num_rows is None:
                return None
            total += summary.num_rows
        return total

    def _summarize_all(self) -> list[_Summary]:
        if self._summaries is None:
            for filesystem in {id(file.filesystem): file.filesystem for file in self._files}.values():
                if filesystem is not None:  # once, because some list a folder again for each of its files
                    filesystem.invalidate_cache()
            self._summaries = [_summarize(file) for file in self._files]
        return self._summaries

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        first, start = _read_position(after)
        for index, file in enumerate(self._files[first:], start=first):
            # A row without an id gets one that is made from all of its columns.
            for record in read_records(file, start, _columns(self.fields), reads_all=self.fields.id is None):
                yield self._row(index, record)
            start = Mark()
            self._check_unchanged(index)

    def _row(self, index: int, record: FileRecord) -> Row | BadRow:
        file = self._files[index]
        place = f"{file.path}:{record.number}"
        position = [index, record.after.offset, record.after.number]
        if isinstance(record.content, str):
            return BadRow(place, record.content, position)
        derived_id = None
        if self.fields.id is None:
            derived_id = str(uuid.uuid5(_ID_NAMESPACE, f"{file.name}:{record.number}:{digest(record.content).hex()}"))
        # Fields that the user names are kept, whatever their names are.
        content = restored(record.content) if self.fields.payload is None else record.content
        return row_of(self.fields, content, place, position, derived_id)

    def _check_unchanged(self, index: int) -> None:
        """Check that a file has not changed since its fingerprint was taken.

        Raises:
            BulkError: the file was written in the meantime.
        """
        if self._summaries is None:
            return
        file = self._files[index]
        if file.filesystem is not None:  # otherwise it may answer from an old listing
            file.filesystem.invalidate_cache(file.inner)
        if (before := self._summaries[index]).state == (now := _state(file)):
            return
        # A new inode or change time alone may only mean that the file got other permissions or another link.
        is_written = isinstance(now, str) or before.state[:2] != now[:2]
        if is_written or _hash(file)[0] != before.digest:
            raise BulkError(
                f"{file.path}: was modified while it was being read, so its rows may be from different "
                "versions: start over with --restart once the file is complete"
            )

    def close(self) -> None:
        """Do nothing, because a file is open only while it is read."""


def _columns(fields: Fields | FieldNames) -> list[str] | None:
    """Return the columns to keep, as far as they are known; ``None`` for all."""
    if fields.payload is None:
        return None
    paths = [path for path in (fields.id, fields.text, fields.title, *fields.payload) if path is not None]
    return [part for path in paths for part in (path, path.partition(".")[0])]


def _read_position(after: Position | None) -> tuple[int, Mark]:
    match after:
        case None:
            return 0, Mark()
        case [int(index), int(offset), int(number)]:
            return index, Mark(offset, number)
    raise BulkError(f"{after!r} is not a position in files: the manifest is damaged")


def _summarize(file: SourceFile) -> _Summary:
    """Summarize a file: read it if it is on this machine, otherwise ask its filesystem."""
    num_rows: int | None = None
    if file.format is Format.PARQUET:
        from gateway.bulk.files.parquet import count_rows

        num_rows = count_rows(file)
    state = _state(file)
    if isinstance(state, str):
        return _Summary(state, num_rows, state)
    digest, num_lines = _hash(file)
    if file.format is not Format.PARQUET and not file.is_packed:
        num_rows = num_lines - (file.format is Format.CSV)
    return _Summary(digest, num_rows, state)


def _hash(file: SourceFile) -> tuple[str, int]:
    """Return a hash of a file's content, and its number of lines."""
    hashed, num_lines, last = hashlib.sha256(), 0, b"\n"
    with reading(file.path), file.open_raw() as raw:
        while chunk := raw.read(_CHUNK_BYTES):
            hashed.update(chunk)
            num_lines += chunk.count(b"\n")
            last = chunk[-1:]
    return hashed.hexdigest(), num_lines + (last != b"\n")


def _state(file: SourceFile) -> _State:
    """Return the file's size and times, or the identifier that its filesystem gives the file's version."""
    if file.filesystem is not None:
        try:
            return str(file.filesystem.ukey(file.inner))
        except Exception as error:  # each filesystem raises its own library's errors
            raise BulkError(f"{file.path}: cannot be read: {type(error).__name__}: {error}") from error
    with reading(file.path):
        stat = Path(file.path).stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns
