"""Rows on disk, several for each text: the weights of its tokens, or their vectors."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gateway.errors import CompareError

KEY_BYTES = 16


def key_of(text: str) -> bytes:
    """Return the key of a text in the cache."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


class RaggedFile:
    """Rows of one space, task and output, several for each text, by the hash of the text: token weights, or token vectors.

    The rows of all texts are in one file, and an index has a record for each text: ``16 bytes of the text's sha256, place
    after its last row``. Both only grow, the index last, so that after an interruption it never names rows that are not
    there.

    Args:
        index, rows: open for reading and appending; the index is locked for this process.
        row: the kind of a row.
    """

    def __init__(self, index: BinaryIO, rows: BinaryIO, row: np.dtype[Any]) -> None:
        self._index = index
        self._rows = rows
        self._row = row
        self._record = np.dtype([("key", f"V{KEY_BYTES}"), ("end", "<u8")])
        index.seek(0)
        content = index.read()
        records = np.frombuffer(content, dtype=self._record, count=len(content) // self._record.itemsize)
        ends = records["end"].astype(np.int64)
        num_known = int(np.searchsorted(ends, rows.seek(0, 2) // row.itemsize, side="right"))
        index.truncate(num_known * self._record.itemsize)
        self._num_rows = int(ends[num_known - 1]) if num_known else 0
        rows.truncate(self._num_rows * row.itemsize)
        starts = [0, *ends[:num_known].tolist()]
        self._places = dict(zip(records["key"][:num_known].tolist(), itertools.pairwise(starts), strict=True))
        self._before = self._num_rows
        self._reused: set[bytes] = set()

    def __contains__(self, text: str) -> bool:
        return key_of(text) in self._places

    @property
    def num_reused(self) -> int:
        """The number of texts that were read, and were in the file when it was opened."""
        return len(self._reused)

    def append(self, texts: Sequence[str], rows: Sequence[npt.NDArray[Any]]) -> None:
        """Add the rows of texts, and write them to the disk.

        Raises:
            CompareError: they cannot be written.
        """
        lengths = [len(one) for one in rows]
        ends = self._num_rows + np.cumsum(lengths, dtype=np.int64)
        records = np.empty(len(texts), dtype=self._record)
        keys = [key_of(text) for text in texts]
        records["key"] = np.array(keys, dtype=f"V{KEY_BYTES}")
        records["end"] = ends
        try:
            for one in rows:
                self._rows.write(
                    np.ascontiguousarray(one, dtype=self._row.base if self._row.shape else self._row).tobytes()
                )
            self._rows.flush()
            self._index.write(records.tobytes())
            self._index.flush()
        except OSError as error:
            raise CompareError(f"the cache {self._rows.name} cannot be written: {error.strerror}") from error
        for key, length, end in zip(keys, lengths, ends.tolist(), strict=True):
            self._places[key] = (end - length, end)
        self._num_rows = int(ends[-1]) if len(ends) else self._num_rows

    def read(self, texts: Sequence[str]) -> Ragged:
        """Return the rows of texts, in their order.

        Raises:
            KeyError: a text is not in the file.
        """
        places = [self._places[key_of(text)] for text in texts]
        self._reused.update(
            key_of(text) for text, (_start, end) in zip(texts, places, strict=True) if end <= self._before
        )
        if not self._num_rows:  # an empty file cannot be mapped
            return Ragged(np.empty(0, dtype=self._row), places)
        return Ragged(np.memmap(self._rows.name, dtype=self._row, mode="r", shape=(self._num_rows,)), places)


@dataclass(frozen=True, slots=True)
class Ragged:
    """A number of rows for each text.

    Attributes:
        rows: of all texts of a file, mapped from the disk: ``(rows,)`` weights, or ``(rows, width)`` vectors.
        places: where the rows of each text start and end.
    """

    rows: npt.NDArray[Any]
    places: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> npt.NDArray[Any]:
        start, end = self.places[place]
        return self.rows[start:end]

    @property
    def bytes_per_text(self) -> float:
        """The mean size of the rows of a text."""
        num_rows = sum(end - start for start, end in self.places) / max(1, len(self.places))
        return num_rows * self.rows.dtype.itemsize * math.prod(self.rows.shape[1:])
