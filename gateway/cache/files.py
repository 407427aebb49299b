"""Vectors on disk, so that no text is embedded twice, even after an interruption."""

from __future__ import annotations

import fcntl
import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from gateway.cache.keys import KEY_BYTES, Identity, key_of, name_of
from gateway.errors import StartError
from gateway.types import SparseVector

_RECORD = np.dtype([("key", f"V{KEY_BYTES}"), ("end", "<u8"), ("check", "<u4"), ("note", "<u4")])
# The number of new records that are collected before they are merged into the sorted ones.
_LEAST_RECENT = 4096
# A record with a damaged place must not cause gigabytes to be read.
_LARGEST_BYTES = 2**26


class CacheError(StartError):
    """The cache cannot be written, or is damaged."""


class RowFile:
    """The rows of one identity. Each text has one or more: its vector, its token weights, or its token vectors.

    One file has the rows of all texts, and an index has a record for each text: ``16 bytes of the text's sha256, place
    after its last row, crc32, note``. Both files only grow. The index is written last, so that after an interruption it
    never refers to missing rows. If a text is stored again, the newest rows count.

    An entry takes 44 bytes of memory, and about 200 while it is new.

    Args:
        index, rows: files open for reading and appending; this process has locked the index.
        row: the data type of a row.
    """

    def __init__(self, index: BinaryIO, rows: BinaryIO, row: np.dtype[Any]) -> None:
        self._index = index
        self._rows = rows
        self._row = row
        index.seek(0)
        content = index.read()
        records = np.frombuffer(content, dtype=_RECORD, count=len(content) // _RECORD.itemsize)
        there = np.flatnonzero(records["end"] <= rows.seek(0, 2) // row.itemsize)
        self._num_records = int(there[-1]) + 1 if len(there) else 0
        self._records = records[: self._num_records].copy()
        self._num_before = self._num_records
        self._reused: set[int] = set()
        index.truncate(self._num_records * _RECORD.itemsize)
        self._num_rows = int(self._records["end"][-1]) if self._num_records else 0
        rows.truncate(self._num_rows * row.itemsize)
        self._sort()

    @property
    def num_reused(self) -> int:
        """The number of entries that were read and existed when the file was opened."""
        return len(self._reused)

    @property
    def num_bytes(self) -> int:
        """The size of both files in bytes."""
        return self._num_records * _RECORD.itemsize + self._num_rows * self._row.itemsize

    # ------------------------------------------------------------------------------------------------------- finding

    def _sort(self) -> None:
        hashes = self._records[: self._num_records]["key"].copy().view("<u8")[::2]
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32)
        self._sorted = hashes[self._order]
        self._recent: dict[bytes, int] = {}

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Return the number of the newest record of each key; -1 for a key without a record."""
        if not keys:
            return []
        hashes = np.frombuffer(b"".join(keys), dtype="<u8")[::2]
        starts, stops = (np.searchsorted(self._sorted, hashes, side) for side in ("left", "right"))
        found = []
        for key, start, stop in zip(keys, starts.tolist(), stops.tolist(), strict=True):
            number = self._recent.get(key, -1)
            if number < 0 and start < stop:
                alike = (int(other) for other in self._order[start:stop])
                number = max((other for other in alike if self._records["key"][other].tobytes() == key), default=-1)
            found.append(number)
        return found

    def lacking(self, texts: Iterable[str]) -> set[str]:
        """Return the texts without rows."""
        known = list(dict.fromkeys(texts))
        return {
            text for text, number in zip(known, self.find([key_of(text) for text in known]), strict=True) if number < 0
        }

    def _place(self, number: int) -> tuple[int, int]:
        return int(self._records["end"][number - 1]) if number else 0, int(self._records["end"][number])

    # ------------------------------------------------------------------------------------------------------- writing

    def append(
        self, texts: Sequence[str], rows: Sequence[npt.NDArray[Any]], notes: Sequence[int] | None = None
    ) -> None:
        """Add the rows of texts, and write them to disk.

        Args:
            notes: a number below 2**32 to store with each text; by default 0.

        Raises:
            CacheError: the rows cannot be written.
        """
        kind = self._row.base if self._row.shape else self._row
        try:
            self.add(
                [
                    (key_of(text), note, np.ascontiguousarray(row, dtype=kind).tobytes())
                    for text, row, note in zip(texts, rows, notes or [0] * len(texts), strict=True)
                ]
            )
        except OSError as error:
            raise CacheError(f"the cache {self._rows.name} cannot be written: {error.strerror}") from error

    def add(self, entries: Sequence[tuple[bytes, int, bytes]]) -> None:
        """Add entries, and write them to disk.

        Args:
            entries: for each, its key, a number below 2**32 to store with it, and the bytes of its rows.

        Raises:
            OSError: the entries cannot be written. The files must then be opened again before further use.
        """
        records = np.empty(len(entries), dtype=_RECORD)
        end = self._num_rows
        for i, (key, note, content) in enumerate(entries):
            end += len(content) // self._row.itemsize
            records[i] = (key, end, _check(key, note, content), note)
        for _key, _note, content in entries:
            self._rows.write(content)
        self._rows.flush()
        self._index.write(records.tobytes())
        self._index.flush()
        while len(self._records) < self._num_records + len(records):
            self._records = np.concatenate([self._records, np.empty(len(self._records) + 1024, dtype=_RECORD)])
        self._records[self._num_records : self._num_records + len(records)] = records
        self._recent |= {key: self._num_records + i for i, (key, _note, _content) in enumerate(entries)}
        self._num_records += len(records)
        self._num_rows = end
        if len(self._recent) > max(_LEAST_RECENT, len(self._sorted) // 2):
            self._sort()

    # ------------------------------------------------------------------------------------------------------- reading

    def notes(self, texts: Sequence[str]) -> list[int]:
        """Return the note of each text; 0 for a text without rows."""
        numbers = self.find([key_of(text) for text in texts])
        return [int(self._records["note"][number]) if number >= 0 else 0 for number in numbers]

    def get(self, number: int) -> tuple[int, bytes] | None:
        """Return the note and the bytes of a record's rows; ``None`` if they are damaged.

        The rows are not memory-mapped, because an unreadable page of a mapped file kills the process.

        Raises:
            OSError: the rows cannot be read.
        """
        start, end = self._place(number)
        num_bytes = (end - start) * self._row.itemsize
        if not start <= end <= self._num_rows or num_bytes > _LARGEST_BYTES:
            return None
        content = os.pread(self._rows.fileno(), num_bytes, start * self._row.itemsize)
        record = self._records[number]
        note = int(record["note"])
        return None if _check(record["key"].tobytes(), note, content) != record["check"] else (note, content)

    def read(self, texts: Sequence[str]) -> Ragged:
        """Return the rows of texts, in the texts' order.

        Raises:
            KeyError: a text is not in the file.
            CacheError: the rows of a text are damaged.
        """
        keys = [key_of(text) for text in texts]
        numbers = self.find(keys)
        if -1 in numbers:
            raise KeyError(texts[numbers.index(-1)])
        self._reused.update(number for number in numbers if number < self._num_before)
        places = [self._place(number) for number in numbers]
        if not self._num_rows:  # an empty file cannot be mapped
            return Ragged(np.empty(0, dtype=self._row), places)
        rows = np.memmap(self._rows.name, dtype=self._row, mode="r", shape=(self._num_rows,))
        for key, number, (start, end) in zip(keys, numbers, places, strict=True):
            record = self._records[number]
            is_there = start <= end <= self._num_rows
            if not is_there or _check(key, int(record["note"]), rows[start:end].data) != record["check"]:
                raise CacheError(f"the cache {self._rows.name} is damaged: delete it")
        return Ragged(rows, places)


def _check(key: bytes, note: int, content: bytes | memoryview) -> int:
    return zlib.crc32(content, zlib.crc32(note.to_bytes(4, "little"), zlib.crc32(key)))


WEIGHT = np.dtype([("index", "<u4"), ("value", "<f4")])
"""The id of a token, and its weight."""


def weight_rows(sparse: SparseVector) -> npt.NDArray[np.void]:
    """Return the weights of a text as rows of :data:`WEIGHT`."""
    rows = np.empty(len(sparse.indices), dtype=WEIGHT)
    rows["index"], rows["value"] = sparse.indices, sparse.values
    return rows


@dataclass(frozen=True, slots=True)
class Ragged:
    """Any number of rows for each text.

    Attributes:
        rows: the rows of all texts of a file, memory-mapped: ``(rows,)`` weights, or ``(rows, width)`` vectors.
        places: the start and end of the rows of each text.
    """

    rows: npt.NDArray[Any]
    places: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> npt.NDArray[Any]:
        start, end = self.places[place]
        return self.rows[start:end]

    def firsts(self) -> npt.NDArray[Any]:
        """Return a copy of each text's first row: ``(texts,)`` weights, or ``(texts, width)`` vectors."""
        return np.ascontiguousarray(self.rows[[start for start, _end in self.places]])

    @property
    def bytes_per_text(self) -> float:
        """The mean size of a text's rows in bytes."""
        num_rows = sum(end - start for start, end in self.places) / max(1, len(self.places))
        return num_rows * self.rows.dtype.itemsize * math.prod(self.rows.shape[1:])


class CacheFolder:
    """A folder of row files. Each is opened on first use, and closed with the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, RowFile] = {}
        self._num_reused = 0  # the entries of files that were closed
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._num_reused = self.num_reused
        self._open.clear()
        self._stack.close()

    @property
    def num_reused(self) -> int:
        """The number of entries that were read and came from an earlier run."""
        return self._num_reused + sum(file.num_reused for file in self._open.values())

    def rows(self, identity: Identity, row: np.dtype[Any]) -> RowFile:
        """Return the rows of an identity, locked for this process.

        Raises:
            CacheError: another process has locked the file, or it cannot be written.
        """
        identity = {**identity, "row": str(row)}
        name = name_of(identity)
        if name not in self._open:
            path = self.folder / f"{name}.index"
            index = self._lock(path, identity)
            self._open[name] = RowFile(index, self._open_file(path.with_suffix(".rows")), row)
        return self._open[name]

    def _lock(self, path: Path, identity: Identity) -> BinaryIO:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # For people, because the file's name is a hash.
            path.with_suffix(".json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CacheError(f"the cache {path} cannot be written: {error.strerror}") from error
        file = self._open_file(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CacheError(f"another process is writing to {path}: wait for it, or use another folder") from error
        return file

    def _open_file(self, path: Path) -> BinaryIO:
        try:
            file = path.open("ab+")
        except OSError as error:
            raise CacheError(f"the cache {path} cannot be written: {error.strerror}") from error
        self._stack.callback(_close, file)
        return file


def _close(file: BinaryIO) -> None:
    with suppress(OSError):  # every record was flushed, or its error is known; a full disk fails here again
        file.close()
