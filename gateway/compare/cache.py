"""Vectors on disk: no text is embedded twice, even after an interruption."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from gateway.compare.ragged import KEY_BYTES, RaggedFile, key_of
from gateway.errors import CompareError
from gateway.types import Vectors


class VectorFile:
    """The vectors of one space, task and precision, by the hash of their text.

    The file has records of ``16 bytes of the text's sha256, float32 little-endian vector``, and only grows. A record that
    an interruption cut short is removed when the file is opened again.

    Args:
        file: open for reading and appending, and locked for this process.
        width: of the vectors.
    """

    def __init__(self, file: BinaryIO, width: int) -> None:
        self._file = file
        self._record = np.dtype([("key", f"V{KEY_BYTES}"), ("vector", "<f4", (width,))])
        self._num_records = file.seek(0, 2) // self._record.itemsize
        self._num_before = self._num_records
        self._reused: set[int] = set()
        file.truncate(self._num_records * self._record.itemsize)
        self._rows = {key: row for row, key in enumerate(self._stored()["key"].tolist())}

    def __contains__(self, text: str) -> bool:
        return key_of(text) in self._rows

    @property
    def num_reused(self) -> int:
        """The number of vectors that were read, and were in the file when it was opened."""
        return len(self._reused)

    def append(self, texts: Sequence[str], vectors: Vectors) -> None:
        """Add the vectors ``(n, width)`` of ``n`` texts, and write them to the disk.

        Raises:
            CompareError: they cannot be written.
        """
        records = np.empty(len(texts), dtype=self._record)
        keys = [key_of(text) for text in texts]
        records["key"] = np.array(keys, dtype=f"V{KEY_BYTES}")
        records["vector"] = vectors
        try:
            self._file.write(records.tobytes())
            self._file.flush()
        except OSError as error:
            raise CompareError(f"the cache {self._file.name} cannot be written: {error.strerror}") from error
        for key in keys:
            self._rows[key] = self._num_records
            self._num_records += 1

    def read(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of texts: ``(n, width)`` float32, in their order.

        Raises:
            KeyError: a text is not in the file.
        """
        rows = [self._rows[key_of(text)] for text in texts]
        self._reused.update(row for row in rows if row < self._num_before)
        vectors: Vectors = np.ascontiguousarray(self._stored()["vector"][rows], dtype=np.float32)
        return vectors

    def _stored(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        if not self._num_records:
            return np.empty(0, dtype=self._record)  # an empty file cannot be mapped
        return np.memmap(self._file.name, dtype=self._record, mode="r", shape=(self._num_records,))


class VectorCache:
    """A folder of vector files. Each is opened on first use, and closed with the cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, VectorFile] = {}
        self._ragged: dict[Path, RaggedFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def num_reused(self) -> int:
        """The number of vectors that were read, and that an earlier run had embedded."""
        ragged = sum(file.num_reused for file in self._ragged.values())
        return sum(file.num_reused for file in self._open.values()) + ragged

    def file(self, identity: Mapping[str, object], width: int) -> VectorFile:
        """Return the file of the vectors with an identity, locked for this process.

        Args:
            identity: everything that the vectors depend on, except the text.

        Raises:
            CompareError: another process has locked the file, or it cannot be written.
        """
        path = self.folder / f"{_name(identity)}.vectors"
        if path not in self._open:
            self._open[path] = VectorFile(self._lock(path, identity), width)
        return self._open[path]

    def ragged(self, identity: Mapping[str, object], row: np.dtype[Any]) -> RaggedFile:
        """Return the file of the rows with an identity, locked for this process.

        Raises:
            CompareError: another process has locked the file, or it cannot be written.
        """
        path = self.folder / f"{_name(identity)}.index"
        if path not in self._ragged:
            index = self._lock(path, identity)
            rows = self._open_file(path.with_suffix(".rows"))
            self._ragged[path] = RaggedFile(index, rows, row)
        return self._ragged[path]

    def _lock(self, path: Path, identity: Mapping[str, object]) -> BinaryIO:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # For people, since the file's name is a hash.
            path.with_suffix(".json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CompareError(f"the cache {path} cannot be written: {error.strerror}") from error
        file = self._open_file(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CompareError(
                f"another comparison is writing to {path}: wait for it, or use another --cache"
            ) from error
        return file

    def _open_file(self, path: Path) -> BinaryIO:
        try:
            file = path.open("ab+")
        except OSError as error:
            raise CompareError(f"the cache {path} cannot be written: {error.strerror}") from error
        self._stack.callback(_close, file)
        return file


def _close(file: BinaryIO) -> None:
    with suppress(OSError):  # each record was flushed, or its error is known: a full disk fails once more here
        file.close()


def _name(identity: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
