"""Vectors on disk: what was embedded once is not embedded again, also after an interruption."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gateway.embedding import Vectors
from gateway.errors import CompareError

_KEY_BYTES = 16


class VectorFile:
    """The vectors of one space, task and precision, by the hash of their text.

    A file of records ``16 bytes of the text's sha256, float32 little-endian vector``, which only grows. A record that was
    torn by an interruption is cut off when the file is opened next.
    """

    def __init__(self, file: BinaryIO, width: int) -> None:
        self._file = file
        self._record = np.dtype([("key", f"V{_KEY_BYTES}"), ("vector", "<f4", (width,))])
        self._rows: dict[bytes, int] = {}
        self._load()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, text: str) -> bool:
        return _key(text) in self._rows

    def append(self, texts: Sequence[str], vectors: Vectors) -> None:
        """Add the vectors ``(n, width)`` of ``n`` texts, and write them to the disk."""
        records = np.empty(len(texts), dtype=self._record)
        keys = [_key(text) for text in texts]
        records["key"] = np.array(keys, dtype=f"V{_KEY_BYTES}")
        records["vector"] = vectors
        self._file.write(records.tobytes())
        self._file.flush()
        for key in keys:
            self._rows[key] = self._num_records
            self._num_records += 1

    def read(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of texts: ``(n, width)`` float32, in their order.

        Raises:
            KeyError: a text is not in the file.
        """
        rows = [self._rows[_key(text)] for text in texts]
        stored = np.memmap(self._file.name, dtype=self._record, mode="r", shape=(self._num_records,))
        vectors: Vectors = np.ascontiguousarray(stored["vector"][rows], dtype=np.float32)
        return vectors

    def _load(self) -> None:
        size = self._file.seek(0, 2)
        self._num_records = size // self._record.itemsize
        self._file.truncate(self._num_records * self._record.itemsize)
        self._file.seek(0, 2)
        if self._num_records:
            stored = np.memmap(self._file.name, dtype=self._record, mode="r", shape=(self._num_records,))
            self._rows = {bytes(key): row for row, key in enumerate(stored["key"].tolist())}


@contextmanager
def open_vectors(folder: Path, identity: Mapping[str, object], width: int) -> Iterator[VectorFile]:
    """Open the file of the vectors with an identity, for this process alone.

    Args:
        identity: all that the vectors depend on, besides the text.

    Raises:
        CompareError: another process has it open, or it cannot be written.
    """
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{name}.vectors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        file = path.open("ab+")
    except OSError as error:
        raise CompareError(f"the cache {path} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CompareError(
                f"another comparison is writing to {path}: wait for it, or use another --cache"
            ) from error
        yield VectorFile(file, width)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_KEY_BYTES]
