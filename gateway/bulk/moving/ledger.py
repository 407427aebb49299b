"""The ledger of a move: the digest of each item that it has written, in a file of SQLite; the base of `decisions.decide`."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gateway.bulk.moving.decisions import Base, Digest, SortKey
from gateway.bulk.rows import BulkError, RowId

_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    key BLOB PRIMARY KEY, id TEXT NOT NULL, written BLOB, pending BLOB, is_doomed INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID
"""
_PAGE = 1000
# Large enough for the integers of all stores, and more.
_INTEGER_BYTES = 40


class Ledger:
    """An open and locked ledger.

    Args:
        path: of its file, whose folder must exist.
        sort_key: the order of the store's ids.

    Raises:
        BulkError: another process works on the move, or the file cannot be used.
    """

    def __init__(self, path: Path, sort_key: Callable[[RowId], SortKey]) -> None:
        self.path = path
        self._sort_key = sort_key
        self._lock = threading.RLock()
        with self._using():
            self._db = sqlite3.connect(path, timeout=0, check_same_thread=False, isolation_level=None)
        try:
            with self._using():
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # also given up by the death of the process
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("BEGIN EXCLUSIVE")
                self._db.execute(_SCHEMA)
                self._db.execute("COMMIT")
        except BaseException:
            self._db.close()
            raise

    @contextmanager
    def _using(self) -> Iterator[None]:
        try:
            with self._lock:  # one thread reads ahead while another one writes
                yield
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise BulkError(f"{self.path}: another process works on this move; wait for it, or end it") from None
            raise BulkError(f"{self.path}: the ledger of the move cannot be used: {error}") from error

    def _key(self, row_id: RowId) -> bytes:
        """Return the place of an id in the order, as bytes that SQLite compares the same way."""
        kind, value = self._sort_key(row_id)
        if isinstance(value, int):
            encoded = (value + (1 << (8 * _INTEGER_BYTES - 1))).to_bytes(_INTEGER_BYTES)
        else:
            encoded = value.encode(errors="surrogatepass")
        return bytes([kind]) + encoded

    def bases(self) -> Iterator[tuple[RowId, Base]]:
        """Yield all items in the order of the store's ids. Items may be added meanwhile."""
        last = b""
        while True:
            with self._using():
                page = self._db.execute(
                    "SELECT key, id, written, pending FROM items WHERE key > ? ORDER BY key LIMIT ?", (last, _PAGE)
                ).fetchall()
            if not page:
                return
            last = page[-1][0]
            for _key, row_id, written, pending in page:
                yield json.loads(row_id), Base(written, pending)

    def plan(self, digests: Mapping[RowId, Digest]) -> None:
        """Note the items that are about to be written."""
        self._change(
            "INSERT INTO items (key, id, pending) VALUES (?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET pending = excluded.pending",
            ((self._key(row_id), json.dumps(row_id), digest) for row_id, digest in digests.items()),
        )

    def record(self, digests: Mapping[RowId, Digest]) -> None:
        """Note the content that both collections have of items."""
        self._change(
            "INSERT INTO items (key, id, written) VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE "
            "SET written = excluded.written, pending = NULL, is_doomed = 0",
            ((self._key(row_id), json.dumps(row_id), digest) for row_id, digest in digests.items()),
        )

    def doom(self, ids: Iterable[RowId]) -> None:
        """Mark items to be deleted at the end of a pass."""
        self._change("UPDATE items SET is_doomed = 1 WHERE key = ?", ((self._key(row_id),) for row_id in ids))

    def doomed(self) -> list[RowId]:
        """Return some of the items that are marked."""
        with self._using():
            rows = self._db.execute("SELECT id FROM items WHERE is_doomed LIMIT ?", (_PAGE,)).fetchall()
        return [json.loads(row_id) for (row_id,) in rows]

    def spare(self, ids: Iterable[RowId] | None = None) -> None:
        """Remove the marks of items, or all marks, which a killed process has left."""
        if ids is None:
            self._change("UPDATE items SET is_doomed = 0 WHERE is_doomed", [()])
        else:
            self._change("UPDATE items SET is_doomed = 0 WHERE key = ?", ((self._key(row_id),) for row_id in ids))

    def forget(self, ids: Iterable[RowId]) -> None:
        """Remove items that neither collection has."""
        self._change("DELETE FROM items WHERE key = ?", ((self._key(row_id),) for row_id in ids))

    def sample(self, number: int) -> list[RowId]:
        """Return random items that were written."""
        with self._using():
            rows = self._db.execute(
                "SELECT id FROM items WHERE written IS NOT NULL ORDER BY random() LIMIT ?", (number,)
            ).fetchall()
        return [json.loads(row_id) for (row_id,) in rows]

    def _change(self, statement: str, values: Iterable[Sequence[object]]) -> None:
        with self._using():
            self._db.execute("BEGIN")
            try:
                self._db.executemany(statement, values)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file, and let other processes open it."""
        self._db.close()
